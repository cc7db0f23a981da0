"""Costs that PyTorch counts, against published numbers, numbers by hand, and a real step."""

from statistics import mean

import pytest
import torch
import torchvision
import yaml
from torch.utils.flop_counter import FlopCounterMode

from gowide_dist import build_network, load_recipe
from gowide_dist.networks.architecture import Architecture
from gowide_dist.networks.teacher import Teacher
from gowide_dist.timeline import Batching
from gowide_dist.train.costs import (
    memory_per_process,
    network_cost,
    spent,
    stage_cost,
    training_macs,
)
from gowide_dist.train.objectives import build_objective
from tests.fashion import chain

IMAGES = 1000
STEM = 3 * 4 * 9 * 14 * 14  # multiply-adds of the stem of `thin`, whose input needs no gradient


@pytest.fixture
def recipe(tmp_path):
    def load(networks=None, overrides=(), **imitate):
        values = chain(tmp_path)
        values["networks"] = networks or values["networks"]
        values["stages"]["imitate"] |= imitate
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return load_recipe(tmp_path / "job.yaml", overrides)

    return load


def test_counts_of_the_papers_networks():
    resnet50 = Architecture.model_validate({"arch": "resnet50"})
    assert network_cost(resnet50, 1000, 224) == (25_557_032, 4_089_184_256)  # 4.09 GMACs, torchvision's table
    wide = resnet50.widened(4)
    assert network_cost(wide, 1000, 224) == (223_439_144, 37_113_823_232)  # the paper's WRN-50-4: 223.4 M, 37.1 GMACs


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenet_v2"])
def test_counts_of_torchvisions_networks(arch):
    weights = torchvision.models.get_model_weights(arch).IMAGENET1K_V1.meta
    cost = network_cost(build_network({"arch": arch}, 1).architecture, 1000, 224)
    assert cost.parameters == weights["num_params"]
    assert cost.macs / 1e9 == pytest.approx(weights["_ops"], abs=6e-4)


def test_macs_by_hand():
    tiny = Architecture(block="basic", depths=(1, 1), base=2, width=1.5, stem="small")
    # on 4x4 px: the stem 3 -> 2; block 1: 2 -> 3 -> 2; on 2x2 px block 2: 2 -> 6 -> 4 and its shortcut 2 -> 4
    stem = 3 * 2 * 9 * 16
    block1 = 2 * 3 * 9 * 16 * 2
    block2 = 2 * 6 * 9 * 4 + 6 * 4 * 9 * 4 + 2 * 4 * 4
    assert network_cost(tiny, num_classes=5, resolution=4).macs == stem + block1 + block2 + 4 * 5


def test_gradients_of_grouped_convolutions_by_hand(recipe):
    """Two for each convolution, as many multiply-adds as its forward pass: a channel's filters read that channel alone."""
    mobile = {"arch": "mobilenet_v2", "channels": 0.1, "stem": "strided"}
    plain = recipe({"thin": mobile, "wide": {"widen": "thin", "by": 4}}, start="pruned", order="joint")
    wide, thin = (network_cost(plain.architectures[name], 10, 28).macs for name in ("wide", "thin"))
    stem = 3 * 8 * 9 * 14 * 14
    assert training_macs(plain.instances["teacher/wide"], plain, 10) == (wide, 2 * wide - stem, 0)
    head = 32 * 1280 * 4 + 1280 * 10  # 2x2 px, which an imitation leaves out
    assert training_macs(plain.instances["imitate/thin"], plain, 10).teacher == wide - head
    assert training_macs(plain.instances["imitate/thin"], plain, 10).forward == thin - head


def test_half_of_a_resnet50(tmp_path):
    values = chain(tmp_path, networks={"thin": {"arch": "resnet50", "width": 0.5}, "wide": {"widen": "thin", "by": 8}})
    values["data"] |= {"resolution": 224, "augment": {"crop": {}}, "center_crop": 0.875}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    plain = load_recipe(tmp_path / "job.yaml")
    cost = stage_cost(plain.instances["finetune/thin"], plain, 1000, num_images=32)
    assert cost.macs.forward / 1e9 == pytest.approx(1.822, abs=1e-3)
    assert cost.macs.total / 1e9 == pytest.approx(5.348, abs=1e-3)  # not 3 x: the stem's input needs no gradient
    assert cost.activations / 2**30 == pytest.approx(2.16, abs=0.01)  # without the images themselves


