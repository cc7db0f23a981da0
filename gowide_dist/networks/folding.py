"""Batch norms in eval mode multiplied into the convolutions that they read."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gowide_dist.networks.network import Network
from gowide_dist.networks.wrapped import Wrapped, contained

Pair = tuple[str, str]  # names of a convolution and of the batch norm that alone reads it


def fold_batch_norms(network: Network) -> Network:
    """A copy in eval mode whose convolutions, with a bias each, do the scaling and shifting of their batch norms.

    Works on any device, the meta device too.
    """
    return fold(network)[0]


def fold(network: Network) -> tuple[Network, list[Pair]]:
    """`fold_batch_norms`, and the pairs of layers that became one, by their names in `network.plain`.

    Another's network has those of its pairs folded whose convolutions nothing else is seen to read. Its code may look
    at them unseen: if its answers change by more than rounding, it stays as it is.
    """
    network = copy.deepcopy(network).eval()
    if not isinstance(network, Wrapped):
        pairs = _own_pairs(network)
        _merge(network, pairs)
        return network, pairs
    # Of a copy: some keep what they have computed, here with its graph, which nothing can copy.
    if not (network.side and (pairs := _pairs(copy.deepcopy(network)))):
        return network, []
    folded = copy.deepcopy(network)
    _merge(folded, pairs)
    return (folded, pairs) if _answer_alike(network, folded) else (network, [])


def _merge(network: Network, pairs: Iterable[Pair]) -> None:
    """Multiply each batch norm into its convolution, in place."""
    for conv_name, norm_name in pairs:
        conv, norm = (network.plain.get_submodule(name) for name in (conv_name, norm_name))
        network.plain.set_submodule(conv_name, fuse_conv_bn_eval(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, norm)))
        network.plain.set_submodule(norm_name, nn.Sequential(*norm.children()))


def _own_pairs(network: Network) -> list[Pair]:
    return [
        (f"{prefix}{conv_name}", f"{prefix}{norm_name}")
        for name, module in network.plain.named_modules()
        for prefix in [f"{name}." if name else ""]
        for conv_name, norm_name in _foldable(module)
    ]


def _foldable(module: nn.Module) -> list[Pair]:
    """The names of a module's convolutions and of the batch norms that read them alone."""
    if type(module).forward is not nn.Sequential.forward:
        return list(getattr(module, "foldable", ()))
    pairs = pairwise(module.named_children())
    return [
        (conv_name, norm_name)
        for (conv_name, conv), (norm_name, norm) in pairs
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    ]


def _pairs(network: Wrapped) -> list[Pair]:
    """The pairs that can be folded, as the graph of autograd shows."""
    names: dict[Any, str] = {}  # of convolutions, by their node of the graph
    found: list[tuple[Any, str]] = []
    calls: Counter[str] = Counter()

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[name] += 1
        if isinstance(module, nn.Conv2d) and output.grad_fn:
            names[output.grad_fn] = name
        elif inputs[0].grad_fn in names:
            found.append((inputs[0].grad_fn, name))

    handles = [
        module.register_forward_hook(lambda *call, name=name: note(name, *call))
        for name, module in network.plain.named_modules()
        if type(module) is nn.Conv2d or _is_plain_norm(module)
    ]
    try:
        with torch.enable_grad(), contained():
            logits, blocks = network.outputs(network.blank(network.side).requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    reads = _num_reads((logits, *blocks))
    return [(names[node], norm) for node, norm in found if calls[names[node]] == calls[norm] == reads[node] == 1]


def _is_plain_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm with statistics, and behind it only what its submodules do in their order."""
    kind = type(module)
    is_timms = kind.__module__.startswith("timm.") and kind.__qualname__ == "BatchNormAct2d"  # which also activates
    children = [name for name, _ in module.named_children()]
    is_known = kind is nn.BatchNorm2d or (is_timms and children == ["drop", "act"])
    return is_known and module.running_mean is not None


def _num_reads(outputs: Iterable[Tensor]) -> Counter[Any]:
    """How often each node of the graph behind some outputs is read; being an output counts too."""
    counts: Counter[Any] = Counter(x.grad_fn for x in outputs if x.grad_fn)
    queue = [*counts]
    while queue:
        for node, _ in queue.pop().next_functions:
            if node:
                counts[node] += 1
                if counts[node] == 1:
                    queue.append(node)
    return counts


@torch.no_grad()
def _answer_alike(one: Wrapped, other: Wrapped) -> bool:
    """Whether both give the same outputs for some images, up to rounding (of TF32, too). On the meta device, True."""
    blank = one.blank(one.side)
    images = torch.linspace(0, 1000, blank.numel(), device=blank.device).sin().view_as(blank)
    try:
        with contained():
            (logits, blocks), (others, other_blocks) = one.outputs(images), other.outputs(images)
    except Exception:  # of their code
        return False
    pairs = zip((logits, *blocks), (others, *other_blocks), strict=True)
    return blank.is_meta or all(bool((x - y).abs().max() <= 0.01 * x.abs().max()) for x, y in pairs)
