"""The structure of a residual network: blocks and channels. Imports no torch, so that a login node can check recipes.

A *block* here is one stage of the ResNet (`layer1` to `layer4` in torchvision's names), as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from gowide_dist.networks.normalise import DATASET, Normalise
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
    normalise: Normalise = DATASET  # of its images; networks of one stage may differ

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
    def stride(self) -> int:
        """Side of an image over that of the last block's output, which is rounded up."""
        _, stride, has_pool = STEMS[self.stem]
        return (stride * (1 + has_pool)) << (self.num_blocks - 1)

    @property
    def block_channels(self) -> tuple[int, ...]:
        """Channels of each block's output."""
        return tuple(planes * self.expansion for planes in self.planes)

    @property
    def inner_channels(self) -> tuple[int, ...]:
        """Channels of the 3x3 filters in each block."""
        return tuple(max(1, int(planes * self.width)) for planes in self.planes)

    def widened(self, by: float) -> Architecture:
        """The same network with `by` times as wide 3x3 filters."""
        return self.model_copy(update={"width": self.width * by})
