import pytest
import torch

from gowide_dist import build_network
from gowide_dist.networks.mobilenet import InvertedResidual
from gowide_dist.networks.preactivation import PreActivationUnit
from gowide_dist.networks.pruning import take_over, take_over_strongest
from gowide_dist.networks.resnet import BasicUnit, BottleneckUnit

FAMILIES = {
    "basic": {"block": "basic", "depths": [1, 2], "base": 8, "stem": "strided"},
    "bottleneck": {"block": "bottleneck", "depths": [2, 1], "base": 8, "stem": "small"},
    "pre-activation": {"block": "bottleneck", "depths": [2, 1], "base": 8, "stem": "small", "pre_activation": True},
    "mobile": {"arch": "mobilenet_v2", "channels": 0.1, "stem": "small"},
}


def trained(family, **options):
    """A network in eval mode whose norms have seen images and have scales and biases of their own."""
    torch.manual_seed(3)
    network = build_network({**FAMILIES[family], **options}, 5)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    for _ in range(3):
        network(torch.randn(8, 3, 16, 16))
    return network.eval()


def inner_layers(network):
    """(norm of inner channels, convolution that reads them) of every unit."""
    for unit in network.modules():
        if isinstance(unit, BasicUnit):
            yield unit.bn1, unit.conv2
        elif isinstance(unit, BottleneckUnit):
            yield from ((unit.bn1, unit.conv2), (unit.bn2, unit.conv3))
        elif isinstance(unit, PreActivationUnit):
            yield from ((unit.bn2, unit.conv2), (unit.bn3, unit.conv3))
        elif isinstance(unit, InvertedResidual) and len(unit.conv) == 4:  # the first unit does not expand
            yield unit.conv[1][1], unit.conv[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_as_wide_as_its_teacher_becomes_it(family):
    wide = trained(family, width=2)
    student = build_network(wide.architecture, 5).eval()
    take_over_strongest(student, wide)
    images = torch.randn(4, 3, 16, 16)
    (logits, blocks), (expected, expected_blocks) = student(images), wide(images)
    assert torch.equal(logits, expected)
    assert all(map(torch.equal, blocks, expected_blocks))


@pytest.mark.parametrize("silenced", ["scale", "readers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_channels_without_effect_are_those_left_out(family, silenced):
    """Three quarters of each unit's inner channels say nothing, at random places: pruned of them it is the same."""
    wide = trained(family, width=4)
    torch.manual_seed(4)
    with torch.no_grad():
        for norm, reader in inner_layers(wide):
            silent = torch.randperm(norm.num_features)[norm.num_features // 4 :]
            if silenced == "scale":
                norm.weight[silent] = norm.bias[silent] = 0
            else:
                norm.weight[silent] *= 100  # a big scale, but nobody listens
                reader.weight[:, silent] = 0
    student = build_network({**FAMILIES[family], "width": 1}, 5).eval()
    images = torch.randn(4, 3, 16, 16)
    (_, expected) = wide(images)
    take_over(student, wide)
    assert not torch.allclose(student(images)[1][-1], expected[-1], rtol=1e-2)
    take_over_strongest(student, wide)
    for block, wide_block in zip(student(images)[1], expected, strict=True):
        assert torch.allclose(block, wide_block, rtol=1e-4, atol=1e-5)
    assert torch.allclose(student(images)[0], wide(images)[0], rtol=1e-4, atol=1e-5)


def test_importance_by_hand():
    """|scale| x norm of the readers: 1 x 5, 3 x 1, 2 x 2, 1 x 1. The strongest two are channels 0 and 2, in order."""
    wide = build_network({"block": "basic", "depths": [1], "base": 4}, 2)
    thin = build_network({"block": "basic", "depths": [1], "base": 4, "width": 0.5}, 2)
    unit, pruned = wide.layer1[0], thin.layer1[0]
    with torch.no_grad():
        unit.bn1.weight.copy_(torch.tensor([-1.0, -3.0, 2.0, 1.0]))
        unit.bn1.running_mean.copy_(torch.arange(4.0))
        unit.conv2.weight.zero_()
        unit.conv2.weight[0, :, 0, 0] = torch.tensor([3.0, -1.0, 2.0, 1.0])
        unit.conv2.weight[1, 0, 2, 2] = -4.0  # 3 and 4: a norm of 5
    take_over_strongest(thin, wide)
    assert pruned.bn1.weight.tolist() == [-1, 2]
    assert pruned.bn1.running_mean.tolist() == [0, 2]
    assert torch.equal(pruned.conv1.weight, unit.conv1.weight[[0, 2]])
    assert torch.equal(pruned.conv2.weight, unit.conv2.weight[:, [0, 2]])


def test_units_that_the_teacher_lacks_stay_fresh():
    wide = trained("basic", width=4)
    deep = build_network({**FAMILIES["basic"], "depths": [2, 3]}, 5)
    fresh = {name: value.clone() for name, value in deep.state_dict().items()}
    take_over_strongest(deep, wide)
    counters = {name for name in fresh if name.endswith("num_batches_tracked")}
    kept = {name for name, value in deep.state_dict().items() if torch.equal(value, fresh[name])} - counters
    assert kept == {name for name in fresh if name.startswith(("layer1.1.", "layer2.2."))} - counters
