from functools import partial

import pytest
import torch
import torchvision
from torch._dynamo.utils import counters

from gowide_dist import build_network
from gowide_dist.errors import RecipeError
from gowide_dist.networks.architecture import Architecture
from gowide_dist.networks.pruning import take_over
from gowide_dist.networks.teacher import Teacher


@pytest.mark.parametrize(
    ("architecture", "reference"),
    [
        ({"arch": "resnet18"}, torchvision.models.resnet18),
        ({"arch": "resnet50"}, torchvision.models.resnet50),
        ({"arch": "resnet50", "width": 2}, torchvision.models.wide_resnet50_2),
    ],
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_equals_torchvision(architecture, reference, mode):
    torch.manual_seed(0)
    reference = reference(num_classes=10)
    network = build_network(architecture, num_classes=10)
    network.load_state_dict(reference.state_dict())
    getattr(reference, mode)()
    getattr(network, mode)()
    images = torch.randn(2, 3, 64, 64)
    logits, blocks = network(images)
    assert torch.equal(logits, reference(images))
    assert len(blocks) == 4
    assert torch.equal(network.head(blocks[-1]), logits)


@pytest.mark.parametrize("side_px", [64, 224])
def test_channels_last_pools_to_the_same_bits_and_keeps_its_gradient_so(side_px):
    torch.manual_seed(0)
    network = build_network({"arch": "resnet18", "channels": 0.25}, 10)
    x = network.blocks(torch.randn(2, 3, side_px, side_px).to(memory_format=torch.channels_last))[-1].detach()
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(network.pool(x), network.avgpool(x).flatten(1))
    assert torch.equal(network.pool(x.contiguous()), network.avgpool(x.contiguous()).flatten(1))
    gradients = []
    x = x.requires_grad_() * 1
    x.register_hook(gradients.append)
    network.pool(x).sum().backward()
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)


def test_initialised_as_torchvision_does():
    torch.manual_seed(0)
    network = build_network({"arch": "resnet50", "zero_init_residual": True}, 1000)
    reference = torchvision.models.resnet50(zero_init_residual=True)
    expected = reference.state_dict()
    assert list(network.state_dict()) == list(expected)
    for name, weight in network.named_parameters():
        if weight.ndim == 4:  # drawn at random: equal in distribution
            spread = weight.std().item()
            assert spread == pytest.approx(expected[name].std().item(), rel=0.05), name
            assert abs(weight.mean().item()) < 5 * spread / weight.numel() ** 0.5, name
        elif weight.ndim == 1 and not name.startswith("fc"):
            assert torch.equal(weight, expected[name]), name
    assert not network.layer1[0].bn3.weight.any()


def test_walking_the_blocks_is_the_forward_pass():
    network = build_network({"block": "basic", "depths": [1, 2, 1], "base": 8, "stem": "strided"}, 5).eval()
    images = torch.randn(2, 3, 20, 20)
    logits, blocks = network(images)
    x = images
    for index, block in enumerate(blocks):
        x = network.block(index, x)
        assert torch.equal(x, block)
    assert torch.equal(network.head(x), logits)
    owned = {id(p) for i in range(3) for module in network.block_modules(i) for p in module.parameters()}
    assert owned == {id(p) for name, p in network.named_parameters() if not name.startswith("fc")}


@pytest.mark.parametrize("architecture", [{"arch": "resnet18"}, {"arch": "resnet50", "width": 2}])
def test_a_teacher_has_the_outputs_of_its_network(architecture):
    torch.manual_seed(0)
    network = build_network(architecture, 10)
    for _ in range(3):
        network(torch.randn(8, 3, 64, 64))  # statistics that are not the initial ones
    before = {name: value.clone() for name, value in network.state_dict().items()}
    teacher = Teacher(network)
    images = torch.randn(4, 3, 64, 64)
    logits, blocks = network.eval()(images)
    assert torch.allclose(teacher.logits(images), logits, rtol=1e-4, atol=1e-4)
    both = teacher.outputs(images)
    assert torch.equal(both[0], teacher.logits(images))
    assert all(map(torch.equal, both[1], teacher.blocks(images, 4)))
    for block, expected in zip(teacher.blocks(images, 3), blocks, strict=False):
        assert torch.allclose(block, expected, rtol=1e-3, atol=1e-4)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in teacher._network.modules())
    assert not teacher.logits(images).requires_grad
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_teacher_stops_at_the_block_that_is_needed():
    teacher = Teacher(build_network({"block": "bottleneck", "depths": [1, 1], "base": 8}, 5))
    ran = []
    teacher._network.layer2.register_forward_hook(lambda *_: ran.append("layer2"))
    assert len(teacher.blocks(torch.randn(4, 3, 32, 32), 1)) == 1
    assert ran == []


