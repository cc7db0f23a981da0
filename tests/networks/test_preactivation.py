"""Wide residual networks of CIFAR, against a reference of their own."""

import pytest
import torch
import torch.nn.functional as F

from gowide_dist import build_network
from gowide_dist.errors import RecipeError
from gowide_dist.networks.teacher import Teacher

WRN = {"block": "basic", "depths": [6, 6, 6], "stem": "small", "stem_channels": 16, "pre_activation": True}
FAMILIES = {
    "basic": {
        "block": "basic",
        "depths": [2, 1, 2],
        "base": 4,
        "stem": "small",
        "stem_channels": 6,
        "pre_activation": True,
    },
    "bottleneck": {"block": "bottleneck", "depths": [1, 2], "base": 4, "stem": "imagenet", "pre_activation": True},
}


def reference(weights, images, num_units):
    """WRN-d-k in eval mode from its definition (Zagoruyko and Komodakis 2016, table 1), on the public names."""

    def activated(name, x):
        norm = (weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *norm))

    x = F.conv2d(images, weights["conv1.weight"], padding=1)
    for group in (1, 2, 3):
        for unit in range(num_units):
            name = f"block{group}.layer.{unit}"
            stride = 2 if group > 1 and unit == 0 else 1
            y = activated(f"{name}.bn1", x)
            if f"{name}.convShortcut.weight" in weights:
                x = F.conv2d(y, weights[f"{name}.convShortcut.weight"], stride=stride)
            y = F.conv2d(y, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(activated(f"{name}.bn2", y), weights[f"{name}.conv2.weight"], padding=1)
            x = x + y
    x = activated("bn1", x)
    return F.linear(F.avg_pool2d(x, 8).flatten(1), weights["fc.weight"], weights["fc.bias"])


def perturbed(network):
    """In eval mode, with norms as after some training."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.eval()


@pytest.mark.parametrize(("base", "parameters"), [(32, 2_255_156), (16, 569_780)], ids=["WRN-40-2", "WRN-40-1"])
def test_cifars_pair(base, parameters):
    network = perturbed(build_network({**WRN, "base": base}, 100)).double()
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert (
        sum(isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) for module in network.modules()) == 37
    )
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    logits, blocks = network(images)
    expected = reference(network.state_dict(), images, 6)
    assert torch.allclose(logits, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    assert [block.shape[1:] for block in blocks] == [(base, 32, 32), (2 * base, 16, 16), (4 * base, 8, 8)]


@pytest.mark.parametrize("family", FAMILIES)
def test_walking_the_blocks_is_the_forward_pass_and_a_teacher_answers_alike(family):
    network = perturbed(build_network(FAMILIES[family], 5))
    images = torch.randn(2, 3, 32, 32)
    logits, blocks = network(images)
    x, owned = images, set()
    for index, block in enumerate(blocks):
        x = network.block(index, x)
        assert torch.equal(x, block)
        own = {id(p) for module in network.block_modules(index) for p in module.parameters()}
        assert not own & owned
        owned |= own
    assert torch.equal(network.head(x), logits)
    assert owned == {id(p) for name, p in network.named_parameters() if not name.startswith("fc")}
    teacher = Teacher(network)
    scale = float(logits.detach().abs().max())
    assert torch.allclose(teacher.logits(images), logits, rtol=1e-4, atol=1e-5 * scale)
    left = sum(isinstance(module, torch.nn.BatchNorm2d) for module in teacher._network.modules())
    assert left == sum(FAMILIES[family]["depths"]) + 1  # those before the units, which read sums, and the last


def test_a_unit_without_a_last_norm_has_none_to_zero():
    with pytest.raises(
        RecipeError, match="network: zero_init_residual: is of the norm that ends a unit, which pre_act"
    ):
        build_network({**WRN, "zero_init_residual": True}, 10)
