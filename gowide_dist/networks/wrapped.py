"""Networks that others have written, as ours: built by name, walked by hooks or block by block.

What such a network does not say of itself is found by running it once (`settle`). It need not be one that
torch.fx understands: outputs of blocks are taken by forward hooks, and the pass ends behind the last that is wanted.

A class of the user's is *walkable*, and so can be a student of `blocks`, if it has

    num_blocks: int                     block_channels: sequence of int, channels of each block's output
    block(i, x) -> Tensor               block 0 of images [B, 3, H, H], block i of the output of block i - 1
    head(x) -> Tensor                   logits [B, K] of the last block's output

and `forward`, which gives the same logits. What a block or the head trains lies in submodules that it calls.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from gowide_dist.errors import RecipeError
from gowide_dist.networks.foreign import Foreign
from gowide_dist.networks.network import Network
from gowide_dist.progress import say

_PROTOCOL = ("num_blocks", "block_channels", "block", "head")


Objective = TypeVar("Objective", bound=nn.Module)


class _Enough(Exception):  # noqa: N818  # no error: the last output that is wanted is there
    pass


class Wrapped(Network):
    """Another's network: images [B, 3, H, H] -> logits [B, K], and no outputs of blocks, for which one asks `blocks`.

    A network of one input channel gets the mean of the three. Of a network that gives several things, the logits are
    the first, or what it calls `logits`.
    """

    architecture: Foreign  # type: ignore[assignment]
    merges = False

    def __init__(self, module: nn.Module, settings: Foreign, num_classes: int, block_names: Sequence[str] = ()) -> None:
        super().__init__(settings, num_classes)
        self.module = module
        self.block_names = tuple(block_names)
        self.is_walkable = not block_names and all(hasattr(module, name) for name in _PROTOCOL)
        first = next((each for each in module.modules() if isinstance(each, nn.Conv2d)), None)
        self._is_grey = first is not None and first.in_channels == 1
        self._has_channels_last = getattr(module, "output_fmt", None) == "NHWC"  # timm's word for outputs of blocks
        self._block_channels: tuple[int, ...] = ()
        self.side = 0  # px, of the images that it was settled for
        self._called: list[list[str]] = []  # names of the submodules that each block calls, then the head
        self._graphs: dict[int, Callable[[Tensor], Mapping[str, Tensor]] | None] = {}  # by number of blocks
        self._walk: Callable[[int, Tensor], Tensor] | None = None

    @property
    def plain(self) -> nn.Module:
        return self.module

    @property
    def num_blocks(self) -> int:
        return int(self.module.num_blocks) if self.is_walkable else len(self.block_names)  # type: ignore[arg-type]

    @property
    def block_channels(self) -> tuple[int, ...]:
        """As `settle` has found them."""
        return self._block_channels

    @property
    def head_layers(self) -> list[nn.Module]:
        return []  # no head of it fits another network

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return _logits(self.module(self._taken(images))), ()

    def blocks(self, images: Tensor, num_blocks: int | None = None) -> tuple[Tensor, ...]:
        num_blocks = self.num_blocks if num_blocks is None else num_blocks
        if self.is_walkable:
            return super().blocks(images, num_blocks)
        if self.is_compiled and (extract := self._graph(num_blocks)):
            outputs = extract(self._taken(images))
            return tuple(self._turned(outputs[name]) for name in self.block_names[:num_blocks])
        with _keeping(self.module, self.block_names[:num_blocks], to_the_end=False) as found:
            self.module.forward(self._taken(images))  # not its compiled version, which passes by the hooks
        return self._in_order(found, num_blocks)

    def outputs(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.is_walkable:
            blocks = self.blocks(images)
            return self.head(blocks[-1]), blocks
        with _keeping(self.module, self.block_names, to_the_end=True) as found:
            logits = _logits(self.module.forward(self._taken(images)))
        return logits, self._in_order(found, self.num_blocks)

    def block_modules(self, index: int) -> list[nn.Module]:
        return [self.module.get_submodule(name) for name in self._called[index]]

    def block(self, index: int, x: Tensor) -> Tensor:
        walk = self._walk or cast(Callable[[int, Tensor], Tensor], self.module.block)
        return walk(index, self._taken(x) if index == 0 else x)

    def head(self, x: Tensor, layers: Sequence[nn.Module] | None = None) -> Tensor:
        assert layers is None, "no other network's head fits"
        return _logits(self.module.head(x))  # type: ignore[operator]

    def readers(self, index: int) -> list[nn.Module]:
        raise NotImplementedError("nothing is merged into another's network")

    def compile_blocks(self) -> None:
        self.is_compiled = True
        self.module.compile()
        if self.is_walkable:
            self._walk = torch.compile(cast(Callable[[int, Tensor], Tensor], self.module.block))

    def settle(self, side: int) -> None:
        """Find out the channels of the blocks, and of a walkable network which submodules each block calls.

        Raises RecipeError if it cannot take square images of `side` px, or gives anything but logits [B, K] and
        outputs [B, C_i, H_i, H_i].
        """
        images, was_training = self.blank(side), self.training
        self.eval()
        try:
            with torch.no_grad(), contained():
                logits, _ = self(images)
                if self.is_walkable:
                    blocks, self._called = _walk(self, images)
                else:
                    blocks = _named_outputs(self, images)
        except RecipeError:
            raise
        except (Exception, SystemExit) as error:  # whatever it raises
            raise RecipeError(
                f"{self.architecture}: cannot take images of {side} px: {reason_of(error)}; change data.resolution, or "
                "the options of the network, such as img_size"
            ) from error
        self.train(was_training)
        _check_outputs(self, logits, blocks)
        self._block_channels, self.side = tuple(x.shape[1] for x in blocks), side

    def freeze_unused(self, side: int) -> None:
        """Freeze what the logits do not depend on, such as auxiliary heads: DDP waits for every gradient."""
        was_training = self.training
        with torch.enable_grad(), contained():
            logits, _ = self.eval()(self.blank(side))
        if not logits.requires_grad:
            return  # its own code has frozen all of it, as of a teacher
        logits.sum().backward()
        self.train(was_training)
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        self.zero_grad()

    def _graph(self, num_blocks: int) -> Callable[[Tensor], Mapping[str, Tensor]] | None:
        if num_blocks not in self._graphs:
            self._graphs[num_blocks] = _traced(self, self.block_names[:num_blocks])
        return self._graphs[num_blocks]

    def blank(self, side: int) -> Tensor:
        """Two images of zeros, on the network's device."""
        return torch.zeros(2, 3, side, side, device=next(self.parameters()).device)

    def _taken(self, images: Tensor) -> Tensor:
        return images.mean(dim=1, keepdim=True) if self._is_grey else images

    def _turned(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self._has_channels_last and x.ndim == 4 else x  # not of tokens

    def _in_order(self, found: Mapping[str, Tensor], num_blocks: int) -> tuple[Tensor, ...]:
        names = self.block_names[:num_blocks]
        if missing := [name for name in names if name not in found]:
            raise RecipeError(f"{self.architecture}: block {missing[0]} does not run")
        return tuple(self._turned(found[name]) for name in names)


def _named_outputs(network: Wrapped, images: Tensor) -> list[Tensor]:
    """Outputs of the blocks that the recipe names, or else of timm's features, if all are pictures.

    Features may also be tokens, or of a submodule that a forward pass does not call: no student can imitate them.
    """
    if network.architecture.blocks:
        return list(network.blocks(images))
    with suppress(RecipeError):
        if all(map(_is_picture, blocks := list(network.blocks(images)))):
            return blocks
    network.block_names = ()
    return []


@contextmanager
def _keeping(module: nn.Module, names: Sequence[str], *, to_the_end: bool) -> Iterator[dict[str, Tensor]]:
    """Inside, outputs of submodules are kept by name, and the pass ends with the last of them, unless `to_the_end`."""
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        found.setdefault(name, output)
        if len(found) == len(names) and not to_the_end:
            raise _Enough

    overwriting: list[Any] = [each for each in module.modules() if getattr(each, "inplace", None) is True]
    for each in overwriting:
        each.inplace = False  # it would overwrite what is kept
    handles = [
        module.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name in names
    ]
    try:
        with suppress(_Enough):
            yield found
    finally:
        for each in overwriting:
            each.inplace = True
        for handle in handles:
            handle.remove()


@contextmanager
def contained() -> Iterator[None]:
    """Inside, code of others prints to stderr, for JSON may be on stdout, and changes no default of torch's."""
    dtype = torch.get_default_dtype()
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torchvision's, of how it draws weights
            yield
    finally:
        torch.set_default_dtype(dtype)


def reason_of(error: BaseException) -> str:
    """One line of at most 200 characters; the text of some errors says nothing without their kind."""
    text = " ".join(str(error).split())[:200]
    kind = type(error).__name__
    return f"{kind}: {text}" if isinstance(error, KeyError | SystemExit) else text or kind


def _check_outputs(network: Wrapped, logits: Any, blocks: Sequence[Tensor]) -> None:
    """Raises RecipeError unless logits are [B, K] and outputs of blocks [B, C_i, H_i, H_i]."""
    if not isinstance(logits, Tensor) or logits.shape[1:] != (network.num_classes,):
        given = list(logits.shape[1:]) if isinstance(logits, Tensor) else type(logits).__name__
        fault = f"gives {given} for an image, not logits of {network.num_classes} classes"
        raise RecipeError(f"{network.architecture}: {fault}")
    for name, x in zip(network.block_names or map(str, range(network.num_blocks)), blocks, strict=True):
        if not _is_picture(x):
            given = list(x.shape[1:]) if isinstance(x, Tensor) else type(x).__name__
            fault = f"block {name} gives {given} for an image, not [channels, H, H]"
            raise RecipeError(f"{network.architecture}: {fault}; choose others by `blocks`")
    channels = [x.shape[1] for x in blocks]
    if network.is_walkable and (said := [*cast(Sequence[int], network.plain.block_channels)]) != channels:
        raise RecipeError(f"{network.architecture}: says block_channels {said}, gives {channels}")


def _is_picture(x: object) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == x.shape[3]


def synchronised(objective: Objective) -> Objective:
    """The same with batch norms whose statistics are of all processes.

    timm's norms also activate, which torch's conversion would lose. Raises RecipeError on norms of anybody else.
    """
    if any(type(module).__module__.startswith("timm.") for module in objective.modules()):
        from timm.layers.norm_act import convert_sync_batchnorm

        return cast(Objective, convert_sync_batchnorm(objective))  # type: ignore[no-untyped-call]
    for module in objective.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not type(module).__module__.startswith("torch."):
            raise RecipeError(f"sync_batch_norm: {type(module).__name__} is no batch norm of torch's; leave it out")
    return cast(Objective, nn.SyncBatchNorm.convert_sync_batchnorm(objective))  # type: ignore[no-untyped-call]


def _walk(network: Wrapped, images: Tensor) -> tuple[list[Tensor], list[list[str]]]:
    """The outputs of all blocks of a walkable network, and the submodules that each block calls, and last the head."""
    x, outputs, calls = images, [], []
    for index in range(network.num_blocks + 1):
        called: dict[str, None] = {}
        handles = [
            module.register_forward_pre_hook(lambda _, __, name=name, called=called: called.setdefault(name))
            for name, module in network.plain.named_modules()
            if name
        ]
        try:
            x = network.block(index, x) if index < network.num_blocks else network.head(x)
        finally:
            for handle in handles:
                handle.remove()
        calls.append([*called])
        outputs.append(x)
    modules = (network.plain.get_submodule(name) for names in calls for name in names)
    covered = {id(parameter) for module in modules for parameter in module.parameters()}
    if left := [name for name, each in network.plain.named_parameters() if id(each) not in covered]:
        raise RecipeError(f"{network.architecture}: {left[0]} is in no submodule that a block or the head calls")
    return outputs[:-1], calls


def _traced(network: Wrapped, names: Sequence[str]) -> Callable[[Tensor], Mapping[str, Tensor]] | None:
    """The compiled graph that ends behind the last of the submodules; None where torch.fx cannot trace it."""
    from torchvision.models.feature_extraction import create_feature_extractor

    try:
        graph = create_feature_extractor(network.plain, {name: name for name in names})
        graph.compile()
    except Exception as error:  # of torch.fx, or of the network's own code
        say(f"note: {network.architecture}: its blocks run uncompiled: {' '.join(str(error).split())[:100]}")
        return None
    return cast(Callable[[Tensor], Mapping[str, Tensor]], graph)


def _logits(output: Any) -> Tensor:
    """The logits among what a network gives."""
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out"))
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list):
        output = output[0]
    return cast(Tensor, output)
