"""Weights as the world publishes them, found in whatever they are wrapped in, and why they do not fit.

DistributedDataParallel and torch.compile put `module.` and `_orig_mod.` into names, training scripts put the names into
mappings (`model`, `state_dict`, `model_ema`) beside optimizer states and arguments. So all tensors of a file are named
by the path to them, and a network is where most of its names are found behind one prefix.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gowide_dist.errors import RunError
from gowide_dist.files import is_safetensors, no_weights
from gowide_dist.networks.network import Network

_HEADS = ("fc.", "classifier.", "head.", "last_linear.", "linear.")  # before a classifier's weights, elsewhere
_COUNTER = "num_batches_tracked"  # of a batch norm: changes nothing, as momentums are fixed
Names = tuple[str, ...]
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_DENSENET_BEFORE_0_4 = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")  # as torchvision's files name it
_CODED = {  # by a pattern of names: what computes the weight, and how it is made a plain one before it is saved
    "_orig$": ("pruned by masks", "torch.nn.utils.prune.remove"),
    r"\.parametrizations\.": ("computed by parametrizations", "torch.nn.utils.parametrize.remove_parametrizations"),
    "weight_g$": ("normalised by weight_norm", "torch.nn.utils.remove_weight_norm"),
}
_IMAGE_SIZE = re.compile("pos_embed|position")  # of parameters that a transformer has for each patch of the image
Shapes = dict[str, tuple[int, ...]]


def find_weights(
    path: Path, network: Network, classifier: Callable[[], Names], fresh_classifier: bool, prefix: str | None
) -> tuple[dict[str, Tensor], str]:
    """A network's weights in a file, by the network's names, and the prefix that these have there.

    Batch norms' counters may be missing. classifier: starts of the names of its weights; asked where they matter.
    fresh_classifier: without these. Raises RunError if the file holds no weights, several networks and no `prefix` says
    which, or another network.
    """
    drawn = classifier() if fresh_classifier else ()
    state = network.state_dict()
    own = {_unwrapped(name): name for name in state if not _unwrapped(name).startswith(drawn)}
    tensors = dict(_tensors(_read(path)))
    counted = {name: None for name in own if not name.endswith(_COUNTER)}  # else they would decide between two networks
    prefix = _choose_prefix(path, tensors, counted, prefix)
    found = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
    expected = {name: tuple(state[own_name].shape) for name, own_name in own.items()}
    heads = (*drawn, *_HEADS) if fresh_classifier else ()
    found = {name: each for name, each in found.items() if name in own or (each.ndim and not name.startswith(heads))}
    if cause := _mismatch(expected, {name: tuple(each.shape) for name, each in found.items()}, classifier):
        raise RunError(f"{path}: {cause}")
    for name, each in found.items():
        if cause := _unusable(each, state[own[name]], is_variance=name.endswith("running_var")):
            raise RunError(f"{path}: {name} {cause}")
    return {own[name]: each.to_dense() for name, each in found.items()}, prefix


def _unusable(tensor: Tensor, own: Tensor, is_variance: bool) -> str:
    """Why a tensor is not to be taken for one of the network's of the same shape; empty if it is."""
    if tensor.is_meta:
        return "has no values, as it was saved on the meta device; take another checkpoint"
    if not own.is_floating_point():
        return ""
    if not tensor.is_floating_point():  # a conversion would take its codes, or its real part
        return f"holds {str(tensor.dtype).removeprefix('torch.')}; save the network in floating-point numbers"
    values = tensor.to_dense().float()  # there is no isfinite for 8 bits
    if not values.isfinite().all():
        return "is not finite; take another checkpoint"
    return "is negative; take another checkpoint" if is_variance and (values < 0).any() else ""


class _Stub:
    """In place of an object of any other class in a checkpoint: that class is neither imported nor run."""

    def __new__(cls, *_: Any, **__: Any) -> _Stub:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read(path: Path) -> Any:
    """The content of a file of weights, on the CPU. Raises RunError if there are no tensors in it."""
    others: list[str] = []
    try:
        if is_safetensors(path):
            return load_file(path)
        if is_zip := zipfile.is_zipfile(path):  # else in the format before PyTorch 1.6
            others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with (
            warnings.catch_warnings(action="ignore"),  # of how PyTorch reads what is odd in a file
            torch.serialization.safe_globals([(_Stub, name) for name in others]),
            path.open("rb") as file,  # of a path, PyTorch believes the suffix
        ):
            is_named_otherwise = path.suffix == ".safetensors"
            source = file if is_named_otherwise else path
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip and not is_named_otherwise)
        if any(_tensors(content)):
            return content
    except Exception as error:  # safetensors, pickle and torch raise several types
        if "torchscript" in str(error).lower():
            raise RunError(f"{path}: a TorchScript program; save the state_dict() of its network") from error
        raise RunError(f"{path}: {no_weights(path)}") from error
    if others:
        raise RunError(f"{path}: a whole object ({others[0]} ...), whose code is not run; save its state_dict()")
    raise RunError(f"{path}: {no_weights(path)}")


