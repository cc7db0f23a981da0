"""Numbers worked out by hand."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from gowide_dist import load_recipe
from gowide_dist.insight.assumed import data_size
from gowide_dist.insight.scale import Work, scale, stage_times, table
from gowide_dist.launch.profile import Device, Resources
from tests.command import gowide
from tests.fashion import chain, encode_part, write_job

ROOT = Path(__file__).parents[2]
# 1,000 images of 9 + 1 MFLOP: 10^10 operations; two devices a node of 10^8 operations a second.
WORK = Work(
    images=1000, student_flops=9e6, teacher_flops=1e6, validation_flops=2e8, gradient_bytes=1e6, checkpoint_bytes=3e6
)
NODES = Resources(processes_per_node=2, timeout_min=10**9)
DEVICE = Device(name="abacus", tflops=1e-4, efficiency=1, within_node_gb_s=0.01, between_nodes_gb_s=0.002, overlap=0.5,
                write_gb_s=0.001, start_s=5)  # fmt: skip


def times(num_nodes=1, batch_size=100, images_per_s=1e9, save_every_s=20, work=WORK, timeout_min=10**9, **device):
    nodes, device = NODES.model_copy(update={"timeout_min": timeout_min}), DEVICE.model_copy(update=device)
    return stage_times(work, nodes, device, num_nodes, batch_size, images_per_s, save_every_s)


def test_a_stage_on_one_node():
    stage = times()
    assert stage.compute == pytest.approx(10 * 50 * 1e7 / 1e8 + 1)  # ten steps; 0.2 GFLOP of validation on two devices
    assert stage.communication == pytest.approx(
        10 * (0.1 - 0.05)
    )  # half of 1 MB there and back over 10 MB/s, half hidden
    assert stage.data == 0
    assert stage.checkpoints == pytest.approx(2 * 3)  # after 20 and 40 s, 3 s each
    assert stage.restarts == 5  # the start


def test_a_ring():
    slow = {"overlap": 0.0, "work": WORK._replace(gradient_bytes=8e6)}
    assert times(within_node_gb_s=1, **slow).communication == pytest.approx(10 * 2 * 1 / 2 * 8e6 / 1e9)
    assert times(4, within_node_gb_s=1, between_nodes_gb_s=0.5, **slow).communication == pytest.approx(
        10 * 2 * 7 / 8 * 8e6 / 5e8
    )


def test_the_slowest_link_counts_and_the_backward_pass_hides_no_more_than_it_lasts():
    step = 2 * 3 / 4 * 1e6 / 2e6  # 0.75 s, of which 0.375 could be hidden; the backward pass lasts 6 MFLOP, 0.06 s
    assert times(2, batch_size=4).communication == pytest.approx(250 * (step - 0.06))


def test_a_stage_that_waits_for_data():
    assert times(images_per_s=10).data == pytest.approx(10 * (100 / 10 - 5 - 0.05))


def test_restarts_lose_half_a_checkpoint_interval():
    stage = times(timeout_min=1)  # 57.5 s of work with the start fit, with a third of the checkpoints they do not
    assert stage.restarts == 5 + 15
    assert times(timeout_min=2).restarts == 5


def test_twice_the_nodes_halve_the_time_where_nothing_else_counts():
    ideal = {
        "within_node_gb_s": 1e30,
        "between_nodes_gb_s": 1e30,
        "start_s": 0,
        "save_every_s": 1e9,
        "batch_size": 1024,
    }
    one, two, many = (sum(times(nodes, **ideal)) for nodes in (1, 2, 64))
    assert one == pytest.approx(2 * two) == pytest.approx(64 * many)


def test_a_chain(tmp_path):
    recipe = load_recipe(ROOT / "jobs" / "imagenet_rn50.yaml", ["data.train=away/imagenet/train.beton"])
    assumptions, rows = scale(recipe, data_size(recipe))
    assert [row.num_nodes for row in rows] == [1, 2, 4, 8, 16, 32]
    assert all(a.hours > b.hours and a.efficiency > b.efficiency for a, b in pairwise(rows))
    assert all(row.device_hours > row.hours * row.num_nodes * 8 for row in rows)  # the longest path is not all
    assert (rows[0].bound, rows[0].batch_per_device) == ("compute", 32)
    assert "32 nodes are the most" in assumptions["batch"]
    assert "fewer than 32 images a device" in table(assumptions, rows)


def test_as_json(tmp_path):
    job = write_job(tmp_path, chain(encode_part(tmp_path, 180, 60)))
    shown = gowide("plan", job, "--scale", "--json")
    assert shown.returncode == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert list(result) == ["assumptions", "nodes"]
    assert list(result["nodes"][0]) == ["num_nodes", "batch_per_device", "hours", "device_hours", "efficiency", "bound"]