def test_by_hand(recipe):
    plain = recipe()
    thin, wide = (plain.architectures[name] for name in ("thin", "wide"))
    whole, wide_whole = (network_cost(architecture, 10, 28).macs for architecture in (thin, wide))
    (one, both), (wide_one, wide_both) = (macs_up_to_blocks(architecture) for architecture in (thin, wide))
    head = 32 * 10
    shortcut2 = 16 * 32 * 7 * 7  # of block 2, whose input needs no gradient either while the block below is frozen
    conv2 = 16 * 4 * 14 * 14
    assert training_macs(plain.instances["teacher/wide"], plain, 10) == (wide_whole, 2 * wide_whole - STEM, 0)
    assert training_macs(plain.instances["distill/thin"], plain, 10) == (whole, 2 * whole - STEM, wide_whole)
    known = training_macs(plain.instances["distill/thin"], plain, 10, teacher_runs=False)
    assert known == (whole, 2 * whole - STEM, 0)
    top = 2 * (both - one) - shortcut2 - conv2
    by_hand = {  # bottom-up: the mean of a phase on the first block and one on the second
        (): ((one + both) / 2, (2 * one - STEM + top) / 2, (wide_one + wide_both) / 2),
        (("inputs", "teacher"),): (both / 2, (2 * one - STEM + top) / 2, (wide_one + wide_both) / 2),
        (("prefix", "trained"),): ((one + both) / 2, (2 * one + 2 * both) / 2 - STEM, (wide_one + wide_both) / 2),
        (("order", "joint"), ("inputs", "teacher")): (both, 2 * one - STEM + top, wide_both),
    }
    for options, expected in by_hand.items():
        changed = recipe(**dict(options))
        assert training_macs(changed.instances["imitate/thin"], changed, 10) == expected, options
    assert stage_cost(plain.instances["teacher/wide"], plain, 10).validation == (wide_whole, 0, 0)
    assert stage_cost(plain.instances["imitate/thin"], plain, 10).validation == (whole, 0, wide_whole - head)


def macs_up_to_blocks(architecture):
    network = build_network(architecture, 10).eval()
    for num_blocks in (1, 2):
        with FlopCounterMode(display=False) as counter:
            network.blocks(torch.zeros(1, 3, 28, 28), num_blocks)
        yield counter.get_total_flops() / 2


def test_images_that_grow(recipe):
    crop = ["data.resolution=64", "data.augment={crop: {}}", "data.center_crop=1.0"]
    plain = recipe(overrides=crop)
    ramped = recipe(
        overrides=[*crop, "stages.finetune.ramp={start_px: 32, until_epoch: 1}", "stages.finetune.epochs=2"]
    )
    sides = [stage_cost(plain.instances["finetune/thin"], plain, 10, side=side).macs.forward for side in (32, 64)]
    assert training_macs(ramped.instances["finetune/thin"], ramped, 10).forward == mean(sides)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("options", [{"order": "joint", "inputs": "teacher"}, {"order": "joint"}, {}])
