"""The structure of networks: blocks and channels. Imports no torch, so that a login node can check recipes.

A *block* here is all units of one resolution, as in the paper: one stage of a ResNet (`layer1` to `layer4` in
torchvision's names).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate
from operator import mul
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from gowide_dist.networks.normalise import DATASET, Normalise
from gowide_dist.schema import Count, Frozen, Positive, Real, nearest

ARCHITECTURES: dict[str, tuple[str, tuple[int, ...]]] = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
MOBILENET_V2 = "mobilenet_v2"
Stem = Literal["small", "strided", "imagenet"]  # for images of about 32, 64 and 224 px
# Of residual networks: kernel, stride and whether a 3x3 max pool of stride 2 follows
STEMS: dict[Stem, tuple[int, int, bool]] = {"small": (3, 1, False), "strided": (3, 2, False), "imagenet": (7, 2, True)}


class Structure(Frozen):
    """What a recipe says of a network, whatever the number of classes, and what follows from it."""

    # Of every structure: `width` scales what is inside the units, `channels` everything.
    width: Positive = 1.0
    channels: Positive = 1.0
    stem: Stem = "imagenet"
    normalise: Normalise = DATASET  # of its images; networks of one stage may differ

    @property
    @abstractmethod
    def unit(self) -> str:
        """The kind of its units."""

    @property
    @abstractmethod
    def first_channels(self) -> int:
        """Channels that the stem writes."""

    @property
    @abstractmethod
    def block_channels(self) -> tuple[int, ...]:
        """Channels of each block's output."""

    @property
    @abstractmethod
    def inner_channels(self) -> tuple[int, ...]:
        """Channels of the 3x3 filters in each block's last unit."""

    @property
    @abstractmethod
    def reductions(self) -> tuple[int, ...]:
        """Side of the images over that of each block's output."""

    @property
    @abstractmethod
    def head_channels(self) -> int | None:
        """Channels that the head computes from the last block's output before it pools; None: it pools at once."""

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.block_channels)

    def widened(self, by: float) -> Self:
        """The same network, `by` times as wide inside its units."""
        return self.model_copy(update={"width": self.width * by})


