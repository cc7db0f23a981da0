"""Reading and writing a network's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save

from gowide_dist.files import write_atomically
from gowide_dist.networks.build import build_on_meta
from gowide_dist.networks.foreign import Settings
from gowide_dist.networks.network import Network
from gowide_dist.networks.published import find_weights
from gowide_dist.networks.wrapped import Wrapped


def save_weights(path: Path, network: Network, metadata: Mapping[str, str] | None = None) -> None:
    """Write parameters and statistics as safetensors, atomically. Equal weights give equal bytes.

    metadata: of the file, with one key at most; safetensors writes several in any order.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.plain.state_dict().items()}
    seen: set[int] = set()
    for name, tensor in tensors.items():  # safetensors takes no weights that two modules share
        if tensor.data_ptr() in seen and tensor.numel():
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    write_atomically(path, save(tensors, dict(metadata) if metadata else None))


def load_weights(path: Path, network: Network, *, fresh_classifier: bool = False, prefix: str | None = None) -> None:
    """Read weights from a .safetensors file or a checkpoint of PyTorch's, whose code does not run.

    fresh_classifier: leave the network's classifier as it is. prefix: of the names in the file, if it holds several
    networks. Raises RunError if the file is damaged, or of another network: by its cause.
    """
    weights, _ = find_weights(path, network, lambda: _classifier(network), fresh_classifier, prefix)
    network.load_state_dict(weights, strict=False, assign=next(network.parameters()).is_meta)


def check_weights(
    path: Path, architecture: Settings, num_classes: int, *, fresh_classifier: bool, prefix: str | None
) -> str:
    """What stands before the names of a network's weights in a file. Raises RunError as `load_weights` does."""
    network = build_on_meta(architecture, num_classes)
    return find_weights(path, network, lambda: _classifier(network), fresh_classifier, prefix)[1]


def _classifier(network: Network) -> tuple[str, ...]:
    """Starts of the names of the weights that the number of classes shapes: of another's network, by building it for
    one class more, since it may have several heads, or its classifier under any name.
    """
    if not isinstance(network, Wrapped):
        return (f"{network.classifier_name}.",)
    other = build_on_meta(network.architecture, network.num_classes + 1).plain.state_dict()
    own = network.plain.state_dict()
    return tuple(name for name, each in own.items() if name not in other or other[name].shape != each.shape)
