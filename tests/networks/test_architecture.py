from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gowide_dist import build_network
from gowide_dist.errors import RecipeError
from gowide_dist.networks.architecture import Architecture

architectures = st.builds(
    Architecture,
    block=st.sampled_from(["basic", "bottleneck"]),
    depths=st.lists(st.integers(1, 2), min_size=1, max_size=4).map(tuple),
    base=st.sampled_from([4, 8, 12]),
    width=st.sampled_from([0.25, 0.5, 1.0, 1.5, 4.0]),
    channels=st.sampled_from([0.5, 1.0, 1.3]),
    stem=st.sampled_from(["small", "strided", "imagenet"]),
    stem_channels=st.sampled_from([None, 3]),
    pre_activation=st.booleans(),
)


def test_a_wide_network_is_a_thin_one_widened():
    resnet50 = Architecture.model_validate({"arch": "resnet50"})
    assert (resnet50.block, resnet50.depths) == ("bottleneck", (3, 4, 6, 3))
    assert resnet50.block_channels == (256, 512, 1024, 2048)
    assert resnet50.inner_channels == (64, 128, 256, 512)
    wide = resnet50.widened(4)
    assert wide.inner_channels == (256, 512, 1024, 2048)
    assert wide.block_channels == resnet50.block_channels
    assert Architecture.model_validate({"arch": "resnet50", "width": 0.5}).widened(8) == wide


@settings(deadline=None, max_examples=30)
@given(architectures, st.integers(9, 40))
def test_structure_is_that_of_the_built_network(architecture, resolution):
    network = build_network(architecture, num_classes=7).eval()
    with torch.no_grad():
        logits, blocks = network(torch.zeros(1, 3, resolution, resolution))
    assert logits.shape == (1, 7)
    assert tuple(block.shape[1] for block in blocks) == architecture.block_channels
    assert tuple(block.shape[2] for block in blocks) == tuple(
        ceil(resolution / each) for each in architecture.reductions
    )
    assert network.conv1.out_channels == architecture.first_channels
    middle = [network.layer(index)[0].conv1.out_channels for index in range(architecture.num_blocks)]
    assert tuple(middle) == architecture.inner_channels


@pytest.mark.parametrize(
    ("values", "message"),
    [({"arch": "resnet51"}, "no arch 'resnet51', did you mean 'resnet50'"), ({"arch": "resnet50", "depths": [1]}, "arch already says depths")],
)  # fmt: skip
def test_an_arch_that_is_unknown_or_said_twice(values, message):
    with pytest.raises(RecipeError, match=message):
        build_network(values, 10)
