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

from gowide_dist.networks.resnet import ResNet


def linear_transform(in_channels: int, out_channels: int) -> nn.Module:
    """A trainable 1x1 convolution [B, C_in, H, H] -> [B, C_out, H, H]; the identity where channels are equal."""
    if in_channels == out_channels:
        return nn.Identity()
    transform = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    nn.init.orthogonal_(transform.weight)
    return transform


def merged(student: ResNet, up: Sequence[nn.Module], down: Sequence[nn.Module], classifier: nn.Linear | None) -> ResNet:
    """A plain network of the student's architecture with the same outputs as the student with its transforms.

    `up[i]` follows block i, `down[i]` follows `up[i]`, before block i + 1. `classifier`, if given, follows the last
    `up` in place of the student's own.
    """
    network = ResNet(student.architecture, student.num_classes).to(student.fc.weight)
    network.load_state_dict(student.state_dict())
    network.train(student.training)
    with torch.no_grad():
        for index in range(student.num_blocks - 1):
            if isinstance(up[index], nn.Conv2d):  # where channels differ: then `down` is a convolution too
                product = _matrix(down[index]) @ _matrix(up[index])
                unit = network.layer(index + 1)[0]  # its first convolution and its shortcut read the block's output
                for name in ("conv1", "downsample.0"):
                    _merge_into(unit.get_submodule(name), product)
        if classifier is not None:
            is_wider = isinstance(up[-1], nn.Conv2d)
            network.fc.weight.copy_(classifier.weight @ _matrix(up[-1]) if is_wider else classifier.weight)
            network.fc.bias.copy_(classifier.bias)
    return network


def _merge_into(conv: nn.Module, matrix: Tensor) -> None:
    """conv(matrix @ x) -> conv(x), in place; matrix: [C_out, C_in] of the channels of x.

    Exact for 3x3 convolutions too, because a linear map leaves zero padding zero.
    """
    assert isinstance(conv, nn.Conv2d)
    conv.weight.copy_(torch.einsum("omhw,mi->oihw", conv.weight, matrix))


def _matrix(transform: nn.Module) -> Tensor:
    """[C_out, C_in] of a 1x1 convolution."""
    assert isinstance(transform, nn.Conv2d)
    return transform.weight[:, :, 0, 0]