def _unwrapped(name: str) -> str:
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return _DENSENET_BEFORE_0_4.sub(r"\1\2", name)


def _tensors(content: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested mappings, by the path to them."""
    if isinstance(content, Tensor) and path:
        yield _unwrapped(path), content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{path}.{key}" if path else str(key))


def _choose_prefix(path: Path, tensors: Mapping[str, Tensor], own: Collection[str], wanted: str | None) -> str:
    """The prefix `wanted`, or that behind which most of the network's names are found.

    Of two networks, a moving average is taken, as that is what is evaluated. Raises RunError if that does not decide.
    """
    starts = ((name, [0, *(dot.end() for dot in re.finditer(r"\.", name))]) for name in tensors)
    counts = Counter(name[:start] for name, all_starts in starts for start in all_starts if name[start:] in own)
    most = max(counts.values(), default=0)
    best = sorted(prefix for prefix, count in counts.items() if count == most)
    if wanted is not None:
        wanted = _unwrapped(f"{wanted.rstrip('.')}.") if wanted else ""
        inner = [prefix for prefix in counts if prefix == wanted or prefix.endswith(f".{wanted}")]
        if wanted not in counts and len(inner) != 1:  # the mappings around it may be left out
            known = f"there are some behind {' and '.join(best)}" if any(best) else "the names there have none"
            raise RunError(f"{path}: no weights behind the prefix {wanted}; {known}")
        return wanted if wanted in counts else inner[0]
    if 2 * most < min(len(own), sum(name.startswith((best or [""])[0]) for name in tensors)):
        here = [name for name in own if name not in tensors] or own
        named, expected = (", ".join([*names][:2]) for names in ([name for name in tensors if name not in own], here))
        raise RunError(f"{path}: of another kind of network, which names its weights {named}, not {expected}")
    averages = [prefix for prefix in best if "ema" in re.split(r"[._]", prefix)]
    if len(best) > 1 and len(averages) != 1:
        raise RunError(
            f"{path}: holds several networks, {' and '.join(best)}; take one by init: {{file: ..., prefix: {best[0]}}}"
        )
    return (averages or best or [""])[0]


def _mismatch(own: Shapes, theirs: Shapes, classifier: Callable[[], Names]) -> str:
    """Why weights of these shapes are not the network's, by the first cause that explains it; empty if they are."""
    missing = [name for name in own if name not in theirs and not name.endswith(_COUNTER)]
    unknown = [name for name in theirs if name not in own]
    differing = [name for name in own if name in theirs and own[name] != theirs[name]]
    if not (missing or unknown or differing):
        return ""
    units = [("bottleneck" if "layer1.0.conv3.weight" in shapes else "basic") for shapes in (theirs, own)]
    if units[0] != units[1]:
        return f"of another network: {units[0]} units there, {units[1]} units here"
    for layer in sorted({name.partition(".")[0] for name in (*own, *theirs) if name.startswith("layer")}):
        there, here = (
            len({name.split(".")[1] for name in each if name.startswith(f"{layer}.")}) for each in (theirs, own)
        )
        if there != here:
            return f"of another depth: {layer} has {there} units there, {here} here"
    of_classifier = classifier()
    heads = [name for name in (*missing, *unknown, *differing) if name.startswith(of_classifier)]
    heads += [name for name in unknown if name.startswith(_HEADS)]
    others = [name for name in (*missing, *unknown, *differing) if name not in heads]
    for pattern, (how, remove) in _CODED.items():
        if coded := next((name for name in unknown if re.search(pattern, name)), None):
            return f"{coded} there is {how}; call {remove} before saving"
    if others and others[0] in differing:
        name = others[0]
        kind = "stem" if own[name][1:] != theirs[name][1:] and name == "conv1.weight" else "width"
        kind = "image size" if _IMAGE_SIZE.search(name) else kind
        return f"of another {kind}: {name} is {theirs[name]} there, {own[name]} here"
    if others:
        verbs = {"lacks": missing, "has": unknown}
        told = {verb: ", ".join([name for name in names if name in others][:3]) for verb, names in verbs.items()}
        return f"of another network: it {', '.join(f'{verb} {names}' for verb, names in told.items() if names)}"
    fresh = "init: {file: ..., classifier: fresh} draws a new classifier"
    weight = next((name for name in own if name.startswith(of_classifier) and name.endswith("weight")), "")
    if weight in differing and own[weight][1:] == theirs[weight][1:]:
        return f"of {theirs[weight][0]:,} classes, here are {own[weight][0]:,}; {fresh}"
    if renamed := next((name for name in unknown if weight in missing and theirs[name] == own[weight]), None):
        named, ours = (f"{name.removesuffix('weight')}*" for name in (renamed, weight))
        return f"names its classifier {named}, not {ours}; rename it there, or {fresh}"
    return f"without this network's classifier ({', '.join([*missing, *differing])}); {fresh}"
