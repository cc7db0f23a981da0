"""How pixels become a network's input: (pixel / 255 - mean) / std, channel by channel. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, model_serializer, model_validator

from gowide_dist.schema import Frozen, Real

Channels: TypeAlias = tuple[float, float, float]  # red, green, blue, on a scale of 0 to 1
IMAGENET: dict[str, Channels] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # torchvision's


def _three(value: Any) -> Any:
    return (value,) * 3 if isinstance(value, int | float | str) else value


_Channels = Annotated[tuple[Real, Real, Real], BeforeValidator(_three)]


class Normalise(Frozen):
    """A network's normalisation: `dataset` (the moments of the training images), `imagenet`, or its own mean and std.

    Of pixels / 255, for red, green and blue; one number stands for all three. Without mean and std it is the dataset's.
    """

    mean: _Channels | None = None
    std: _Channels | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        words: dict[str, dict[str, Channels]] = {"dataset": {}, "imagenet": IMAGENET}
        if isinstance(values, Mapping | Normalise):
            return values
        if not isinstance(values, str) or values not in words:
            raise ValueError(f"should be dataset, imagenet or {{mean: [...], std: [...]}}, not '{str(values)[:60]}'")
        return words[values]

    @model_validator(mode="after")
    def _check(self) -> Normalise:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std need each other")
        for name, least, channels in (("mean", 0.0, self.mean or ()), ("std", 1e-4, self.std or ())):
            if wrong := [channel for channel in channels if not least <= channel <= 1]:
                raise ValueError(f"{name}: should be of pixels / 255, from {least:g} to 1, not {wrong[0]:g}")
        return self

    @model_serializer
    def _word(self) -> str | dict[str, Channels]:
        if self.mean is None or self.std is None:
            return "dataset"
        values: dict[str, Channels] = {"mean": self.mean, "std": self.std}
        return "imagenet" if values == IMAGENET else values


DATASET = Normalise()
