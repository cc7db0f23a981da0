"""Networks that others have written, as a recipe names them: timm's, torchvision's, the user's own. Imports no torch.

A recipe is data and runs no code: it names a model of timm or torchvision, or a function of the one Python file that
the command line gives (`--networks`). Weights are never downloaded; `init: {file: ...}` reads them from a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

from pydantic import Field, JsonValue, PrivateAttr, ValidationInfo, field_validator, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from gowide_dist.errors import RecipeError
from gowide_dist.networks.architecture import Structure, structure_of
from gowide_dist.networks.normalise import DATASET, IMAGENET, Normalise
from gowide_dist.schema import Frozen

NETWORKS = "networks.py"  # the file of networks in a run
INSTALL = "pip install -c constraints.txt -e '.[timm]'"


class Code(NamedTuple):
    """A Python file of networks as it was when it was read."""

    path: Path
    source: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()


def read_code(path: Path) -> Code:
    """Raises RecipeError if the file cannot be read as text."""
    try:
        return Code(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise RecipeError(f"--networks: {path}: {reason}; give a Python file of networks") from error


class Foreign(Frozen):
    """A network by its name. All other keys of the mapping are arguments of the function that builds it."""

    kind: ClassVar[str]  # the key that has the name
    refused: ClassVar[tuple[str, ...]] = ()  # starts of arguments that would download, run or replace something

    blocks: tuple[str, ...] = ()  # submodules whose outputs are the network's blocks, from the bottom
    normalise: Normalise | None = None
    options: dict[str, JsonValue] = Field(default={})

    @property
    def name(self) -> str:
        return str(getattr(self, self.kind))

    @property
    def num_blocks(self) -> int:
        """As far as the recipe alone tells."""
        return len(self.blocks) or 1

    def __str__(self) -> str:
        return f"{{{self.kind}: {self.name}}}"

    def __hash__(self) -> int:  # pydantic's would hash the options, a dict
        return hash(self.model_dump_json())

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        fields = {key: value for key, value in values.items() if key in cls.model_fields and key != "options"}
        options = {key: value for key, value in values.items() if key not in fields}
        if others := [key for key in FOREIGN if key in options]:
            message = "names two networks, by {kind} and {other}; take one of them"
            raise PydanticCustomError("two_networks", message, {"kind": cls.kind, "other": others[0]})
        for key in options:
            if str(key).startswith(("num_classes", *cls.refused)):
                message = (
                    "{key} is not for a recipe to say: classes are the data's, weights come by init: {{file: ...}}"
                )
                raise PydanticCustomError("refused_option", message.replace("{{", "{").replace("}}", "}"), {"key": key})
        return {**fields, "options": options}

    @model_serializer(mode="wrap")
    def _flat(self, dump: Any) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        options = values.pop("options", {})
        return {**values, **options}


class Timm(Foreign):
    """A model of timm's. Without `normalise` its images are normalised as timm's configuration of it says."""

    kind = "timm"
    refused = ("pretrained", "checkpoint_path", "cache_dir", "features_only", "feature_c", "scriptable", "exportable")
    timm: str

    @field_validator("timm")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return _checked(name, name.replace(".", "_", 1), "of a model of timm's")


class Torchvision(Foreign):
    """A classifier of torchvision.models, its images normalised as its published weights expect."""

    kind = "torchvision"
    refused = ("weights", "pretrained", "progress")
    torchvision: str
    normalise: Normalise = Normalise(**IMAGENET)

    @field_validator("torchvision")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return _checked(name, name, "of a classifier of torchvision.models")


class Own(Foreign):
    """A function or class of the file that the command line gives, called with `num_classes` and the options."""

    kind = "own"
    own: str
    normalise: Normalise = DATASET
    _code: Code | None = PrivateAttr(None)

    @property
    def code(self) -> Code:
        if self._code is None:
            raise RecipeError(f"{self}: is a function of a Python file; give the file by --networks FILE.py")
        return self._code

    @field_validator("own")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return _checked(name, name, "of a function or class in the file that --networks gives")

    @model_validator(mode="after")
    def _take_code(self, info: ValidationInfo) -> Own:
        self._code = info.context
        return self


def _checked(name: str, plain: str, what: str) -> str:
    if not (plain.isascii() and plain.isidentifier()):
        raise PydanticCustomError("bad_name", "should be the name {what}, not '{name}'", {"what": what, "name": name})
    return name


Settings: TypeAlias = Structure | Foreign  # what a recipe says of a network, whoever has written it
FOREIGN: dict[str, type[Foreign]] = {"timm": Timm, "torchvision": Torchvision, "own": Own}


def settings_class(values: object) -> type[Settings]:
    """The model of a recipe's mapping of a network."""
    if isinstance(values, Foreign):
        return type(values)
    names = FOREIGN if isinstance(values, Mapping) else {}
    return next((FOREIGN[key] for key in names if key in values), None) or structure_of(values)  # type: ignore[operator]


def normalise_of(settings: Settings) -> Normalise:
    """How a network's images are normalised; imports timm where its configuration says it."""
    return _timms(settings.name) if settings.normalise is None else settings.normalise


@cache
def _timms(name: str) -> Normalise:
    try:
        from timm.models import get_pretrained_cfg
    except ImportError as error:
        raise RecipeError(f"{{timm: {name}}}: timm is missing; {INSTALL}") from error
    config = get_pretrained_cfg(name)
    return Normalise.model_validate({"mean": config.mean, "std": config.std}) if config else Normalise(**IMAGENET)