def test_what_runs_is_counted(recipe, block, options):
    """A student of fewer channels, whose blocks have linear transforms between: against a real step."""
    networks = {
        "thin": {"block": block, "depths": [1, 1], "base": 16, "channels": 0.5},
        "wide": {"block": block, "depths": [1, 1], "base": 16},
    }
    changed = recipe(networks=networks, **options)
    instance = changed.instances["imitate/thin"]
    thin, wide = (build_network(changed.architectures[name], 10) for name in ("thin", "wide"))
    objective = build_objective(instance.stage, thin, Teacher(wide))
    images, labels = torch.rand(2, 3, 28, 28), torch.zeros(2, dtype=torch.long)
    counted = []
    for phase in range(objective.num_phases):
        objective.begin_phase(phase)
        with FlopCounterMode(display=False) as counter:
            objective(images, labels)["loss"].backward()
        counted.append(counter.get_total_flops() / 4)
    cost = stage_cost(instance, changed, 10)
    assert cost.macs.total == pytest.approx(mean(counted))
    objective.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        objective.evaluate(images, labels)
    assert cost.validation.total == counter.get_total_flops() / 4
    assert cost.weights == sum(parameter.numel() for parameter in objective.parameters())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_activations_are_what_autograd_keeps(recipe, arch):
    changed = recipe(networks={"thin": {"arch": arch, "width": 0.5}, "wide": {"widen": "thin", "by": 2}},
                     overrides=["data.resolution=64", "data.augment={crop: {}}", "data.center_crop=1.0"])  # fmt: skip
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    network = build_network(changed.architectures["thin"], 10).to(memory_format=torch.channels_last)
    images = torch.zeros(4, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, _ = network(images)
        torch.nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    cost = stage_cost(changed.instances["finetune/thin"], changed, 10, num_images=4)
    assert sum(kept.values()) - images.nbytes == pytest.approx(cost.activations, rel=0.02)


def test_memory_by_hand(recipe):
    changed = recipe(overrides=["stages.distill.optim.ema=0.9", "stages.distill.optim.accumulate=3"])
    thin, wide = (network_cost(changed.architectures[name], 10, 28).parameters for name in ("thin", "wide"))
    instance, batching = changed.instances["distill/thin"], Batching(60, num_processes=2, accumulate=3)
    memory = memory_per_process(instance, changed, 10, batching, num_threads=2, saves=True)
    weights = 4 * thin
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (weights, weights, 2 * weights)
    # what convolutions write, by hand: the stem 4 x 14^2; a unit of 4 planes, 2 inside, at 14; one of 8 and 4 at 7
    outputs = 4 * 196 + (2 + 2 + 16 + 16) * 196 + 4 * 196 + 4 * 49 + 32 * 49 + 32 * 49
    norms = 2 * (4 + 2 + 2 + 16 + 16 + 4 + 4 + 32 + 32)  # each keeps a mean and a deviation
    # what ReLUs write, in place of the norm or of the sum before them: the stem's, and three in each unit
    relus = 4 * 196 + (2 + 2 + 16) * 196 + 4 * 196 + 4 * 49 + 32 * 49
    of_images = 10 * 4 * (outputs + relus)
    assert memory["activations"] == pytest.approx(of_images + 4 * norms, rel=0.01)
    assert memory["teacher"] == 4 * wide
    assert memory["images"] == 30 * 3 * 28 * 28 * 5
    assert memory["loader"] == 2 * 5 * 30 * 3 * 28 * 28
    assert memory["checkpoint"] == 1.5 * 3 * weights
    on_gpu = memory_per_process(instance, changed, 10, batching, num_threads=2, on_gpu=True, teacher_runs=False)
    assert (on_gpu["heap"], on_gpu["checkpoint"], on_gpu["teacher"]) == (0, 0, 0)
    imitate = memory_per_process(changed.instances["imitate/thin"], changed, 10, batching, num_threads=2)
    network = build_network(changed.architectures["thin"], 10)
    assert imitate["gradients"] == 4 * sum(
        parameter.numel() for parameter in network.layer(1).parameters()
    )  # the larger
    halves = changed.model_copy(update={"precision": "bf16"})
    assert memory_per_process(instance, halves, 10, batching, 2)["activations"] == memory["activations"] // 2


def test_what_a_chain_has_spent(recipe):
    plain = recipe()
    macs = {key: training_macs(instance, plain, 10).total for key, instance in plain.instances.items()}
    total = spent("finetune/thin", plain, 10, IMAGES)
    assert (total.epochs, total.images) == (2 + 2 + 1, 5 * IMAGES)
    assert total.macs == IMAGES * (2 * macs["imitate/thin"] + 2 * macs["distill/thin"] + macs["finetune/thin"])
