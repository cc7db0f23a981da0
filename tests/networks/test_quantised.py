"""Networks that are rounded to 8 bits: the values, where they are rounded, and what training sees."""

import copy
from pathlib import Path

import pytest
import torch
from torch.export import export

from gowide_dist import build_network
from gowide_dist.errors import RecipeError
from gowide_dist.networks import quantised
from gowide_dist.networks.folding import fold_batch_norms
from gowide_dist.networks.quantised import Quantised, Rounding, operations, rounded_nodes, rounded_weight

NETS = Path(__file__).parent / "nets.py"

NETWORKS = [
    {"block": "bottleneck", "depths": [2, 1], "base": 4, "stem": "imagenet"},
    {"block": "basic", "depths": [1, 2], "base": 8, "width": 0.5, "stem": "small"},
    {"block": "basic", "depths": [1, 1], "base": 8, "stem": "small", "pre_activation": True},
    {"arch": "mobilenet_v2", "channels": 0.1, "stem": "strided"},
    {"timm": "test_efficientnet"},
]


def network_of(architecture, side=32):
    """With statistics and weights that no norm of a fresh network has."""
    torch.manual_seed(0)
    network = build_network(architecture, 7)
    network.settle(side)
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.1, 0.1)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.uniform_(-0.3, 0.3)
    return network


def images(side=32):
    return torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("limits", [(-1.5, 3.0), (0.2, 6.0), (-3.0, -1.0), (0.0, 0.0)])
def test_activations_are_rounded_as_torch_does(symmetric, limits):
    """Zero is always one of the values."""
    x = torch.linspace(-8, 8, 1001, requires_grad=True)
    low, high = min(limits[0], 0), max(limits[1], 0)
    scale = max(-low, high) / 127 if symmetric else (high - low) / 255
    scale = max(scale, 1e-12)
    zero_point = 0 if symmetric else round(-128 - low / scale)
    expected = torch.fake_quantize_per_tensor_affine(x.detach(), scale, zero_point, -128, 127)
    rounding = Rounding(symmetric, limits).eval()
    rounded = rounding(x)
    assert torch.allclose(rounded, expected, atol=1e-6)
    assert rounding.range == pytest.approx(limits)
    rounded.sum().backward()
    inside = (x.detach() > (-128 - zero_point) * scale) & (x.detach() < (127 - zero_point) * scale)
    assert x.grad[inside].eq(1).all() and x.grad[(x.detach() - rounded.detach()).abs() > scale].eq(0).all()


def test_ranges_are_moving_averages_of_the_batches():
    rounding = Rounding(symmetric=False)
    for scale in (1.0, 3.0):
        rounding(torch.tensor([-1.0, 2.0]) * scale)
    parts = (0.99 * 0.01, 0.01)
    expected = (parts[0] + 3 * parts[1]) / sum(parts)
    assert rounding.range == pytest.approx((-expected, 2 * expected))


def test_weights_are_rounded_per_channel():
    weight = torch.stack([torch.linspace(-1, 1, 27).view(3, 3, 3), torch.full((3, 3, 3), 100.0), torch.zeros(3, 3, 3)])
    rounded = rounded_weight(weight)
    assert ((rounded[0] * 127).frac().abs() % 1).max() < 1e-4 and (rounded[0] - weight[0]).abs().max() <= 0.51 / 127
    assert torch.equal(rounded[1:], weight[1:])


@pytest.mark.parametrize("architecture", NETWORKS, ids=str)
def test_without_rounding_it_is_the_network_itself(architecture, monkeypatch):
    """In eval mode, and in training: the same logits, gradients and statistics."""
    monkeypatch.setattr(quantised._Rounded, "apply", lambda x, *_: x)
    network = network_of(architecture)
    other = copy.deepcopy(network)
    rounded = Quantised(other, 32)
    assert_rounded_like_the_folded(rounded, network)
    with torch.no_grad():
        assert torch.allclose(rounded.eval()(images())[0], network.eval()(images())[0], rtol=1e-3, atol=1e-4)
    for each in network.modules():
        if type(each).__name__.startswith(("Dropout", "DropPath")):
            each.p = each.drop_prob = 0.0  # which a graph of eval mode leaves out
    logits = [each.train()(images())[0] for each in (network, rounded)]
    assert torch.allclose(*logits, rtol=1e-2, atol=1e-3)
    for each in logits:
        each.square().sum().backward()
    assert {id(each) for each in rounded.parameters()} == {id(each) for each in other.parameters()}
    for name, parameter in network.named_parameters():
        found = other.get_parameter(name).grad
        assert (found - parameter.grad).norm() <= 0.02 * parameter.grad.norm() + 1e-3, name
    for name, statistic in network.named_buffers():
        if "running" in name:
            assert torch.allclose(other.get_buffer(name), statistic, rtol=1e-3, atol=1e-4), name


def assert_rounded_like_the_folded(rounded, network):
    """Where the graph that is exported is: so that the ranges of the training fit it."""
    program = export(quantised._Logits(fold_batch_norms(network)), (torch.zeros(2, 3, 32, 32),))
    nodes = rounded_nodes(operations(program).graph)
    found = []
    for node in rounded.graph.graph.nodes:
        if node.op == "call_module" and isinstance(rounded.graph.get_submodule(node.target), Rounding):
            found.append(node.args[0])
    assert len(rounded.rounding["ranges"]) == len(nodes)
    assert nodes[0].op == found[0].op == "placeholder"

    def kind(node):
        is_layer = node.op == "call_module" or node.name.startswith(("conv2d", "getitem"))
        return "layer" if is_layer else node.name.rstrip("_0123456789")

    assert [*map(kind, found)] == [*map(kind, nodes)]


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_rounded_network_answers_nearly_alike(symmetric):
    """And again from its weights and ranges: the same."""
    network = network_of(NETWORKS[1])
    rounded = Quantised(copy.deepcopy(network), 32, symmetric=symmetric)
    for _ in range(3):
        rounded.train()(images())
    with torch.no_grad():
        logits, expected = rounded.eval()(images())[0], rounded.unrounded(images())[0]
        again = Quantised(copy.deepcopy(rounded.unrounded), 32, **rounded.rounding).eval()(images())[0]
    assert 0 < (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.equal(again, logits)


def test_a_network_without_a_graph():
    network = build_network({"own": "Branching"}, 7, NETS)
    network.settle(32)
    with pytest.raises(RecipeError, match=r"own: Branching.*: cannot be quantised, for torch.export cannot read it"):
        Quantised(network, 32)
