"""Residual networks whose units normalise and activate before they convolve, wide residual networks among them.

He et al. 2016 (arXiv 1603.05027), Zagoruyko and Komodakis 2016 (arXiv 1605.07146). Parameters have the names of the
public PyTorch implementation of wide residual networks (xternalz/WideResNet-pytorch), so that its weights load. See
`resnet` for units, blocks and shapes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from gowide_dist.networks.architecture import Architecture
from gowide_dist.networks.network import InnerLayer, Network
from gowide_dist.networks.resnet import conv, initialise_convolutions, projection, stem


class PreActivationUnit(nn.Module):
    """Convolutions of sides `kernels` px, and a shortcut: [B, C_in, H, H] -> [B, C_out, H / stride, H / stride].

    Where the shape changes, the shortcut too reads what is normalised and activated. is_activated: the block below has
    done that already.
    """

    def __init__(
        self, in_channels: int, inner: int, out_channels: int, stride: int, kernels: tuple[int, ...], is_activated: bool
    ) -> None:
        super().__init__()
        numbers = range(1, len(kernels) + 1)
        channels = [in_channels, *[inner] * (len(kernels) - 1), out_channels]
        strided = kernels.index(3) + 1
        for number, kernel in zip(numbers, kernels, strict=True):
            self.add_module(f"bn{number}", nn.BatchNorm2d(channels[number - 1]))
            conv_stride = stride if number == strided else 1
            self.add_module(f"conv{number}", conv(channels[number - 1], channels[number], kernel, conv_stride))
        changes = stride > 1 or in_channels != out_channels
        self.convShortcut = projection(in_channels, out_channels, stride) if changes else None
        self.is_activated = is_activated
        self.numbers = numbers
        self.foldable = tuple((f"conv{number}", f"bn{number + 1}") for number in numbers[:-1])
        self.inner_layers = tuple(InnerLayer((writer, norm), norm, f"conv{norm[2:]}") for writer, norm in self.foldable)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        for number in self.numbers:
            if number > 1 or not self.is_activated:
                x = F.relu(getattr(self, f"bn{number}")(x), inplace=True)
            if number == 1 and self.convShortcut is not None:
                shortcut = self.convShortcut(x)
            x = getattr(self, f"conv{number}")(x)
        return x + shortcut


class PreActivationResNet(Network):
    """A residual network of pre-activation units.

    A block ends in the norm and the activation that the unit above it begins with, or the network ends with: then the
    layers that read its output are convolutions, or the classifier, as in a `ResNet`.
    """

    classifier_name = "fc"
    architecture: Architecture

    def __init__(self, architecture: Architecture, num_classes: int) -> None:
        super().__init__(architecture, num_classes)
        self.conv1, self.maxpool = stem(architecture)
        kernels = (1, 3, 1) if architecture.block == "bottleneck" else (3, 3)
        in_channels = architecture.first_channels
        for index, depth in enumerate(architecture.depths):
            inner, out_channels = architecture.inner_channels[index], architecture.block_channels[index]
            first = PreActivationUnit(in_channels, inner, out_channels, 2 if index else 1, kernels, index > 0)
            others = (PreActivationUnit(out_channels, inner, out_channels, 1, kernels, False) for _ in range(depth - 1))
            self.add_module(f"block{index + 1}", nn.Sequential(OrderedDict(layer=nn.Sequential(first, *others))))
            in_channels = out_channels
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.fc = nn.Linear(in_channels, num_classes)
        initialise_convolutions(self)

    def layer(self, index: int) -> nn.Sequential:
        """The residual units of block `index`, counted from 0."""
        return cast(nn.Sequential, self.get_submodule(f"block{index + 1}.layer"))

    def block_modules(self, index: int) -> list[nn.Module]:
        first, *others = self.layer(index)
        units = [first] if index == 0 else [module for name, module in first.named_children() if name != "bn1"]
        return [*([self.conv1] if index == 0 else []), *units, *others, self._last_norm(index)]

    def block(self, index: int, x: Tensor) -> Tensor:
        if index == 0:
            x = self.maxpool(self.conv1(x))
        return F.relu(self._last_norm(index)(self.layer(index)(x)), inplace=True)

    def readers(self, index: int) -> list[nn.Module]:
        unit = self.layer(index)[0]
        return [unit.get_submodule("conv1"), unit.get_submodule("convShortcut")]

    def compiled_modules(self, index: int) -> list[nn.Module]:
        return [self.layer(index)]

    @property
    def head_layers(self) -> list[nn.Module]:
        return [self.fc]

    def _last_norm(self, index: int) -> nn.Module:
        is_last = index + 1 == self.num_blocks
        return self.bn1 if is_last else self.layer(index + 1)[0].get_submodule("bn1")
