"""Reading and writing a network's weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from gowide_dist.errors import RunError
from gowide_dist.files import NO_WEIGHTS, write_atomically


def save_weights(path: Path, network: nn.Module) -> None:
    """Write parameters and statistics as safetensors, atomically. Equal weights give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_atomically(path, save(tensors))


def load_weights(path: Path, network: nn.Module) -> None:
    """Read weights from a .safetensors file, or from a state dict as published by torchvision.

    Raises RunError if the file is damaged, or its keys and shapes are not the network's; names the first that differ.
    """
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    except Exception as error:  # safetensors, pickle and torch raise several types
        raise RunError(f"{path}: {NO_WEIGHTS}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    differences = [
        f"{name} is {shapes.get(name, 'missing')} in the file, {expected.get(name, 'unknown')} in the network"
        for name in {**expected, **shapes}
        if shapes.get(name) != expected.get(name)
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise RunError(f"{path}: weights of another network: {'; '.join(differences[:3])}{more}")
    network.load_state_dict(weights, assign=next(network.parameters()).is_meta)