def test_within_the_cache_a_teacher_runs_once_per_tensor_of_images():
    """By object, not by value: a tensor that is gone never lends its outputs to another."""
    teacher = Teacher(build_network({"block": "basic", "depths": [1, 1], "base": 4}, 5))
    ran = []
    teacher._network.layer1.register_forward_hook(lambda *_: ran.append("layer1"))
    images = torch.randn(2, 3, 32, 32)
    with teacher.cached():
        assert teacher.logits(images) is teacher.logits(images)
        assert teacher.blocks(images, 1) is teacher.blocks(images, 1)
        assert len(ran) == 2  # logits are not blocks
        assert teacher.outputs(images) is teacher.outputs(images)
        assert len(ran) == 3
        for _ in range(10):
            teacher.logits(images.clone())
        assert len(ran) == 13
    assert teacher.logits(images) is not teacher.logits(images)


@pytest.mark.parametrize("architecture", [{"arch": "resnet50", "stem": "small"}, {"arch": "resnet18", "width": 0.5}])
def test_on_the_meta_device_a_teacher_has_shapes_and_no_values(architecture):
    with torch.device("meta"):
        network = build_network(architecture, 10)
    teacher = Teacher(network)
    assert {tensor.device.type for tensor in teacher._network.state_dict().values()} == {"meta"}
    images = torch.empty(2, 3, 64, 64, device="meta")
    assert teacher.logits(images).shape == (2, 10)
    assert [block.shape[1] for block in teacher.blocks(images, 4)] == list(network.architecture.block_channels)


def test_a_student_takes_over_every_weight_that_fits():
    """Networks that differ in `width` alone differ inside their units: three convolutions and the two norms between."""
    narrow = {"conv1", "bn1", "conv2", "bn2", "conv3"}
    thin, wide = (
        build_network({"block": "bottleneck", "depths": [1, 2], "base": 8, "width": width}, 10) for width in (0.5, 2)
    )
    for tensor in wide.state_dict().values():
        tensor.fill_(7)
    take_over(thin, wide)
    for name, tensor in thin.state_dict().items():
        owner = name.split(".")[-2]
        own = ("layer" in name and owner in narrow) or name.endswith("num_batches_tracked")
        assert bool((tensor == 7).all()) != own, name


def test_a_bad_architecture_is_one_line():
    with pytest.raises(RecipeError, match=r"network: unknown key 'widht', did you mean 'width'\?$"):
        build_network({"arch": "resnet50", "widht": 2}, 10)
    assert build_network(Architecture(block="basic", depths=(1,), base=4), 3).num_classes == 3


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_gradients_of_few_channels_in_channels_last(channels, num_threads):
    """oneDNN's weight gradient of a strided 1x1 convolution is garbage where they are fewer than its block."""
    torch.manual_seed(0)
    network = build_network({"block": "basic", "depths": [1, 1], "base": channels, "stem": "small"}, 3)
    precise = build_network(network.architecture, 3).double()
    precise.load_state_dict(network.state_dict())
    network.to(memory_format=torch.channels_last)
    images = torch.randn(64, 3, 14, 14)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        network(images.contiguous(memory_format=torch.channels_last))[1][-1].square().mean().backward()
        precise(images.double())[1][-1].square().mean().backward()
    finally:
        torch.set_num_threads(before)
    name = "layer2.0.downsample.0.weight"
    gradient, expected = (net.get_parameter(name).grad for net in (network, precise))
    assert torch.allclose(gradient.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_every_block_and_mode_is_compiled():
    """Also those of further networks: by default torch.compile stops after eight versions of all blocks together."""
    torch._dynamo.reset()
    counters["stats"].clear()
    images = torch.randn(2, 3, 16, 16)
    for _ in range(3):
        network = build_network({"block": "basic", "depths": [1, 1], "base": 8, "stem": "strided"}, 3)
        for index in range(network.num_blocks):
            network.layer(index).compile = partial(network.layer(index).compile, backend="eager")
        network.compile_blocks()
        for training in (True, False):
            network.train(training)(images)
            with torch.no_grad():
                network(images)
    assert counters["stats"]["unique_graphs"] == 3 * 2 * 4


def test_compiled_blocks_have_the_same_outputs():
    torch.manual_seed(0)
    network = build_network({"block": "basic", "depths": [1, 1], "base": 4, "stem": "strided"}, 3).eval()
    images = torch.randn(2, 3, 16, 16)
    logits, _ = network(images)
    names = list(network.state_dict())
    network.compile_blocks()
    assert torch.allclose(network(images)[0], logits, rtol=1e-4, atol=1e-5)
    assert list(network.state_dict()) == names
    assert torch.allclose(Teacher(network, compiled=True).logits(images), logits, rtol=1e-4, atol=1e-5)
