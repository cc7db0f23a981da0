"""Residual networks with torchvision's parameter names.

He et al. 2016 (arXiv 1512.03385), with the stride of a bottleneck on its 3x3 convolution as in torchvision.
Shapes: B images, C channels, H = W pixels, K classes. A unit is one residual unit, a block all units of one resolution
(a "stage" of the ResNet, torchvision's `layer1` and so on).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gowide_dist.networks.architecture import STEMS, Architecture
from gowide_dist.networks.network import InnerLayer, Network


class BasicUnit(nn.Module):
    """Two 3x3 convolutions and a shortcut: [B, C_in, H, H] -> [B, C_out, H / stride, H / stride]."""

    foldable = (("conv1", "bn1"), ("conv2", "bn2"))
    inner_layers = (InnerLayer(("conv1", "bn1"), "bn1", "conv2"),)

    def __init__(self, in_channels: int, inner: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, inner, 3, stride)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv(inner, out_channels, 3)
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

    foldable = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
    inner_layers = (InnerLayer(("conv1", "bn1"), "bn1", "conv2"), InnerLayer(("conv2", "bn2"), "bn2", "conv3"))

    def __init__(self, in_channels: int, inner: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv(inner, inner, 3, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv(inner, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return cast(Tensor, self.relu(x + shortcut))


class ResNet(Network):
    """A residual network with torchvision's names."""

    classifier_name = "fc"
    foldable = (("conv1", "bn1"),)
    architecture: Architecture

    def __init__(self, architecture: Architecture, num_classes: int) -> None:
        super().__init__(architecture, num_classes)
        self.conv1, self.maxpool = stem(architecture)
        self.bn1 = nn.BatchNorm2d(architecture.first_channels)
        self.relu = nn.ReLU(inplace=True)
        unit = BottleneckUnit if architecture.block == "bottleneck" else BasicUnit
        in_channels = architecture.first_channels
        for index, depth in enumerate(architecture.depths):
            inner, out_channels = architecture.inner_channels[index], architecture.block_channels[index]
            first = unit(in_channels, inner, out_channels, stride=2 if index else 1)
            others = (unit(out_channels, inner, out_channels, stride=1) for _ in range(depth - 1))
            self.add_module(f"layer{index + 1}", nn.Sequential(first, *others))
            in_channels = out_channels
        self.fc = nn.Linear(in_channels, num_classes)
        initialise_convolutions(self)
        for module in self.modules():
            if architecture.zero_init_residual and isinstance(module, BasicUnit | BottleneckUnit):
                last = module.bn3 if isinstance(module, BottleneckUnit) else module.bn2
                nn.init.zeros_(last.weight)  # then the unit starts as its shortcut

    def layer(self, index: int) -> nn.Sequential:
        """The residual units of block `index`, counted from 0."""
        return cast(nn.Sequential, self.get_submodule(f"layer{index + 1}"))

    def block_modules(self, index: int) -> list[nn.Module]:
        return [self.conv1, self.bn1, self.layer(0)] if index == 0 else [self.layer(index)]

    def block(self, index: int, x: Tensor) -> Tensor:
        if index == 0:
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return cast(Tensor, self.layer(index)(x))

    def readers(self, index: int) -> list[nn.Module]:
        unit = self.layer(index)[0]
        return [unit.get_submodule("conv1"), unit.get_submodule("downsample.0")]

    def compiled_modules(self, index: int) -> list[nn.Module]:
        return [self.layer(index)]

    @property
    def head_layers(self) -> list[nn.Module]:
        return [self.fc]


def stem(architecture: Architecture) -> tuple[nn.Conv2d, nn.Module]:
    """The convolution that reads images, and the pooling behind it and its norm."""
    kernel, stride, pool = STEMS[architecture.stem]
    convolution = conv(3, architecture.first_channels, kernel, stride)
    return convolution, nn.MaxPool2d(3, 2, padding=1) if pool else nn.Identity()


def initialise_convolutions(network: nn.Module) -> None:
    """By He's normal distribution, over the outputs of each."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the resolution but for its stride."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """None for the identity, else a convolution and its norm, which are "0" and "1" in torchvision's names."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(projection(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    """The 1x1 convolution of a shortcut: [B, C_in, H, H] -> [B, C_out, H / stride, H / stride]."""
    convolution = conv if stride == 1 or in_channels >= _ONEDNN_BLOCK else _SubsampledConv
    return convolution(in_channels, out_channels, 1, stride)


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
