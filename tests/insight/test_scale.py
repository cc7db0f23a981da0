"""Numbers worked out by hand."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from gowide_dist import load_recipe
from gowide_dist.insight import scale
from gowide_dist.insight.assumed import DataSize, data_size
from gowide_dist.insight.scale import scale_nodes, scale_table, stage_seconds
from gowide_dist.launch.profile import Device, Resources
from gowide_dist.train.costs import MacsPerImage, StageCost
from tests.command import gowide
from tests.fashion import chain, encode_part, write_job

ROOT = Path(__file__).parents[2]
# 1,000 images of 9 + 1 MFLOP: 10^10 operations; two devices a node of 10^8 operations a second.
MACS = MacsPerImage(forward=1.5e6, backward=3e6, teacher=0.5e6)
COST = StageCost(
    MACS, MacsPerImage(1e5, 0, 0), weights=375_000, trained=250_000, teacher_weights=0, activations=0, transient=0
)
SIZE = DataSize(train=1000, val=1000, classes=10, jpegs=False, source="")
DEVICE = Device(name="abacus", tflops=1e-4, efficiency=1, within_node_gb_s=0.01, between_nodes_gb_s=0.002, overlap=0.5,
                write_gb_s=0.001, start_s=5)  # fmt: skip


@pytest.fixture
def times(monkeypatch, tmp_path):
    job = write_job(tmp_path, chain(tmp_path))

    def seconds(num_nodes=1, batch_size=100, save_every_s=20, cost=COST, timeout_min=10**9, **device):
        monkeypatch.setattr(scale, "training_macs", lambda *_: cost.macs)
        monkeypatch.setattr(scale, "stage_cost", lambda *_: cost)
        recipe = load_recipe(job, [f"batch_size={batch_size}", f"checkpoints.every_minutes={save_every_s / 60}"])
        nodes = Resources(processes_per_node=2, timeout_min=timeout_min, signal_delay_s=1, device=DEVICE)
        nodes = nodes.model_copy(update={"device": DEVICE.model_copy(update=device)})
        return stage_seconds(recipe.instances["finetune/thin"], recipe, SIZE, nodes, num_nodes)

    return seconds


def test_a_stage_on_one_node(times):
    stage = times()
    assert stage["compute"] == pytest.approx(10 * 50 * 1e7 / 1e8 + 1)  # ten steps; 0.2 GFLOP of validation
    # half of 1 MB there and back over 10 MB/s, half hidden
    assert stage["communication"] == pytest.approx(10 * (0.1 - 0.05))
    assert stage["data"] == 0
    assert stage["checkpoints"] == pytest.approx(2 * 3)  # after 20 and 40 s, 3 s each
    assert stage["restarts"] == 5  # the start


def test_a_ring(times):
    slow = {"overlap": 0.0, "cost": COST._replace(trained=2_000_000)}
    assert times(within_node_gb_s=1, **slow)["communication"] == pytest.approx(10 * 2 * 1 / 2 * 8e6 / 1e9)
    four = times(4, within_node_gb_s=1, between_nodes_gb_s=0.5, **slow)
    assert four["communication"] == pytest.approx(10 * 2 * 7 / 8 * 8e6 / 5e8)


def test_the_slowest_link_counts_and_the_backward_pass_hides_no_more_than_it_lasts(times):
    step = 2 * 3 / 4 * 1e6 / 2e6  # 0.75 s, of which 0.375 could be hidden; the backward pass lasts 6 MFLOP, 0.06 s
    assert times(2, batch_size=4)["communication"] == pytest.approx(250 * (step - 0.06))


def test_a_stage_that_waits_for_data(times):
    assert times(images_per_s_per_cpu=5)["data"] == pytest.approx(10 * (100 / 10 - 5 - 0.05))


def test_restarts_lose_half_a_checkpoint_interval(times):
    stage = times(timeout_min=1)  # 57.5 s of work with the start fit, with a third of the checkpoints they do not
    assert stage["restarts"] == 5 + 15
    assert times(timeout_min=2)["restarts"] == 5


def test_twice_the_nodes_halve_the_time_where_nothing_else_counts(times):
    ideal = {"within_node_gb_s": 1e30, "between_nodes_gb_s": 1e30, "start_s": 0, "save_every_s": 1e9, "batch_size": 500}
    one, two, many = (sum(times(nodes, **ideal).values()) for nodes in (1, 2, 64))
    assert one == pytest.approx(2 * two) == pytest.approx(64 * many)


def test_a_chain(tmp_path):
    recipe = load_recipe(ROOT / "jobs" / "imagenet_rn50.yaml", ["data.train=away/imagenet/train.beton"])
    assumptions, rows = scale_nodes(recipe, data_size(recipe), None)
    assert [row["num_nodes"] for row in rows] == [1, 2, 4, 8, 16, 32]
    assert all(a["hours"] > b["hours"] and a["efficiency"] > b["efficiency"] for a, b in pairwise(rows))
    assert all(row["device_hours"] > row["hours"] * row["num_nodes"] * 8 for row in rows)  # the longest path is not all
    assert (rows[0]["bound"], rows[0]["batch_per_device"]) == ("compute", 32)
    assert "32 nodes are the most" in assumptions["batch"]
    assert "fewer than 32 images per device" in scale_table(assumptions, rows)


def test_as_json(tmp_path):
    job = write_job(tmp_path, chain(encode_part(tmp_path, 180, 60)))
    shown = gowide("plan", job, "--scale", "--json")
    assert shown.returncode == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert list(result) == ["assumptions", "nodes"]
    assert list(result["nodes"][0]) == ["num_nodes", "batch_per_device", "hours", "device_hours", "efficiency", "bound"]
