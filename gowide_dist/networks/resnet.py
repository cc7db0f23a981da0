"""Residual networks with torchvision's parameter names, which return their block outputs beside the logits.

He et al. 2016 (arXiv 1512.03385), with the stride of a bottleneck on its 3x3 convolution as in torchvision.
Shapes: B images, C channels, H = W pixels, K classes. A unit is one residual unit, a block all units of one resolution
(a "stage" of the ResNet, torchvision's `layer1` and so on).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gowide_dist.networks.architecture import STEMS, Architecture
from gowide_dist.schema import validate


class BasicUnit(nn.Module):
    """Two 3x3 convolutions and a shortcut: [B, C_in, H, H] -> [B, C_out, H / stride, H / stride]."""

    def __init__(self, in_channels: int, inner: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, inner, 3, stride)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return cast(Tensor, self.relu(x + shortcut))


class BottleneckUnit(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: [B, C_in, H, H] -> [B, C_out, H / stride, H / stride]."""

    def __init__(self, in_channels: int, inner: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, inner, 3, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = _conv(inner, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return cast(Tensor, self.relu(x + shortcut))


class ResNet(nn.Module):
    """A residual network: images [B, 3, H, H] -> logits [B, K] and the output of every block [B, C_i, H_i, H_i].

    It can also be walked block by block: `block(0)`, which begins with the stem, to `block(num_blocks - 1)`, `head`.
    """

    def __init__(self, architecture: Architecture, num_classes: int) -> None:
        super().__init__()
        self.architecture = architecture
        self.num_classes = num_classes
        self.is_compiled = False
        self.preprocessing: Any = None  # data.preprocessing.Preprocessing, of a network that `load_model` gives
        kernel, stride, pool = STEMS[architecture.stem]
        self.conv1 = _conv(3, architecture.stem_channels, kernel, stride)
        self.bn1 = nn.BatchNorm2d(architecture.stem_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if pool else nn.Identity()
        unit = BottleneckUnit if architecture.block == "bottleneck" else BasicUnit
        in_channels = architecture.stem_channels
        for index, depth in enumerate(architecture.depths):
            inner, out_channels = architecture.inner_channels[index], architecture.block_channels[index]
            first = unit(in_channels, inner, out_channels, stride=2 if index else 1)
            others = (unit(out_channels, inner, out_channels, stride=1) for _ in range(depth - 1))
            self.add_module(f"layer{index + 1}", nn.Sequential(first, *others))
            in_channels = out_channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_classes)
        self._initialise(architecture.zero_init_residual)

    @property
    def num_blocks(self) -> int:
        return self.architecture.num_blocks

    def layer(self, index: int) -> nn.Sequential:
        """The residual units of block `index`, counted from 0."""
        return cast(nn.Sequential, self.get_submodule(f"layer{index + 1}"))

    def block_modules(self, index: int) -> list[nn.Module]:
        """The modules of block `index` that have parameters or statistics; the first block begins with the stem."""
        return [self.conv1, self.bn1, self.layer(0)] if index == 0 else [self.layer(index)]

    def block(self, index: int, x: Tensor) -> Tensor:
        """One block: [B, C_(i-1), H, H], or images [B, 3, H, H] for block 0 -> [B, C_i, H_i, H_i]."""
        if index == 0:
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return cast(Tensor, self.layer(index)(x))

    def blocks(self, images: Tensor, num_blocks: int | None = None) -> tuple[Tensor, ...]:
        """Outputs [B, C_i, H_i, H_i] of all blocks, or of the first `num_blocks` without running the others."""
        outputs = [images]
        for index in range(self.num_blocks if num_blocks is None else num_blocks):
            outputs.append(self.block(index, outputs[-1]))
        return tuple(outputs[1:])

    def pool(self, x: Tensor) -> Tensor:
        """Global average pooling: [B, C, H, H] -> [B, C]."""
        if x.is_contiguous(memory_format=torch.channels_last):
            # The same sums, but their gradient stays in channels_last; that of AdaptiveAvgPool2d does not, which slows
            # the layers below.
            return x.permute(0, 2, 3, 1).flatten(1, 2).mean(dim=1)
        return cast(Tensor, self.avgpool(x).flatten(1))

    def head(self, x: Tensor) -> Tensor:
        """Classifier: output [B, C, H, H] of the last block -> logits [B, K]."""
        return cast(Tensor, self.fc(self.pool(x)))

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        blocks = self.blocks(images)
        return self.head(blocks[-1]), blocks

    def compile_blocks(self) -> None:
        """Compile each block in place; names and values of the weights stay."""
        self.is_compiled = True
        for index in range(self.num_blocks):
            # By default all blocks share one limit of 8 compiled versions: torch.compile wraps the same code of each.
            self.layer(index).compile(isolate_recompiles=True, recompile_limit=32)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(
                module, BasicUnit | BottleneckUnit
            ):  # then it starts as its shortcut
                nn.init.zeros_((module.bn3 if isinstance(module, BottleneckUnit) else module.bn2).weight)


def build_network(architecture: Architecture | Mapping[str, Any], num_classes: int) -> ResNet:
    """A freshly initialised network, from an architecture or from a recipe's mapping of one.

    Raises RecipeError if the mapping is not a valid architecture.
    """
    if not isinstance(architecture, Architecture):
        architecture = validate(Architecture, architecture, "network")
    return ResNet(architecture, num_classes)


def take_over(student: ResNet, teacher: ResNet) -> None:
    """Copy every weight and statistic of the teacher that has the same name and shape into the student.

    Where networks differ in `width` alone these are the stem, the shortcuts, the last norm of every unit and the
    classifier: all but the convolutions inside the units and the norms between them.
    """
    weights = teacher.state_dict()
    for name, value in student.state_dict().items():
        if value.ndim and name in weights and weights[name].shape == value.shape:  # batch norms' counters are scalars
            value.copy_(weights[name])


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """None for the identity, else a convolution and its norm, which are "0" and "1" in torchvision's names."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = _conv if stride == 1 or in_channels >= _ONEDNN_BLOCK else _SubsampledConv
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


# Channels in a block of oneDNN's memory layout. With fewer input channels, its weight gradient of a strided 1x1
# convolution in channels_last is garbage, or it writes out of bounds (github.com/uxlfoundation/oneDNN/issues/6035, seen
# with torch 2.14.1).
_ONEDNN_BLOCK = 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8


class _SubsampledConv(nn.Conv2d):
    """A strided 1x1 convolution that subsamples its input first, which avoids oneDNN's wrong weight gradient.

    [B, C_in, H, H] -> [B, C_out, H / stride, H / stride]. Without gradient, or not on a CPU, it is the usual one.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or input.device.type != "cpu":
            return super().forward(input)
        rows, columns = self.stride
        return F.conv2d(input[:, :, ::rows, ::columns], self.weight, self.bias)
