"""What determines a stage's weights, and that a change of it cannot go unnoticed."""

import json
from inspect import isabstract
from pathlib import Path

import pytest

from gowide_dist import load_recipe
from gowide_dist.identity import EMA_FORMAT, IDENTITY_FORMAT, identities
from gowide_dist.networks import architecture, foreign
from gowide_dist.recipe import Recipe
from gowide_dist.schema import Frozen

DEFAULTS = Path(__file__).parent / "defaults.json"
DEMO = Path(__file__).parents[1] / "jobs" / "demo.yaml"


def recipe_models(base=Frozen):
    for model in base.__subclasses__():
        if model.__module__ in ("gowide_dist.recipe", "gowide_dist.stages", architecture.__name__, foreign.__name__):
            yield model
            yield from recipe_models(model)


def defaults():
    """Of every option of a recipe that has one, as JSON."""
    return {
        model.__name__: {
            name: value
            for field_name, field in model.model_fields.items()
            if not field.is_required()
            for name, value in model.__pydantic_serializer__.to_python(
                model.model_construct(), mode="json", include={field_name}
            ).items()  # of another's network its arguments stand beside its settings, and none is a default
        }
        for model in sorted({*recipe_models()}, key=lambda model: model.__name__)
        if not isabstract(model) and not all(field.is_required() for field in model.model_fields.values())
    }


def test_a_changed_default_changes_the_fingerprint():
    """Fingerprints leave out what has its default. Delete the file, and it is written anew."""
    assert Recipe.__name__ in defaults()
    if not DEFAULTS.exists():
        DEFAULTS.write_text(json.dumps(defaults(), indent=1) + "\n")
        pytest.fail(f"{DEFAULTS} was written: look at what has changed and run the test again")
    frozen = json.loads(DEFAULTS.read_text())
    assert defaults() == frozen, (
        "the defaults of a recipe are not those in tests/defaults.json. A new option: delete the file, and this test "
        "writes it anew. A changed default: raise IDENTITY_FORMAT in gowide_dist/identity.py as well, or stages that were "
        "trained with the old default would pass for finished"
    )


def test_only_stages_with_a_moving_average_are_told_from_those_trained_before_it_warmed_up():
    plain, averaged = (load_recipe(DEMO, overrides) for overrides in ([], ["stages.distill.optim.ema=0.99"]))
    checksums = {"train": "a", "val": "b"}
    before, after = (identities(recipe, checksums) for recipe in (plain, averaged))
    assert {key for key in before if before[key] != after[key]} == {"distill/thin"}
    assert (before["distill/thin"]["format"], after["distill/thin"]["format"]) == (IDENTITY_FORMAT, EMA_FORMAT)
