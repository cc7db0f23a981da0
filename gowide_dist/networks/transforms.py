"""Linear transforms between a thin network's blocks and a wide one's, and how they vanish.

A thin block writes c channels where the teacher's writes C. While it imitates, a bias-free 1x1 convolution `up` brings
its output to C for the comparison, and another, `down`, brings C back to c for the next block (Zhou et al. 2020).
Nothing stands between `up`, `down` and the convolutions that read the block's output, so all that is linear is
multiplied out afterwards: the network that remains is the plain thin one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gowide_dist.networks.resnet import ResNet


def linear_transform(in_channels: int, out_channels: int) -> nn.Module:
    """A trainable map [B, in, H, H] -> [B, out, H, H] of the channels at each pixel; nothing where they are equal."""
    if in_channels == out_channels:
        return nn.Identity()
    transform = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    nn.init.orthogonal_(transform.weight)
    return transform


def merged(student: ResNet, up: Sequence[nn.Module], down: Sequence[nn.Module], classifier: nn.Linear | None) -> ResNet:
    """A plain network of the student's architecture that answers as the student with its transforms does.

    `up[i]` follows block i and `down[i]` follows that, before block i + 1. `classifier`, if given, reads the last `up`
    in place of the student's own classifier.
    """
    network = ResNet(student.architecture, student.num_classes).to(student.fc.weight)
    network.load_state_dict(student.state_dict())
    network.train(student.training)
    with torch.no_grad():
        for index in range(student.num_blocks - 1):
            both = _times(_matrix(down[index]), _matrix(up[index]))
            if both is not None:
                unit = network.layer(index + 1)[0]
                _read_through(unit.get_submodule("conv1"), both)
                _read_through(unit.get_submodule("downsample.0"), both)
        if classifier is not None:
            weight = _times(classifier.weight, _matrix(up[-1]))
            assert weight is not None
            network.fc.weight.copy_(weight)
            network.fc.bias.copy_(classifier.bias)
    return network


def _read_through(conv: nn.Module, matrix: Tensor) -> None:
    """Make a convolution answer to x as it did to `matrix` @ x. Zero padding stays zero: exact for 3x3 too."""
    assert isinstance(conv, nn.Conv2d)
    conv.weight.copy_(torch.einsum("omhw,mi->oihw", conv.weight, matrix))


def _matrix(transform: nn.Module) -> Tensor | None:
    """[out, in] of a transform; None for the identity."""
    return transform.weight[:, :, 0, 0] if isinstance(transform, nn.Conv2d) else None


def _times(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left @ right
