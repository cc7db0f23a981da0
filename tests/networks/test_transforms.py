import pytest
import torch
from torch import nn

from gowide_dist import build_network
from gowide_dist.networks.transforms import linear_transform, merged

DEPTHS = {"depths": [2, 1, 2, 1], "base": 16}
FAMILIES = {
    "basic": {"block": "basic", **DEPTHS},
    "bottleneck": {"block": "bottleneck", **DEPTHS},
    "pre-activation": {"block": "basic", "pre_activation": True, "stem_channels": 8, **DEPTHS},
    "mobile": {"arch": "mobilenet_v2"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stem", ["small", "imagenet"])
@pytest.mark.parametrize("with_classifier", [True, False])
def test_merging_is_exact(family, stem, with_classifier):
    """The student with its transforms and the merged plain network: equal to 1e-10 in float64."""
    torch.manual_seed(0)
    shape = FAMILIES[family] | {"stem": stem}
    wide = build_network(shape, 7).double()
    student = build_network({**shape, "channels": 0.4}, 7).double()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after some training
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    student.eval()
    channels = list(zip(student.architecture.block_channels, wide.architecture.block_channels, strict=True))
    up = [linear_transform(c, wide_c).double() for c, wide_c in channels]
    down = [linear_transform(wide_c, c).double() for c, wide_c in channels[:-1]]
    images = torch.randn(3, 3, 40, 40, dtype=torch.double)

    x = student.block(0, images)
    for index in range(1, student.num_blocks):
        x = student.block(index, down[index - 1](up[index - 1](x)))
    wide.eval()
    expected = wide.head(up[-1](x)) if with_classifier else student.head(x)

    network = merged(student, up, down, wide.head_layers if with_classifier else None)
    assert (network(images)[0] - expected).abs().max() < 1e-10
    assert (student(images)[0] - expected).abs().max() > 1e-5  # there was something to merge
    assert network.architecture == student.architecture
    assert {name: value.shape for name, value in network.state_dict().items()} == {
        name: value.shape for name, value in student.state_dict().items()
    }
    assert not any(isinstance(module, nn.Conv2d) and module.bias is not None for module in network.modules())


def test_equal_channels_need_no_transform():
    assert isinstance(linear_transform(8, 8), nn.Identity)
    student = build_network({"block": "basic", "depths": [1, 1], "base": 8}, 5).eval()
    network = merged(student, [nn.Identity(), nn.Identity()], [nn.Identity()], None)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(images)[0], student(images)[0])
    assert network is not student


def test_merging_on_the_meta_device_leaves_no_values():
    with torch.device("meta"):
        student = build_network({"block": "basic", "depths": [1, 1], "base": 8, "channels": 0.5}, 5)
        up = [linear_transform(c, 2 * c) for c in student.architecture.block_channels]
        down = [linear_transform(2 * c, c) for c in student.architecture.block_channels[:-1]]
    network = merged(student, up, down, [nn.Linear(2 * student.architecture.block_channels[-1], 5, device="meta")])
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"meta"}
