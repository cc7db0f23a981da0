"""The strict base of everything that users write in YAML; errors are one line each, with the key."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType

from gowide_dist.errors import RecipeError
from gowide_dist.files import expanded


def nearest(key: object, valid: Iterable[str]) -> str:
    """A hint for a misspelt key: the valid one nearest to it, or all valid ones if none is near."""
    close = get_close_matches(str(key), valid := [*valid], n=1)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(valid)}"


class Frozen(BaseModel):
    """Immutable settings. An unknown key is an error that names the nearest valid one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        for key in values if isinstance(values, Mapping) else ():
            if key not in cls.model_fields:
                is_glued = values[key] is None and ":" in str(key)  # YAML reads {epochs:3} as one key without a value
                hint = "write a space after the colon" if is_glued else nearest(key, cls.model_fields)
                raise PydanticCustomError(
                    "unknown_key", "unknown key '{key}', {hint}", {"key": _short(key), "hint": hint}
                )
        return values


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("bool_as_number", "should be a number, not {value}", {"value": str(value).lower()})
    return value


# YAML 1.1 reads 1e-4 as text, so real numbers are also accepted as text.
Real = Annotated[float, BeforeValidator(_refuse_bool)]
Positive = Annotated[Real, Field(gt=0)]
NonNegative = Annotated[Real, Field(ge=0)]
Fraction = Annotated[Real, Field(ge=0, le=1)]
Count = Annotated[int, Field(strict=True, ge=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
# A path with `~` and variables, which are replaced when it is read: every process then sees the same one.
UserPath = Annotated[Path, AfterValidator(expanded)]
Name = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


def _decimal(pattern: re.Pattern[str]) -> re.Pattern[str]:
    """Of a pattern of YAML 1.1's numbers, those that mean the same to everybody."""
    return re.compile(rf"(?!.*:|[-+]?0[0-9_]+$){pattern.pattern}", pattern.flags)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a duplicate key, of which PyYAML would silently take the last, and that reads 12:00:00
    and 010 as text: YAML 1.1 reads them to the bases of 60 and 8, as 43,200 and 8.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag != "tag:yaml.org,2002:merge" and isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    fault = f"key '{key_node.value}' is written twice"
                    raise yaml.constructor.ConstructorError(None, None, fault, key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    start: [(tag, _decimal(pattern) if tag.endswith((":int", ":float")) else pattern) for tag, pattern in resolvers]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises RecipeError with the line of the fault."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{where}: not valid YAML{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise RecipeError(f"{where}: not valid YAML: {error}") from error


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, with overrides `dotted.key=value` applied. Raises RecipeError if one is malformed."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text: {error}") from error
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: should hold a mapping of keys to values, not {_quote(values)}")
    for override in overrides:
        _apply_override(values, override)
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value` in place; the value is read as YAML."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override '{override}': should look like stages.distill.epochs=5")
    target = values
    # networks.NAME.x and stages.NAME.x change an entry that exists: a misspelt name must not add one
    members = values.get(keys[0]) if len(keys) > 2 and keys[0] in ("networks", "stages") else None
    if isinstance(members, dict) and keys[1] not in members:
        raise RecipeError(f"override '{override}': no '{keys[1]}' in {keys[0]}, {nearest(keys[1], members)}")
    for depth, key in enumerate(keys[:-1]):
        child = target.get(key, {})
        if not isinstance(child, dict):
            raise RecipeError(f"override '{override}': {'.'.join(keys[: depth + 1])} is a value, not a mapping of keys")
        child = target[key] = dict(child)  # a copy: by an alias in YAML, other keys have the same mapping
        target = child
    try:
        target[keys[-1]] = _parse_yaml(text, f"override '{override}'")
    except RecipeError as error:
        raise RecipeError(f"{error}; a shell wants quotes around an override with blanks") from error


_NUM_SHOWN = 3  # of further faults
Model = TypeVar("Model", bound=BaseModel)
Keys = list[int | str]


def validate(
    model: type[Model], values: object, where: str, keys: Callable[[Keys], Keys] = list, context: object = None
) -> Model:
    """A checked model. Raises RecipeError `where: key: what is wrong` for the first fault found.

    `keys` turns pydantic's location of a fault into the keys that the user wrote. context: for validators that ask.
    """
    try:
        return model.model_validate(values, context=context)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        key, *others = dict.fromkeys(
            _written(keys([*fault["loc"]]) if fault["loc"] else [], values) for fault in faults
        )
        others[_NUM_SHOWN:] = [f"{len(others) - _NUM_SHOWN} more"] if len(others) > _NUM_SHOWN else []
        more = f" (and at fault: {', '.join(others)})" if others else ""
        raise RecipeError(f"{where}: {key and f'{key}: '}{_describe(faults[0])}{more}") from error
    except RecursionError as error:
        raise RecipeError(f"{where}: nested too deeply") from error


def _written(location: Keys, values: object) -> str:
    """The dotted key of a fault, as far as the user wrote it: `erase: 2` is short for a mapping that has more keys."""
    written = []
    for part in location:
        if isinstance(values, Mapping):
            values = values.get(part)
        elif isinstance(values, list | tuple) and isinstance(part, int):
            values = values[part] if part < len(values) else None
        else:
            break
        if part != "[key]":  # of a mapping whose key is at fault
            written.append(_short(part))
    return ".".join(written)


_MESSAGES = {  # instead of pydantic's
    "missing": "is required",
    "union_tag_not_found": "{discriminator} is required",
    "union_tag_invalid": "{discriminator} should be one of {expected_tags}, not '{tag}'",
    "string_pattern_mismatch": "should be a name of letters, digits, '-' and '_'",
    "model_type": "should be a mapping of keys to values, not {value}",
    "dict_type": "should be a mapping of keys to values, not {value}",
    "model_attributes_type": "should be a mapping of keys to values, not {value}",
    "tuple_type": "should be a list, not {value}",
    "literal_error": "should be {expected}, not {value}",
    "path_type": "should be a path, not {value}",
    "too_short": "should not be empty",  # everywhere at least one
}


def _describe(fault: ErrorDetails) -> str:
    if message := _MESSAGES.get(fault["type"]):
        context = dict(fault.get("ctx", {}))
        if "expected" in context:
            context["expected"] = context["expected"].replace("False, True", "false, true")  # as YAML has them
        return message.format(value=_quote(fault["input"]), **context)
    is_ours = fault["type"] == "value_error" or fault["type"] not in get_args(ErrorType)  # names the value, if useful
    message = fault["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if is_ours:
        return message
    is_unquoted = fault["type"] == "string_type" and isinstance(fault["input"], int | float | date)
    return f"{message}, not {_quote(fault['input'])}{'; put it in quotes' if is_unquoted else ''}"


def _quote(value: object) -> str:
    return {dict: "a mapping", list: "a list", type(None): "nothing"}.get(type(value), f"'{_short(value)}'")


def _short(value: object) -> str:
    """What the user wrote, in one short line."""
    text = " ".join(str(value).split())
    return f"{text[:60]}…" if len(text) > 60 else text
