"""A network that computes as its file of 8 bits will, so that training can make up for the rounding.

Weights are rounded per output channel, activations per tensor, as Jacob et al. 2018 (arXiv 1712.05877) do, where ONNX
Runtime's quantiser would: what goes into and comes out of convolutions, linear layers, sums and products. Gradients
pass through the rounding. A batch norm behind a convolution is rounded as one layer with it.
"""

from __future__ import annotations

import io
import logging
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, default_decompositions

from gowide_dist.errors import RecipeError, RunError
from gowide_dist.networks.folding import fold
from gowide_dist.networks.network import Network
from gowide_dist.networks.wrapped import contained, reason_of

Range = tuple[float, float]
RATE = 0.01  # of the moving average of ranges, for each step
_TINY = 1e-12

_aten = torch.ops.aten
_CONV, _NORM = _aten.conv2d.default, _aten._native_batch_norm_legit_no_training.default
_WEIGHTED = _CONV, _aten.linear.default
_PAIRING = _aten.add.Tensor, _aten.mul.Tensor
_ROUNDED = {*_WEIGHTED, *_PAIRING, _NORM, _aten.sigmoid.default}  # operations that read and give 8 bits
_SAME_VALUES = {  # they pass on some of the values that they read, which are rounded already
    _aten.slice.Tensor, _aten.permute.default, _aten.view.default, _aten.reshape.default, _aten.flatten.using_ints,
    _aten.clone.default, _aten.max_pool2d.default, _aten.squeeze.dims, _aten.unsqueeze.default,
}  # fmt: skip
_CUTTING = {_aten.relu.default, _aten.hardtanh.default, _aten.relu6.default, _aten.clamp.default}


class Quantised(Network):
    """Another network with rounded weights and activations: images [B, 3, H, H] -> logits [B, K], and no blocks.

    The weights are that network's own, so that it is always the same but for the rounding. It computes in float32,
    whatever autocast says. In training the range of a tensor is that of the batch, as the statistics of a batch norm
    are, each process's own; in eval mode it is the moving average of these, or what `ranges` says.
    """

    merges = False

    def __init__(self, network: Network, side: int, *, symmetric: bool = False, ranges: Sequence[Range] = ()) -> None:
        """side: px, of all images. symmetric: without zero points.

        Raises RecipeError if the network has no graph, RunError if the ranges are of another one.
        """
        super().__init__(network.architecture, network.num_classes)
        self.symmetric = symmetric
        self._network = (network.eval(),)  # a tuple, for its weights are in the graph
        module = _graph(network, side)
        _round_weights(module, network)
        nodes = rounded_nodes(module.graph)
        values: Sequence[Range | None] = ranges or [None] * len(nodes)
        if len(values) != len(nodes):
            fault = f"its weights came with {len(values)} ranges, but {len(nodes)} activations are rounded here"
            raise RunError(f"{fault}; take the PyTorch that trained it, or train it again")
        device = next(network.parameters()).device
        self._roundings = tuple(Rounding(symmetric, value).to(device) for value in values)  # in the graph, too
        for index, (rounding, node) in enumerate(zip(self._roundings, nodes, strict=True)):
            with module.graph.inserting_after(node):
                rounded = _call(module, f"rounding_{index}", rounding, node)
            for reader in [reader for reader in node.users if reader is not rounded]:
                reader.replace_input_with(node, rounded)
        for node in [node for node in module.graph.nodes if node.op == "get_attr" and not node.users]:
            module.graph.erase_node(node)
        self.graph = fx.GraphModule(module, module.graph)  # holds what its nodes use alone

    @property
    def num_blocks(self) -> int:
        return 0

    @property
    def block_channels(self) -> tuple[int, ...]:
        return ()

    @property
    def plain(self) -> nn.Module:
        return self.unrounded.plain

    @property
    def unrounded(self) -> Network:
        """The network with the same weights, in float32."""
        return self._network[0]

    @property
    def rounding(self) -> dict[str, Any]:
        """The arguments that, with its weights, make this network again."""
        return {"symmetric": self.symmetric, "ranges": tuple(each.range for each in self._roundings)}

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        device = images.device.type
        has_autocast = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
            return self.graph(images), ()

    def compile_blocks(self) -> None:
        self.is_compiled = True
        self.graph.compile()

    def block_modules(self, index: int) -> list[nn.Module]:
        raise TypeError("a network of 8 bits has no blocks")

    def block(self, index: int, x: Tensor) -> Tensor:
        raise TypeError("a network of 8 bits has no blocks")

    def readers(self, index: int) -> list[nn.Module]:
        raise TypeError("a network of 8 bits has no blocks")

    @property
    def head_layers(self) -> list[nn.Module]:
        raise TypeError("a network of 8 bits has no blocks")


