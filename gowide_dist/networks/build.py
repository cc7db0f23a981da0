"""From what a recipe says of a network to the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from gowide_dist.errors import RecipeError
from gowide_dist.networks.architecture import Architecture, MobileArchitecture
from gowide_dist.networks.foreign import Foreign, Settings, read_code, settings_class
from gowide_dist.networks.mobilenet import MobileNetV2
from gowide_dist.networks.network import Network
from gowide_dist.networks.preactivation import PreActivationResNet
from gowide_dist.networks.resnet import ResNet
from gowide_dist.networks.sources import build_foreign
from gowide_dist.schema import validate

Result = TypeVar("Result")


def build_network(
    architecture: Settings | Mapping[str, Any], num_classes: int, networks: str | Path | None = None
) -> Network:
    """A freshly initialised network, from an architecture or from a recipe's mapping of one.

    networks: the Python file of a network that is the user's own. Raises RecipeError if the mapping is not valid, or
    the network cannot be built.
    """
    if num_classes < 1:
        raise RecipeError(f"num_classes: should be at least 1, not {num_classes}")
    if isinstance(architecture, Mapping):
        code = read_code(Path(networks)) if networks else None
        architecture = validate(settings_class(architecture), architecture, "network", context=code)
    if isinstance(architecture, Foreign):
        return build_foreign(architecture, num_classes)
    if isinstance(architecture, MobileArchitecture):
        return MobileNetV2(architecture, num_classes)
    assert isinstance(architecture, Architecture), "one of the two"
    return (PreActivationResNet if architecture.pre_activation else ResNet)(architecture, num_classes)


def build_on_meta(architecture: Settings, num_classes: int) -> Network:
    """The network without values, which takes no memory and draws no random numbers."""
    try:
        with torch.device("meta"):
            return build_network(architecture, num_classes)
    except RecipeError:
        if not isinstance(architecture, Foreign):
            raise
        return build_unseeded(architecture, num_classes).to("meta")  # its code looks at values while it is built


def build_unseeded(architecture: Settings, num_classes: int) -> Network:
    """The network for weights that come from elsewhere: draws no random numbers that others would miss.

    One of ours has no values yet. Another's has them: buffers that are in no file of weights hold some.
    """
    if not isinstance(architecture, Foreign):
        return build_on_meta(architecture, num_classes)
    with torch.random.fork_rng():
        return build_network(architecture, num_classes)


def rehearsed(step: Callable[[torch.device], Result], networks: Iterable[Settings | None]) -> Result:
    """What `step`, which runs these networks without data, gives on the meta device.

    A network of others may look at values, as a batch norm without momentum does: then on the CPU, which takes longer.
    """
    try:
        return step(torch.device("meta"))
    except Exception:  # of their code, or of torch's meta device
        if not any(isinstance(each, Foreign) for each in networks):
            raise
    with torch.random.fork_rng(devices=()):
        return step(torch.device("cpu"))


def build_on(device: torch.device, architecture: Settings, num_classes: int) -> Network:
    """The network with fresh weights on the CPU, or without values on the meta device."""
    return (build_on_meta if device.type == "meta" else build_network)(architecture, num_classes)
