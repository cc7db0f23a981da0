"""Linear transforms between a thin network's blocks and a wide one's, and how they are merged away.

A thin block has c output channels, the teacher's C. During imitation a bias-free 1x1 convolution `up` maps its output
to C channels for the comparison, and another, `down`, maps them back to c for the next block (Zhou et al. 2020).
Between `up`, `down` and the convolutions that read the block's output there is neither bias nor nonlinearity, so their
product is multiplied into these convolutions afterwards: the plain thin network remains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gowide_dist.networks.network import Network


def linear_transform(in_channels: int, out_channels: int) -> nn.Module:
    """A trainable 1x1 convolution [B, C_in, H, H] -> [B, C_out, H, H]; the identity where channels are equal."""
    if in_channels == out_channels:
        return nn.Identity()
    transform = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    nn.init.orthogonal_(transform.weight)
    return transform


def merged(
    student: Network, up: Sequence[nn.Module], down: Sequence[nn.Module], head: Sequence[nn.Module] | None
) -> Network:
    """A plain network of the student's architecture with the same outputs as the student with its transforms.

    `up[i]` follows block i, `down[i]` follows `up[i]`, before block i + 1. `head`, if given, follows the last `up` in
    place of the student's own layers.
    """
    network = type(student)(student.architecture, student.num_classes).to(next(student.parameters()))
    network.load_state_dict(student.state_dict())
    network.train(student.training)
    with torch.no_grad():
        for index in range(student.num_blocks - 1):
            if isinstance(up[index], nn.Conv2d):  # where channels differ: then `down` is a convolution too
                product = _matrix(down[index]) @ _matrix(up[index])
                for reader in network.readers(index + 1):
                    weight = reader.get_parameter("weight")
                    weight.copy_(_merged_weight(weight, product))
        if head is not None:
            for own, given in zip(network.head_layers, head, strict=True):
                _copy_what_fits(own, given)
            if isinstance(up[-1], nn.Conv2d):
                own_weight, given_weight = (_first_weight(layers[0]) for layers in (network.head_layers, head))
                own_weight.copy_(_merged_weight(given_weight, _matrix(up[-1])))
    return network


def _merged_weight(weight: Tensor, matrix: Tensor) -> Tensor:
    """The weight of x -> layer(matrix @ x); matrix: [C_out, C_in] of the channels of x.

    Exact for 3x3 convolutions too, because a linear map leaves zero padding zero.
    """
    return weight @ matrix if weight.ndim == 2 else torch.einsum("omhw,mi->oihw", weight, matrix)


def _first_weight(layer: nn.Module) -> Tensor:
    """Of the convolution, or of the classifier, that a layer begins with."""
    return next(layer.parameters())


def _copy_what_fits(layer: nn.Module, given: nn.Module) -> None:
    state = given.state_dict()
    for name, value in layer.state_dict().items():
        if value.shape == state[name].shape:
            value.copy_(state[name])


def _matrix(transform: nn.Module) -> Tensor:
    """[C_out, C_in] of a 1x1 convolution."""
    assert isinstance(transform, nn.Conv2d)
    return transform.weight[:, :, 0, 0]
