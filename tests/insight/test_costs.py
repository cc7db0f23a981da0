import pytest
import yaml

from gowide_dist import load_recipe
from gowide_dist.insight.costs import spent, training_macs, validation_macs
from tests.fashion import chain

IMAGES = 1000


@pytest.fixture
def recipe(tmp_path):
    def load(**imitate):
        values = chain(tmp_path)
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


def test_what_a_chain_has_spent(recipe):
    plain = recipe()
    macs = {key: training_macs(instance, plain, 10).total for key, instance in plain.instances.items()}
    total = spent("finetune/thin", plain, 10, IMAGES)
    assert (total.epochs, total.images) == (2 + 2 + 1, 5 * IMAGES)
    assert total.macs == IMAGES * (2 * macs["imitate/thin"] + 2 * macs["distill/thin"] + macs["finetune/thin"])