class Architecture(Structure):
    """A residual network.

    `{arch: resnet50}` stands for its `block` and `depths`. `width` scales the 3x3 filters inside the residual units
    (torchvision's `width_per_group / 64`; in a basic unit, the channels between its two convolutions) and leaves
    what the units pass on as it is; `channels` scales every channel but `stem_channels`.
    """

    block: Literal["basic", "bottleneck"]
    depths: tuple[Count, ...] = Field(min_length=1, max_length=8)
    base: Count = 64
    stem_channels: Count | None = None  # default: the first block's, before expansion
    zero_init_residual: bool = False
    pre_activation: bool = False  # units that normalise and activate before they convolve

    @model_validator(mode="before")
    @classmethod
    def _expand_arch(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "arch" not in values:
            return values
        arch = values["arch"]
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            hint = nearest(arch, [*ARCHITECTURES, MOBILENET_V2])
            raise PydanticCustomError(
                "unknown_arch", "no arch '{arch}', {hint}", {"arch": str(arch)[:60], "hint": hint}
            )
        if twice := {"block", "depths"} & set(values):
            raise PydanticCustomError("arch_twice", "arch already says {keys}", {"keys": ", ".join(sorted(twice))})
        block, depths = ARCHITECTURES[arch]
        return {"block": block, "depths": depths, **{key: value for key, value in values.items() if key != "arch"}}

    @model_validator(mode="after")
    def _check_last_norm(self) -> Architecture:
        if self.pre_activation and self.zero_init_residual:
            raise ValueError("zero_init_residual: is of the norm that ends a unit, which pre_activation leaves out")
        return self

    @property
    def unit(self) -> str:
        return f"pre-activation {self.block}" if self.pre_activation else self.block

    @cached_property
    def planes(self) -> tuple[int, ...]:
        """Channels of each block before expansion: doubled from block to block."""
        return tuple(max(1, round(self.base * 2**index * self.channels)) for index in range(len(self.depths)))

    @property
    def first_channels(self) -> int:
        return self.stem_channels or self.planes[0]

    @property
    def block_channels(self) -> tuple[int, ...]:
        expansion = 4 if self.block == "bottleneck" else 1
        return tuple(planes * expansion for planes in self.planes)

    @property
    def inner_channels(self) -> tuple[int, ...]:
        return tuple(max(1, int(planes * self.width)) for planes in self.planes)

    @property
    def reductions(self) -> tuple[int, ...]:
        _, stride, pool = STEMS[self.stem]
        return tuple(stride * (2 if pool else 1) * 2**index for index in range(len(self.depths)))

    @property
    def head_channels(self) -> None:
        return None


class InvertedUnit(NamedTuple):
    """A unit of a MobileNetV2: narrow outside, wide inside."""

    in_channels: int
    inner_channels: int
    out_channels: int
    stride: int
    expands: bool  # whether it begins with a 1x1 convolution
    has_shortcut: bool


# Table 2 of arXiv 1801.04381: channels, units and stride of each row. Rows of one resolution are a block.
_MOBILE_ROWS = (
    ((16, 1, 1),),
    ((24, 2, 2),),
    ((32, 3, 2),),
    ((64, 4, 2), (96, 3, 1)),
    ((160, 3, 2), (320, 1, 1)),
)


class MobileArchitecture(Structure):
    """A MobileNetV2.

    `channels` is torchvision's `width_mult`, whose products are rounded to multiples of 8. `width` scales the
    expansion: a unit has 6 * `width` times as many channels inside as outside, but the first, which does not expand.
    """

    arch: Literal["mobilenet_v2"]
    # Smaller ones would round nearly all to 8, and torchvision's shortcuts begin a block where the channels stay: then
    # no linear transform could be merged.
    channels: Annotated[Real, Field(ge=0.1)] = 1.0

    @property
    def unit(self) -> str:
        return "inverted"

    @property
    def first_channels(self) -> int:
        return _multiple_of_8(32 * self.channels)

    @property
    def first_stride(self) -> int:
        """Of the stem's convolution."""
        return 1 if self.stem == "small" else 2

    @property  # not cached: a widened copy would keep it
    def units(self) -> tuple[tuple[InvertedUnit, ...], ...]:
        """The units of each block."""
        blocks, in_channels = [], self.first_channels
        for index, rows in enumerate(_MOBILE_ROWS):
            units = []
            for channels, num_units, row_stride in rows:
                out_channels = _multiple_of_8(channels * self.channels)
                for stride in (row_stride, *[1] * (num_units - 1)):
                    inner = max(1, round(in_channels * 6 * self.width)) if index else in_channels
                    has_shortcut = stride == 1 and in_channels == out_channels
                    own_stride = 1 if index == 1 and self.stem != "imagenet" else stride  # small images keep their size
                    units.append(InvertedUnit(in_channels, inner, out_channels, own_stride, index > 0, has_shortcut))
                    in_channels = out_channels
            blocks.append(tuple(units))
        return tuple(blocks)

    @property
    def block_channels(self) -> tuple[int, ...]:
        return tuple(block[-1].out_channels for block in self.units)

    @property
    def inner_channels(self) -> tuple[int, ...]:
        return tuple(block[-1].inner_channels for block in self.units)

    @property
    def reductions(self) -> tuple[int, ...]:
        return tuple(accumulate((block[0].stride for block in self.units), mul, initial=self.first_stride))[1:]

    @property
    def head_channels(self) -> int:
        return _multiple_of_8(1280 * max(1.0, self.channels))


def _multiple_of_8(channels: float) -> int:
    """The nearest one, but at least 8 and not less than 0.9 times as many: torchvision's rule."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def structure_of(values: object) -> type[Structure]:
    """The model of a recipe's mapping of a network."""
    if isinstance(values, Structure):
        return type(values)
    return MobileArchitecture if isinstance(values, Mapping) and values.get("arch") == MOBILENET_V2 else Architecture
