import pytest
import torch
import torchvision

from gowide_dist import build_network
from gowide_dist.errors import RecipeError
from gowide_dist.networks.architecture import MobileArchitecture
from gowide_dist.networks.teacher import Teacher
from gowide_dist.networks.weights import check_weights, load_weights

SMALL = {"arch": "mobilenet_v2", "channels": 0.1, "stem": "strided"}


@pytest.mark.parametrize("channels", [0.35, 0.5, 1.0, 1.4])
def test_equals_torchvision(channels):
    torch.manual_seed(0)
    reference = torchvision.models.mobilenet_v2(num_classes=10, width_mult=channels, dropout=0.0)
    torch.manual_seed(0)
    network = build_network({"arch": "mobilenet_v2", "channels": channels}, 10)
    weights, expected = network.state_dict(), reference.state_dict()
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)  # initialised by the same draws
    images = torch.randn(2, 3, 64, 64)
    logits, blocks = network.train()(images)
    assert torch.allclose(logits, reference.train()(images), atol=1e-5)
    reference.load_state_dict(network.state_dict())
    network.load_state_dict(reference.state_dict())
    logits, blocks = network.eval()(images)
    assert torch.allclose(logits, reference.eval()(images), atol=1e-5)
    assert torch.equal(network.head(blocks[-1]), logits)


@pytest.mark.parametrize(("stem", "reductions"), [("small", (1, 1, 2, 4, 8)), ("strided", (2, 2, 4, 8, 16)), ("imagenet", (2, 4, 8, 16, 32))])  # fmt: skip
@pytest.mark.parametrize("channels", [0.1, 0.35])
def test_structure_is_that_of_the_built_network(stem, reductions, channels):
    thin = MobileArchitecture(arch="mobilenet_v2", channels=channels, width=0.5, stem=stem)
    assert thin.units[1][0].inner_channels == 3 * thin.units[1][0].in_channels
    wide = thin.widened(4)
    assert wide.units[1][0].inner_channels == 12 * wide.units[1][0].in_channels
    assert (wide.block_channels, wide.reductions) == (thin.block_channels, reductions)
    for architecture in (thin, wide):
        network = build_network(architecture, 7).eval()
        x = images = torch.randn(1, 3, 32, 32)
        for index, block in enumerate(network(images)[1]):
            x = network.block(index, x)
            assert torch.equal(x, block)
            assert x.shape[1:] == (architecture.block_channels[index], *[32 // reductions[index]] * 2)
        owned = [
            p for i in range(network.num_blocks) for module in network.block_modules(i) for p in module.parameters()
        ]
        above = [p for layer in network.head_layers for p in layer.parameters()]
        assert [*map(id, owned + above)] == [*map(id, network.parameters())]
        inside = [network.block_modules(i)[-1].conv[-2].in_channels for i in range(network.num_blocks)]
        assert tuple(inside) == architecture.inner_channels


def test_a_teacher_has_the_outputs_of_its_network():
    torch.manual_seed(0)
    network = build_network(SMALL, 5)
    images = torch.randn(8, 3, 32, 32)
    for _ in range(3):
        network(images)  # statistics that are not the initial ones
    teacher = Teacher(network.eval())
    logits, blocks = network(images)
    assert torch.allclose(teacher.logits(images), logits, rtol=1e-4, atol=1e-5)
    assert all(
        torch.allclose(*pair, rtol=1e-3, atol=1e-5) for pair in zip(teacher.blocks(images, 5), blocks, strict=True)
    )
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in teacher._network.modules())


@pytest.mark.parametrize("side", [14, 9])
@pytest.mark.parametrize("channels", [0.1, 0.5])
def test_gradients_in_channels_last(channels, side):
    """Right for few channels too: see `resnet.projection` for kernels that were not."""
    torch.manual_seed(0)
    network = build_network({**SMALL, "channels": channels, "stem": "small"}, 3)
    precise = build_network(network.architecture, 3).double()
    precise.load_state_dict(network.state_dict())
    network.to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, side, side)
    weights = torch.randn(side, side)
    (network(images.contiguous(memory_format=torch.channels_last))[1][1] * weights).sum().backward()
    (precise(images.double())[1][1] * weights.double()).sum().backward()
    for (name, own), expected in zip(network.named_parameters(), precise.parameters(), strict=True):
        if expected.ndim == 4 and expected.grad is not None:  # norms' cancel out, but for rounding
            tolerance = 1e-2 * float(expected.grad.abs().max())
            assert torch.allclose(own.grad.double(), expected.grad, rtol=1e-2, atol=tolerance), name


def test_weights_that_do_not_fit(tmp_path):
    path, network = tmp_path / "weights.pth", build_network(SMALL, 5)
    torch.save({"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, path)
    loaded = build_network(SMALL, 5)
    load_weights(path, loaded)
    assert torch.equal(loaded.classifier[1].weight, network.classifier[1].weight)
    load_weights(path, other := build_network(SMALL, 7), fresh_classifier=True)
    assert torch.equal(other.features[-1][0].weight, network.features[-1][0].weight)
    for values, classes, cause in [
        (SMALL, 7, "of 5 classes, here are 7; init: "),
        (SMALL | {"width": 2}, 5, r"of another width: features.2.conv.0.0.weight is \(48, 8, 1, 1\) there, \(96, 8, "),
        (
            {"block": "basic", "depths": [1]},
            5,
            "of another kind of network, which names its weights .*features.0.0.weight",
        ),
    ]:
        architecture = build_network(values, classes).architecture
        with pytest.raises(Exception, match=cause):
            check_weights(path, architecture, classes, fresh_classifier=False, prefix=None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arch": "mobilenet_v3"}, "no arch 'mobilenet_v3', did you mean 'mobilenet_v2'"),
        ({"arch": "mobilenet_v2", "depths": [1]}, "unknown key 'depths'"),
        ({"arch": "mobilenet_v2", "channels": 0.05}, r"channels: should be greater than or equal to 0\.1, not '0.05'"),
    ],
)
def test_a_bad_one_is_one_line(values, message):
    with pytest.raises(RecipeError, match=message):
        build_network(values, 10)
