"""MobileNetV2 with torchvision's parameter names and outputs.

Sandler et al. 2018 (arXiv 1801.04381). Its units are inverted: narrow outside and wide inside, and what they pass on is
linear. Without torchvision's dropout, whose draws a restart could not repeat; it has no weights.
"""

from __future__ import annotations

from itertools import accumulate
from typing import cast

from torch import Tensor, nn

from gowide_dist.networks.architecture import InvertedUnit, MobileArchitecture
from gowide_dist.networks.network import InnerLayer, Network


class InvertedResidual(nn.Module):
    """A 1x1 convolution that expands, a 3x3 one on each channel, a linear 1x1 one, and a shortcut where shapes stay.

    [B, C_in, H, H] -> [B, C_out, H / stride, H / stride].
    """

    def __init__(self, unit: InvertedUnit) -> None:
        super().__init__()
        inner = unit.inner_channels
        expansion = [_conv_norm(unit.in_channels, inner, 1)] if unit.expands else []
        self.conv = nn.Sequential(
            *expansion,
            _conv_norm(inner, inner, 3, unit.stride, groups=inner),
            nn.Conv2d(inner, unit.out_channels, 1, bias=False),
            nn.BatchNorm2d(unit.out_channels),
        )
        self.has_shortcut = unit.has_shortcut
        rows = ("conv.0.0", "conv.0.1", "conv.1.0", "conv.1.1")
        self.inner_layers = (InnerLayer(rows, "conv.1.1", "conv.2"),) if unit.expands else ()

    def forward(self, x: Tensor) -> Tensor:
        y = cast(Tensor, self.conv(x))
        return x + y if self.has_shortcut else y


class MobileNetV2(Network):
    """A block is all units of one resolution: the paper's table 2 from stride to stride, the first with the stem."""

    classifier_name = "classifier"
    architecture: MobileArchitecture

    def __init__(self, architecture: MobileArchitecture, num_classes: int) -> None:
        super().__init__(architecture, num_classes)
        units = [unit for block in architecture.units for unit in block]
        head_channels = architecture.head_channels
        self.ends = [0, *accumulate(map(len, architecture.units))]  # of the blocks, in `features`
        self.features = nn.Sequential(
            _conv_norm(3, architecture.first_channels, 3, architecture.first_stride),
            *map(InvertedResidual, units),
            _conv_norm(units[-1].out_channels, head_channels, 1),
        )
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(head_channels, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def block_modules(self, index: int) -> list[nn.Module]:
        return [*self.features][self.ends[index] + (index > 0) : self.ends[index + 1] + 1]

    def block(self, index: int, x: Tensor) -> Tensor:
        for module in self.block_modules(index):
            x = module(x)
        return x

    def readers(self, index: int) -> list[nn.Module]:
        return [self.block_modules(index)[0].get_submodule("conv.0.0")]

    @property
    def head_layers(self) -> list[nn.Module]:
        return [self.features[-1], self.classifier]


def _conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6(inplace=True))
