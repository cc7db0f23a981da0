import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from gowide_dist import build_network
from gowide_dist.networks.architecture import Architecture

architectures = st.builds(
    Architecture,
    block=st.sampled_from(["basic", "bottleneck"]),
    depths=st.lists(st.integers(1, 2), min_size=1, max_size=4).map(tuple),
    base=st.sampled_from([4, 8, 12]),
    width=st.sampled_from([0.25, 0.5, 1.0, 1.5, 4.0]),
    channels=st.sampled_from([0.5, 1.0, 1.3]),
    stem=st.sampled_from(["small", "strided", "imagenet"]),
)


def test_counts_of_the_papers_networks():
    resnet50 = Architecture.model_validate({"arch": "resnet50"})
    assert resnet50.num_parameters(1000) == 25_557_032  # torchvision's table
    assert resnet50.macs(1000, 224) == 4_089_184_256  # 4.09 GMACs, torchvision's table
    wide = resnet50.widened(4)
    assert wide.num_parameters(1000) == 223_439_144  # 223.4 million and 37.1 GMACs, the paper's WRN-50-4
    assert wide.macs(1000, 224) == 37_113_823_232
    assert Architecture.model_validate({"arch": "resnet50", "width": 0.5}).widened(8) == wide


def test_macs_by_hand():
    tiny = Architecture(block="basic", depths=(1, 1), base=2, width=1.5, stem="small")
    # on 4x4 px: the stem 3 -> 2; block 1: 2 -> 3 -> 2; on 2x2 px block 2: 2 -> 6 -> 4 and its shortcut 2 -> 4
    stem = 3 * 2 * 9 * 16
    block1 = 2 * 3 * 9 * 16 * 2
    block2 = 2 * 6 * 9 * 4 + 6 * 4 * 9 * 4 + 2 * 4 * 4
    assert tiny.macs(num_classes=5, resolution=4) == stem + block1 + block2 + 4 * 5
    assert tiny.macs(num_classes=5, resolution=4, num_blocks=1) == stem + block1


@settings(deadline=None, max_examples=30)
@given(architectures, st.integers(9, 40))
def test_arithmetic_is_that_of_the_built_network(architecture, resolution):
    network = build_network(architecture, num_classes=7).eval()
    assert architecture.num_parameters(7) == sum(parameter.numel() for parameter in network.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits, blocks = network(torch.zeros(1, 3, resolution, resolution))
    assert architecture.macs(7, resolution) == counter.get_total_flops() // 2
    assert logits.shape == (1, 7)
    assert tuple(block.shape[1] for block in blocks) == architecture.block_channels
    assert tuple(block.shape[2] for block in blocks) == architecture.block_sides(resolution)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_macs_of_the_first_blocks(num_blocks):
    architecture = Architecture(block="bottleneck", depths=(2, 1, 1), base=8, stem="strided")
    network = build_network(architecture, 10).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.blocks(torch.zeros(1, 3, 28, 28), num_blocks)
    assert architecture.macs(10, 28, num_blocks) == counter.get_total_flops() // 2
