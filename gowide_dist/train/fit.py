"""Do networks of others fit the data, and the networks that they teach or learn from? Asked on the meta device.

Networks of ours answer this from the recipe alone (`recipe`), which a login node can read.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch

from gowide_dist.errors import RecipeError
from gowide_dist.instances import Instance
from gowide_dist.networks.build import build_on, build_on_meta, rehearsed
from gowide_dist.networks.foreign import Foreign, Settings
from gowide_dist.networks.quantised import Quantised
from gowide_dist.recipe import Recipe
from gowide_dist.stages import BlocksStage, KlStage, LogitsStage

Shape = tuple[int, ...]


def check_fit(recipe: Recipe, instances: Iterable[Instance], num_classes: int) -> None:
    """Raises UserError, naming the network, if one of others cannot be built or does not fit.

    A network of the recipe that no stage has must be one that can be built: it may be a misspelt one.
    """
    used = {instance.network_name for instance in recipe.instances.values()}
    for name, architecture in recipe.architectures.items():
        if isinstance(architecture, Foreign) and name not in used:
            _check_sides(name, architecture, {recipe.data.resolution}, num_classes)
    for instance in instances:
        teacher = recipe.instances[instance.teacher] if instance.teacher else None
        for each in filter(None, (instance, teacher)):
            if isinstance(each.architecture, Foreign):
                _check_network(each, instance, recipe, num_classes)
        if teacher and any(isinstance(each.architecture, Foreign) for each in (instance, teacher)):
            _check_blocks(instance, teacher, recipe, num_classes)


def _check_network(each: Instance, instance: Instance, recipe: Recipe, num_classes: int) -> None:
    """Raises RecipeError unless a network can be built, trained if it is to be, and takes all images of the stage."""
    ramp = instance.stage.ramp
    sides = {recipe.data.resolution, *([ramp.start_px, ramp.end_px or recipe.data.resolution] if ramp else [])}
    _check_sides(each.network_name, each.architecture, sides, num_classes)
    if each is instance and instance.stage.epochs and not _is_trainable(each.architecture, num_classes):
        fault = f"{each.architecture}: its code freezes all its parameters"
        raise RecipeError(
            f"networks.{each.network_name}: {fault}, and {instance.key} is to train it; epochs: 0 does not"
        )
    if each is instance and isinstance(instance.stage, LogitsStage) and instance.stage.quantised:
        try:
            _quantise(each.architecture, num_classes, recipe.data.resolution)
        except RecipeError as error:
            raise RecipeError(f"stages.{instance.stage_name}.quantised: {error}; leave it out") from error


def _check_sides(name: str, architecture: Settings, sides: Iterable[int], num_classes: int) -> None:
    """Raises RecipeError unless a network can be built, and takes images of all sides."""
    for side in sorted(sides):
        try:
            _shapes(architecture, num_classes, side)
        except RecipeError as error:
            raise RecipeError(f"networks.{name}: {error}") from error


def _check_blocks(instance: Instance, teacher: Instance, recipe: Recipe, num_classes: int) -> None:
    """Raises RecipeError unless the outputs of blocks that a stage compares can be compared."""
    stage, option = instance.stage, f"stages.{instance.stage_name}"
    weighted = isinstance(stage, KlStage) and bool(stage.blocks_weight)
    if not (weighted or isinstance(stage, BlocksStage)):
        return
    own, theirs = (_shapes(each.architecture, num_classes, recipe.data.resolution) for each in (instance, teacher))
    if not own:
        raise RecipeError(
            f"{option}.train: {instance.architecture} cannot be walked block by block: it lacks num_blocks, "
            "block_channels, block or head (docs/networks.md)"
        )
    needs_channels = weighted or (
        isinstance(stage, BlocksStage) and stage.inputs == "teacher" and isinstance(instance.architecture, Foreign)
    )
    is_alike = len(own) == len(theirs) and all(
        one[1:] == other[1:] and (one[0] == other[0] or not needs_channels)
        for one, other in zip(own.values(), theirs.values(), strict=True)
    )
    if not is_alike:
        raise RecipeError(
            f"{option}.teacher: the blocks of {instance.teacher} ({_listed(theirs)}) do not match those of network "
            f"'{instance.network_name}' ({_listed(own)}); choose by networks.{teacher.network_name}.blocks, or change "
            f"the student's stem"
        )
    if isinstance(stage, BlocksStage) and len(stage.block_weights) not in (0, len(own)):
        given = len(stage.block_weights)
        raise RecipeError(f"{option}.block_weights: has {given} weights, but the student has {len(own)} blocks")


@cache
def _shapes(settings: Settings, num_classes: int, side: int) -> dict[str, Shape]:
    """[C_i, H_i, H_i] of every block's output, by its name or number. Raises RecipeError if it cannot be built."""

    def shapes(device: torch.device) -> dict[str, Shape]:
        network = build_on(device, settings, num_classes).eval()
        network.settle(side)
        with torch.no_grad():
            outputs = network.blocks(torch.zeros(2, 3, side, side, device=device))
        names = getattr(network, "block_names", ()) or map(str, range(1, len(outputs) + 1))
        return {name: tuple(x.shape[1:]) for name, x in zip(names, outputs, strict=True)}

    return rehearsed(shapes, [settings])


@cache
def _quantise(settings: Settings, num_classes: int, side: int) -> None:
    """Raises RecipeError if a network cannot learn to be rounded."""

    def quantise(device: torch.device) -> None:
        network = build_on(device, settings, num_classes)
        network.settle(side)
        Quantised(network, side)

    rehearsed(quantise, [settings])


@cache
def _is_trainable(settings: Settings, num_classes: int) -> bool:
    return any(parameter.requires_grad for parameter in build_on_meta(settings, num_classes).parameters())


def _listed(shapes: dict[str, Shape]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items()) or "none named"
