from statistics import mean

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from gowide_dist import build_network, load_recipe
from gowide_dist.insight.costs import memory_per_process, spent, training_macs, validation_macs
from gowide_dist.networks.teacher import Teacher
from gowide_dist.train.objectives import build_objective
from tests.fashion import chain

IMAGES = 1000


@pytest.fixture
def recipe(tmp_path):
    def load(networks=None, **imitate):
        values = chain(tmp_path)
        values["networks"] = networks or values["networks"]
        values["stages"]["imitate"] |= imitate
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return load_recipe(tmp_path / "job.yaml")

    return load


def test_by_hand(recipe):
    plain = recipe()
    thin, wide = plain.architectures["thin"], plain.architectures["wide"]
    one, both = (thin.macs(10, 28, blocks) for blocks in (1, 2))
    wide_one, wide_both = (wide.macs(10, 28, blocks) for blocks in (1, 2))
    whole, wide_whole = thin.macs(10, 28), wide.macs(10, 28)
    assert training_macs(plain.instances["teacher/wide"], plain, 10) == (wide_whole, 2 * wide_whole, 0)
    assert training_macs(plain.instances["distill/thin"], plain, 10) == (whole, 2 * whole, wide_whole)
    by_hand = {  # bottom-up: the mean of a phase on the first block and one on the second
        (): ((one + both) / 2, (2 * one + 2 * (both - one)) / 2, (wide_one + wide_both) / 2),
        (("inputs", "teacher"),): (both / 2, 2 * both / 2, (wide_one + wide_both) / 2),
        (("prefix", "trained"),): ((one + both) / 2, (2 * one + 2 * both) / 2, (wide_one + wide_both) / 2),
        (("order", "joint"), ("inputs", "teacher")): (both, 2 * both, wide_both),
    }
    for options, expected in by_hand.items():
        changed = recipe(**dict(options))
        assert training_macs(changed.instances["imitate/thin"], changed, 10) == expected
    assert validation_macs(plain.instances["teacher/wide"], plain, 10) == wide_whole
    assert validation_macs(plain.instances["imitate/thin"], plain, 10) == whole + wide_whole


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("options", [{"order": "joint", "inputs": "teacher"}, {"order": "joint"}, {}])
def test_what_runs_is_counted(recipe, block, options):
    """A student of fewer channels, whose blocks have linear transforms between: against PyTorch's own counter."""
    networks = {
        "thin": {"block": block, "depths": [1, 1], "base": 16, "channels": 0.5},
        "wide": {"block": block, "depths": [1, 1], "base": 16},
    }
    found = recipe(networks=networks, **options)
    instance = found.instances["imitate/thin"]
    thin, wide = (build_network(found.architectures[name], 10) for name in ("thin", "wide"))
    objective = build_objective(instance.stage, thin, Teacher(wide), seed=0)
    images, labels = torch.rand(1, 3, 28, 28), torch.zeros(1, dtype=torch.long)
    macs = training_macs(instance, found, 10)
    counted = []
    for phase in range(objective.num_phases):
        objective.begin_phase(phase)
        with FlopCounterMode(display=False) as counter:
            objective(images, labels)
        counted.append(counter.get_total_flops() / 2)
    assert macs.forward + macs.teacher == pytest.approx(mean(counted))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        objective.evaluate(images, labels)
    assert validation_macs(instance, found, 10) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
    memory = memory_per_process(instance, found, 10, share=1, num_threads=1)
    weights = sum(parameter.numel() for parameter in objective.parameters())
    assert memory.weights == 4 * (weights - wide.fc.weight.numel() - wide.fc.bias.numel())


def test_what_a_chain_has_spent(recipe):
    plain = recipe()
    macs = {key: training_macs(instance, plain, 10).total for key, instance in plain.instances.items()}
    total = spent("finetune/thin", plain, 10, IMAGES)
    assert (total.epochs, total.images) == (2 + 2 + 1, 5 * IMAGES)
    assert total.macs == IMAGES * (2 * macs["imitate/thin"] + 2 * macs["distill/thin"] + macs["finetune/thin"])