def unrounded(network: Network) -> Network:
    """The network that computes in float32 with the same weights."""
    return network.unrounded if isinstance(network, Quantised) else network


class NormedConvolution(nn.Module):
    """A convolution and the batch norm behind it, of which the product has rounded weights.

    In training the norm takes the statistics of the batch, as everywhere. The weights are rounded without its scale,
    which changes nothing: each channel has its own range. [B, C_in, H, H] -> [B, C_out, H', H'].
    """

    def __init__(self, conv: nn.Module, norm: nn.Module, options: Sequence[Any]) -> None:
        """options: what follows the bias among the arguments of torch's conv2d."""
        super().__init__()
        self.conv, self.norm = conv, norm
        # in lists of Python's: torch.compile does not know those of torch.fx
        self.options: list[Any] = [[*each] if isinstance(each, Sequence) else each for each in options]

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = cast(nn.Conv2d, self.conv), cast(nn.BatchNorm2d, self.norm)
        if self.training:
            return _normalised(norm, F.conv2d(x, rounded_weight(conv.weight), conv.bias, *self.options), training=True)
        scale = torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps)
        scale = scale if norm.weight is None else norm.weight * scale
        bias = ((0 if conv.bias is None else conv.bias) - cast(Tensor, norm.running_mean)) * scale
        bias = bias if norm.bias is None else bias + norm.bias
        return F.conv2d(x, rounded_weight(conv.weight * scale[:, None, None, None]), bias, *self.options)


class Norm(nn.Module):
    """A batch norm that stands alone, without what a subclass of torch's does besides."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return _normalised(cast(nn.BatchNorm2d, self.norm), x, self.training)


def _normalised(norm: nn.BatchNorm2d, x: Tensor, training: bool) -> Tensor:
    momentum = 0.1 if norm.momentum is None else norm.momentum
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, momentum, norm.eps)


class Rounding(nn.Module):
    """Rounds a tensor to 256 values between its least and its largest, zero among them."""

    average: Tensor  # [2], of the least and the largest value of a batch; what it lacks of the whole is in `weight`
    weight: Tensor  # scalar, 0 at the start, towards 1

    def __init__(self, symmetric: bool, given: Range | None = None) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.register_buffer("average", torch.tensor(given or (0.0, 0.0)))
        self.register_buffer("weight", torch.tensor(1.0 if given else 0.0))

    @property
    def range(self) -> Range:
        low, high = self._range().tolist()
        return low, high

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            limits = torch.stack(torch.aminmax(x.detach()))
            self.average.lerp_(limits, RATE)
            self.weight.lerp_(torch.ones_like(self.weight), RATE)
        else:
            limits = self._range()
        low, high = limits[0].clamp(max=0), limits[1].clamp(min=0)
        if self.symmetric:
            scale = (torch.maximum(-low, high) / 127).clamp(min=_TINY)
            zero_point = torch.zeros_like(scale)
        else:
            scale = ((high - low) / 255).clamp(min=_TINY)
            zero_point = torch.round(-128 - low / scale)
        return cast(Tensor, _Rounded.apply(x, scale, zero_point, -128))

    def _range(self) -> Tensor:
        return self.average / self.weight.clamp(min=_TINY)


def rounded_weight(weight: Tensor) -> Tensor:
    """Weights [C_out, ...] in 8 bits without zero points, each output channel in its own range."""
    others = tuple(range(1, weight.ndim))
    scales = (weight.detach().abs().amax(others, keepdim=True) / 127).clamp(min=_TINY)
    return cast(Tensor, _Rounded.apply(weight, scales, torch.zeros_like(scales), -127))


class _Rounded(torch.autograd.Function):
    """x in whole numbers of `scale`, from `least` to 127 with the zero point; the gradient of what is within passes.

    As PyTorch's own, which neither the meta device nor torch.compile knows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, least: int) -> Tensor:
        numbers = (x / scale).round_().add_(zero_point)
        within = numbers.clamp(least, 127)
        ctx.save_for_backward(numbers == within)
        ctx.strides = x.stride() if scale.ndim else ()  # of weights, in which DDP wants their gradient
        return within.sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (is_within,) = ctx.saved_tensors
        result = gradient * is_within
        if ctx.strides and ctx.strides != result.stride():
            result = result.new_empty_strided(result.shape, ctx.strides).copy_(result)
        return result, None, None, None


