"""Where torchvision and timm have a network of ours: the function that builds it, and its weights by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gowide_dist.data.preprocessing import Preprocessing
from gowide_dist.networks.architecture import ARCHITECTURES, Architecture, MobileArchitecture
from gowide_dist.networks.foreign import Settings, Timm, Torchvision
from gowide_dist.networks.normalise import DATASET

_TIMM_MOBILENETS = {0.35: "035", 0.5: "050", 0.75: "075", 1.0: "100", 1.4: "140"}  # by `channels`


class Counterpart(NamedTuple):
    """A model of torchvision's or timm's, by name, and the arguments that make it this network."""

    model: str
    arguments: dict[str, Any]


def in_torchvision(architecture: Settings) -> Counterpart | None:
    """The function of torchvision.models that builds the network, but for the number of classes."""
    if isinstance(architecture, Torchvision):
        return Counterpart(architecture.name, dict(architecture.options))
    if isinstance(architecture, MobileArchitecture):
        is_plain = architecture.stem == "imagenet" and architecture.width == 1
        return Counterpart(architecture.arch, {"width_mult": architecture.channels}) if is_plain else None
    if not isinstance(architecture, Architecture):
        return None
    width = 64 * architecture.width
    plain = architecture.model_copy(update={"width": 1.0, "zero_init_residual": False, "normalise": DATASET})
    if width == 64 or (width.is_integer() and architecture.block == "bottleneck"):
        for name in ARCHITECTURES:
            if plain == Architecture.model_validate({"arch": name}):
                return Counterpart(name, {"width_per_group": int(width)})
    return None


def in_timm(architecture: Settings) -> Counterpart | None:
    """The model of timm's that is the network, but for the number of classes."""
    if isinstance(architecture, Timm):
        return Counterpart(architecture.name, dict(architecture.options))
    public = in_torchvision(architecture)
    if public and public.model in ARCHITECTURES and public.arguments.keys() <= {"width_per_group"}:
        return Counterpart(public.model, {"base_width": public.arguments.get("width_per_group", 64)})
    if public and public.model == "mobilenet_v2" and public.arguments.keys() <= {"width_mult"}:
        size = _TIMM_MOBILENETS.get(public.arguments.get("width_mult", 1.0))
        return Counterpart(f"mobilenetv2_{size}", {}) if size else None
    return None


def timm_config(counterpart: Counterpart, preprocessing: Preprocessing) -> dict[str, Any]:
    """The config.json of a folder that timm reads, as it writes one itself."""
    side, num_classes = preprocessing.resolution, len(preprocessing.classes)
    return {
        "architecture": counterpart.model,
        "num_classes": num_classes,
        "model_args": counterpart.arguments,
        "pretrained_cfg": {
            "num_classes": num_classes,
            "label_names": list(preprocessing.classes),
            "input_size": [3, side, side],
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "interpolation": "bilinear",
            "crop_pct": side / preprocessing.resize_px,
            "crop_mode": "center",
        },
    }


def timm_weights(counterpart: Counterpart, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by torchvision's names -> the same by timm's: for a MobileNetV2 others, in the same order."""
    import timm
    import torch

    num_classes = [*weights.values()][-1].shape[0]  # of the classifier's bias
    with torch.device("meta"):
        theirs = timm.create_model(counterpart.model, num_classes=num_classes, **counterpart.arguments).state_dict()
    if theirs.keys() == weights.keys():
        return dict(weights)
    assert [value.shape for value in theirs.values()] == [value.shape for value in weights.values()], counterpart.model
    return dict(zip(theirs, weights.values(), strict=True))
