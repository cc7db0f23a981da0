"""From a structure to a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gowide_dist.networks.architecture import Architecture, MobileArchitecture, Structure, structure_of
from gowide_dist.networks.mobilenet import MobileNetV2
from gowide_dist.networks.network import Network
from gowide_dist.networks.preactivation import PreActivationResNet
from gowide_dist.networks.resnet import ResNet
from gowide_dist.schema import validate


def build_network(architecture: Structure | Mapping[str, Any], num_classes: int) -> Network:
    """A freshly initialised network, from an architecture or from a recipe's mapping of one.

    Raises RecipeError if the mapping is not a valid architecture.
    """
    if not isinstance(architecture, Structure):
        architecture = validate(structure_of(architecture), architecture, "network")
    if isinstance(architecture, MobileArchitecture):
        return MobileNetV2(architecture, num_classes)
    assert isinstance(architecture, Architecture), "one of the two"
    return (PreActivationResNet if architecture.pre_activation else ResNet)(architecture, num_classes)
