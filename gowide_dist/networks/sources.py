"""Where networks of others come from: timm, torchvision, and a Python file of the user's. Nothing is downloaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gowide_dist.errors import RecipeError
from gowide_dist.networks.foreign import INSTALL, Code, Foreign, Own, Timm, Torchvision
from gowide_dist.networks.wrapped import Wrapped, contained, reason_of
from gowide_dist.schema import nearest


def build_foreign(settings: Foreign, num_classes: int) -> Wrapped:
    """Another's network with fresh weights. Raises RecipeError if there is none of this name, or it cannot be built."""
    build = _function(settings)
    try:
        with contained():
            module = build(num_classes=num_classes, **settings.options)
    except (Exception, SystemExit) as error:  # whatever it raises
        raise RecipeError(f"{settings}: cannot be built: {reason_of(error)}") from error
    if not isinstance(module, nn.Module):
        raise RecipeError(f"{settings}: gives {type(module).__name__}, not a torch.nn.Module")
    if fault := _fault(module):
        raise RecipeError(f"{settings}: {fault}")
    _check_names(settings, settings.blocks, module)
    names = settings.blocks or (_features(module) if isinstance(settings, Timm) else ())
    return Wrapped(module, settings, num_classes, names)


def _fault(module: nn.Module) -> str | None:
    """Why a module cannot be trained, moved and saved as other networks are; None if it can."""
    state, parameters = module.state_dict(), dict(module.named_parameters())
    if isinstance(module, torch.jit.ScriptModule | nn.DataParallel) or hasattr(module, "_orig_mod"):
        return f"gives a {type(module).__name__}, which wraps a network; give the network itself"
    if not parameters:
        return "has no parameters"
    if lazy := [name for name, tensor in state.items() if is_lazy(tensor)]:
        return f"{lazy[0]} has no shape before it has seen images; give its layer all sizes"
    if other := [name for name, tensor in parameters.items() if tensor.dtype != torch.float32]:
        kind = str(parameters[other[0]].dtype).removeprefix("torch.")
        return f"{other[0]} is {kind}; build it in float32, `precision` says what it computes in"
    if extra := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        return f"{extra[0]} of its state is no tensor, which no file of weights holds; make it a buffer"
    return None


def _function(settings: Foreign) -> Callable[..., object]:
    match settings:
        case Timm():
            return _timms(settings)
        case Torchvision():
            return _torchvisions(settings)
        case Own():
            return _owns(settings)
        case _:
            raise AssertionError(settings)


def _timms(settings: Timm) -> Callable[..., object]:
    try:
        import timm
    except ImportError as error:
        raise RecipeError(f"{settings}: timm is missing; {INSTALL}") from error
    model, _, tag = settings.timm.partition(".")
    if not timm.is_model(model):
        raise RecipeError(f"{settings}: timm has no such model, {_near(model, timm.list_models())}")
    if tag and settings.timm not in (tagged := timm.list_models(f"{model}.*", pretrained=True)):
        raise RecipeError(f"{settings}: timm has no such weights, {_near(settings.timm, tagged)}")
    return partial(timm.create_model, settings.timm, pretrained=False)


def _features(module: nn.Module) -> tuple[str, ...]:
    """The submodules whose outputs timm calls features; empty where a name is none's, as of its HRNets."""
    features: Any = getattr(module, "feature_info", [])
    names = [feature["module"] for feature in features if isinstance(feature, dict) and feature.get("module")]
    return tuple(names) if {*names} <= {name for name, _ in module.named_modules()} else ()


def _torchvisions(settings: Torchvision) -> Callable[..., object]:
    from torchvision import models

    names = models.list_models(module=models)  # not those that find or segment
    if settings.torchvision not in names:
        raise RecipeError(
            f"{settings}: torchvision.models has no such classifier, {_near(settings.torchvision, names)}"
        )
    return partial(models.get_model, settings.torchvision, weights=None)


def _owns(settings: Own) -> Callable[..., object]:
    """What the file defines under a name: nothing that it imports, which would let a recipe call any function."""
    code = settings.code
    module = _module(code)
    own = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, FunctionType | type) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    if settings.own not in own:
        hint = _near(settings.own, [*own]) if own else "it defines neither function nor class"
        raise RecipeError(f"{settings}: {code.path} defines no such function or class, {hint}")
    return own[settings.own]


@cache
def _module(code: Code) -> ModuleType:
    """The file of networks as a module. Raises RecipeError if its code fails."""
    module = ModuleType(f"gowide_networks_{code.sha256[:16]}")
    module.__file__ = str(code.path)
    sys.modules[module.__name__] = module  # dataclasses and pickling look there
    try:
        with contained():
            exec(compile(code.source, str(code.path), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:  # whatever it raises
        where = f"{code.path}, line {getattr(error, 'lineno', None) or _line(error, str(code.path))}"
        hint = "the file must stand alone, beside installed packages"
        raise RecipeError(f"--networks: {where}: {reason_of(error)}; {hint}") from error
    return module


def _line(error: BaseException, path: str) -> int:
    """The last line of a file that an error came through."""
    line, traceback = 0, error.__traceback__
    while traceback:
        if traceback.tb_frame.f_code.co_filename == path:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def _check_names(settings: Foreign, names: Sequence[str], module: nn.Module) -> None:
    """Raises RecipeError unless all are names of submodules."""
    known = [name for name, _ in module.named_modules() if name]
    for name in names:
        if name not in known:
            parts = [each for each, _ in module.named_children()]
            raise RecipeError(f"{settings}: blocks: no submodule '{name}', {_near(name, known, parts)}")


def _near(name: str, valid: Sequence[str], instead: Sequence[str] = ()) -> str:
    """`nearest`, and where none is near, not all of many."""
    hint = nearest(name, valid)
    return hint if len(hint) < 200 else f"valid: {', '.join([*(instead or valid)][:8])}, ..."
