"""The arithmetic of a residual network: channels, parameters and multiply-adds, without building it.

A *block* here is one stage of the ResNet (`layer1` to `layer4` in torchvision's names), as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from gowide_dist.schema import Count, Frozen, Positive, nearest

ARCHITECTURES: dict[str, tuple[str, tuple[int, ...]]] = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
Stem = Literal["small", "strided", "imagenet"]
# kernel, stride and whether a 3x3 max pool of stride 2 follows
STEMS: dict[Stem, tuple[int, int, bool]] = {"small": (3, 1, False), "strided": (3, 2, False), "imagenet": (7, 2, True)}


class Conv(NamedTuple):
    """One convolution and the side of the square image that it writes."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    side_px: int

    @property
    def macs(self) -> int:
        """Multiply-adds for one image."""
        return self.in_channels * self.out_channels * self.kernel**2 * self.side_px**2

    @property
    def num_outputs(self) -> int:
        """Numbers that it writes for one image."""
        return self.out_channels * self.side_px**2

    @property
    def num_parameters(self) -> int:
        """Weights, with the scale and shift of the batch norm that follows."""
        return self.in_channels * self.out_channels * self.kernel**2 + 2 * self.out_channels


class Architecture(Frozen):
    """A residual network, whatever the number of classes.

    `{arch: resnet50}` stands for its `block` and `depths`. `width` scales the 3x3 filters inside the residual units
    (torchvision's `width_per_group / 64`; in a basic unit, the channels between its two convolutions) and leaves
    what the units pass on as it is; `channels` scales every channel.
    """

    block: Literal["basic", "bottleneck"]
    depths: tuple[Count, ...] = Field(min_length=1, max_length=8)
    base: Count = 64
    width: Positive = 1.0
    channels: Positive = 1.0
    stem: Stem = "imagenet"
    zero_init_residual: bool = False

    @model_validator(mode="before")
    @classmethod
    def _expand_arch(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "arch" not in values:
            return values
        arch = values["arch"]
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            hint = nearest(arch, list(ARCHITECTURES))
            raise PydanticCustomError(
                "unknown_arch", "no arch '{arch}', {hint}", {"arch": str(arch)[:60], "hint": hint}
            )
        if twice := {"block", "depths"} & set(values):
            raise PydanticCustomError("arch_twice", "arch already says {keys}", {"keys": ", ".join(sorted(twice))})
        block, depths = ARCHITECTURES[arch]
        return {"block": block, "depths": depths, **{key: value for key, value in values.items() if key != "arch"}}

    @property
    def num_blocks(self) -> int:
        """How many blocks (ResNet stages) there are."""
        return len(self.depths)

    @property
    def expansion(self) -> int:
        """Output channels of a residual unit over its planes."""
        return 4 if self.block == "bottleneck" else 1

    @cached_property
    def planes(self) -> tuple[int, ...]:
        """Channels of each block before expansion: doubled from block to block."""
        return tuple(max(1, round(self.base * 2**index * self.channels)) for index in range(self.num_blocks))

    @property
    def stem_channels(self) -> int:
        """Channels that the stem writes."""
        return self.planes[0]

    @property
    def block_channels(self) -> tuple[int, ...]:
        """Channels of each block's output."""
        return tuple(planes * self.expansion for planes in self.planes)

    @property
    def inner_channels(self) -> tuple[int, ...]:
        """Channels of the 3x3 filters in each block."""
        return tuple(max(1, int(planes * self.width)) for planes in self.planes)

    def block_sides(self, resolution: int) -> tuple[int, ...]:
        """Side in px of each block's output for square images of side `resolution`."""
        side = self._stem_side(resolution)
        sides = []
        for index in range(self.num_blocks):
            side = side if index == 0 else _halved(side)
            sides.append(side)
        return tuple(sides)

    def widened(self, by: float) -> Architecture:
        """The same network with `by` times as wide 3x3 filters."""
        return self.model_copy(update={"width": self.width * by})

    def macs(self, num_classes: int, resolution: int, num_blocks: int | None = None) -> int:
        """Multiply-adds of one image's forward pass, counted as torchvision's tables do (ResNet-50: 4,089 million).

        Convolutions and the classifier count; batch norms, additions and pooling do not. With `num_blocks` only the
        stem and the first so many blocks count.
        """
        blocks = [sum(conv.macs for conv in convs) for convs in self._convs(resolution)]
        if num_blocks is not None:
            return sum(blocks[: num_blocks + 1])
        return sum(blocks) + self.block_channels[-1] * num_classes

    def num_parameters(self, num_classes: int, num_blocks: int | None = None) -> int:
        """Trainable parameters. With `num_blocks` only the stem and the first so many blocks count."""
        blocks = [sum(conv.num_parameters for conv in convs) for convs in self._convs(resolution=32)]
        if num_blocks is not None:
            return sum(blocks[: num_blocks + 1])
        return sum(blocks) + (self.block_channels[-1] + 1) * num_classes

    def num_activations(self, resolution: int, num_blocks: int | None = None) -> int:
        """Numbers that a training step keeps of one image for its backward pass, about: two for each that a convolution
        writes, its own and that of the batch norm and activation after it. With `num_blocks` as in `macs`.
        """
        blocks = [sum(2 * conv.num_outputs for conv in convs) for convs in self._convs(resolution)]
        return sum(blocks if num_blocks is None else blocks[: num_blocks + 1])

    def largest_activation(self, resolution: int) -> int:
        """Numbers in the largest output of a convolution, of one image."""
        return max(conv.num_outputs for convs in self._convs(resolution) for conv in convs)

    def _stem_side(self, resolution: int) -> int:
        _, stride, pool = STEMS[self.stem]
        side = resolution if stride == 1 else _halved(resolution)
        return _halved(side) if pool else side

    def _convs(self, resolution: int) -> Iterator[list[Conv]]:
        """The convolutions of the stem, then those of each block."""
        kernel, stride, _ = STEMS[self.stem]
        yield [Conv(3, self.stem_channels, kernel, stride, resolution if stride == 1 else _halved(resolution))]
        sides = (self._stem_side(resolution), *self.block_sides(resolution))
        in_channels = self.stem_channels
        for index, (in_side, side) in enumerate(pairwise(sides)):
            convs: list[Conv] = []
            inner, out_channels = self.inner_channels[index], self.block_channels[index]
            for unit in range(self.depths[index]):
                stride = 2 if unit == 0 and index > 0 else 1
                if self.block == "bottleneck":
                    convs += [
                        Conv(in_channels, inner, 1, 1, in_side if unit == 0 else side),
                        Conv(inner, inner, 3, stride, side),
                        Conv(inner, out_channels, 1, 1, side),
                    ]
                else:
                    convs += [Conv(in_channels, inner, 3, stride, side), Conv(inner, out_channels, 3, 1, side)]
                if stride != 1 or in_channels != out_channels:
                    convs.append(Conv(in_channels, out_channels, 1, stride, side))
                in_channels = out_channels
            yield convs


def _halved(side: int) -> int:
    """The side of what a padded convolution or pooling of stride 2 writes."""
    return (side + 1) // 2