def exported(module: nn.Module, example: Tensor, batch: int | None) -> ExportedProgram:
    """The graph of a module of images [B, ...] for `batch` of them; None: for any number.

    `example` should hold more than one then, which would become a constant.
    """
    shapes = None if batch else ({0: Dim("batch", min=1)},)
    return torch.export.export(module, (example,), dynamic_shapes=shapes)


def operations(program: ExportedProgram) -> fx.GraphModule:
    """The graph of a program in ATen operations that ONNX's exporter keeps, and so names alike."""
    pool = _aten.adaptive_avg_pool2d.default
    table = {pool: default_decompositions()[pool]}
    return cast(fx.GraphModule, program.run_decompositions(table).module(check_guards=False))


def rounded_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of a graph of ATen operations, without those in place, whose outputs are rounded, in their order.

    What only a rectifier reads is not rounded before it, which would waste the range that it cuts off; nor are logits:
    the best two would often be equal. It makes no difference whether batch norms are folded, and what prepares the
    images comes before the first.
    """
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "call_module" or node.target in _ROUNDED:
            inputs = node.args[:2] if node.target in _PAIRING else node.args[:1]
            sources = [_source(each) for each in inputs if isinstance(each, fx.Node)]
            activations = (each for each in sources if each.op != "get_attr")
            found |= dict.fromkeys([*activations, _output(node)])
        elif node.target in _CUTTING and _source(node.args[0]) in found:
            found[node] = None
    return [node for node in graph.nodes if node in found and not any(each.op == "output" for each in node.users)]


def _source(node: fx.Node) -> fx.Node:
    """Where the values of a node come from."""
    while node.target in _SAME_VALUES:
        node = cast(fx.Node, node.args[0])
    return node


def _output(node: fx.Node) -> fx.Node:
    """The node that holds what an operation gives, or what a rectifier behind it does."""
    if node.target is _NORM:
        [node] = node.users
    reader = next(iter(node.users), node)
    return reader if len(node.users) == 1 and reader.target in _CUTTING else node


def _round_weights(module: fx.GraphModule, network: Network) -> None:
    """Let each convolution and linear layer round its weights, together with the batch norm behind it."""
    graph = module.graph
    norms = dict(fold(network)[1])  # by convolution
    owners = {  # names of layers by their tensors
        id(each): name
        for name, layer in network.plain.named_modules()
        for each in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    }

    def owner(node: fx.Node) -> str:
        tensor: Tensor = operator.attrgetter(cast(str, node.target))(module)
        return str(owners[id(tensor)])

    for node in [node for node in graph.nodes if node.target is _NORM]:
        norm, read, [output] = owner(node.args[3]), node.args[0], node.users
        is_pair = read.target is _CONV and norms.get(owner(read.args[1])) == norm
        with graph.inserting_before(read if is_pair else node):
            if is_pair:
                conv = network.plain.get_submodule(owner(read.args[1]))
                layer: nn.Module = NormedConvolution(conv, network.plain.get_submodule(norm), read.args[3:])
                called = _call(module, f"{read.name}_normed", layer, read.args[0])
            else:
                called = _call(module, f"{node.name}_alone", Norm(network.plain.get_submodule(norm)), read)
        output.replace_all_uses_with(called)
        for each in (output, node, *([read] if is_pair else [])):
            graph.erase_node(each)
    for node in [node for node in graph.nodes if node.target in _WEIGHTED]:
        with graph.inserting_before(node):
            node.update_arg(1, graph.call_function(rounded_weight, (node.args[1],)))


def _call(module: fx.GraphModule, name: str, layer: nn.Module, read: fx.Node) -> fx.Node:
    """A new node that calls a new layer of a graph's module."""
    module.add_submodule(name, layer)
    return module.graph.call_module(name, (read,))


class _Logits(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.network(images)[0])


@contextmanager
def _without_torchs_report() -> Iterator[None]:
    """Inside, nothing is printed or logged: torch.export prints the graph as far as it came before its error."""
    logging.disable()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _graph(network: Network, side: int) -> fx.GraphModule:
    """Images [B, 3, side, side] -> logits [B, K], as a graph of ATen operations that shares the network's weights."""
    device = next(network.parameters()).device
    try:
        with _without_torchs_report(), contained(), torch.enable_grad():
            program = exported(_Logits(network), torch.zeros(2, 3, side, side, device=device), None)
    except Exception as error:  # of another's code
        reason = reason_of(error).partition(" (unhinted")[0]
        raise RecipeError(
            f"{network.architecture}: cannot be quantised, for torch.export cannot read it: {reason}"
        ) from error
    return operations(program)
