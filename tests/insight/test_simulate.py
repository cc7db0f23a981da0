"""Numbers worked out by hand."""

import math

import pytest
from gowide_dist.insight.simulate import (
    Cluster,
    Work,
    all_reduce_s,
    longest_path,
    restarts,
    simulate,
    stage_times,
    step_s,
)

# 1,000 images of 9 + 1 MFLOP: 10^10 operations; two devices a node of 10^8 operations a second.
WORK = Work(
    images=1000, student_flops=9e6, teacher_flops=1e6, validation_flops=2e8, gradient_bytes=1e6, checkpoint_bytes=3e6
)
CLUSTER = Cluster(
    devices_per_node=2, device_flops=1e8, within_node_bytes_s=1e7, between_nodes_bytes_s=2e6, overlap=0.5,
    images_s_per_node=1e9, write_bytes_s=1e6, start_s=5, timeout_s=1e9, checkpoint_every_s=20,
)  # fmt: skip


def test_a_ring():
    assert all_reduce_s(1e9, 1, 1e9) == 0
    assert all_reduce_s(1e9, 2, 1e9) == 1  # half of it there, half of it back
    assert all_reduce_s(8e9, 8, 2e9) == 7


def test_a_step_on_one_node():
    step = step_s(WORK, CLUSTER, num_nodes=1, batch_size=100)
    assert step.compute == pytest.approx(50 * 1e7 / 1e8)  # 5 s
    assert step.communication == pytest.approx(0.1 - 0.05)  # 1 MB over 10 MB/s, half of it hidden
    assert step.data == 0


def test_the_slowest_link_counts_and_the_backward_pass_hides_no_more_than_it_lasts():
    step = step_s(WORK, CLUSTER, num_nodes=2, batch_size=4)
    assert step.compute == pytest.approx(0.1)
    ring = 2 * 3 / 4 * 1e6 / 2e6  # 0.75 s, of which 0.375 could be hidden; the backward pass lasts 6 MFLOP, 0.06 s
    assert step.communication == pytest.approx(ring - 0.06)


def test_a_step_that_waits_for_data():
    slow = CLUSTER._replace(images_s_per_node=10)
    assert step_s(WORK, slow, 1, 100).data == pytest.approx(100 / 10 - 5 - 0.05)
    assert simulate({"a": WORK}, slow._replace(images_s_per_node=5), 1, 100).bound == "data"


@pytest.mark.parametrize(
    ("work", "timeout", "lost", "times"),
    [(10, 10, 2, 0), (11, 10, 2, 1), (18, 10, 2, 1), (19, 10, 2, 2), (26, 10, 2, 2), (11, 10, 10, math.inf)],
)  # fmt: skip
def test_restarts(work, timeout, lost, times):
    assert restarts(work, timeout, lost) == times
    if times and times < math.inf:  # it fits into so many allocations and into none fewer
        assert work + times * lost <= (times + 1) * timeout
        assert work + (times - 1) * lost > times * timeout


def test_a_stage():
    times = stage_times(WORK, CLUSTER, 1, 100)
    assert times.compute == pytest.approx(10 * 5 + 1)  # ten steps, and 0.2 GFLOP of validation on both devices
    assert times.communication == pytest.approx(0.5)
    assert times.checkpoints == pytest.approx(2 * 3)  # after 20 and 40 s, 3 s each
    assert times.restarts == 5  # the start
    limited = stage_times(WORK, CLUSTER._replace(timeout_s=40), 1, 100)
    # 62.5 s of work and the start; a restart loses 10 + 5 s, so 25 s of the next 40 are left: one restart
    assert limited.restarts == 5 + 15


def test_a_chain():
    works = {"teacher": WORK, "baseline": WORK, "imitate": WORK._replace(parents=("teacher",))}
    one = stage_times(WORK, CLUSTER, 1, 100).total
    result = simulate(works, CLUSTER, 1, 100)
    assert result.hours == pytest.approx(2 * one / 3600)
    assert result.device_hours == pytest.approx(3 * one * 2 / 3600)
    assert result.efficiency == pytest.approx(51 / one)
    assert (result.bound, result.batch_per_device) == ("compute", 50)
    assert simulate(works, CLUSTER._replace(between_nodes_bytes_s=1e4), 4, 100).bound == "communication"


def test_twice_the_nodes_halve_the_time_where_nothing_else_counts():
    ideal = CLUSTER._replace(within_node_bytes_s=1e30, between_nodes_bytes_s=1e30, start_s=0, checkpoint_every_s=1e9)
    hours = [simulate({"a": WORK}, ideal, nodes, 1024).hours for nodes in (1, 2, 64)]
    assert hours[0] == pytest.approx(2 * hours[1]) == pytest.approx(64 * hours[2])


def test_the_longest_path():
    parents = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"], "e": []}
    assert longest_path({"a": 1, "b": 5, "c": 2, "d": 1, "e": 6.5}, parents) == (["a", "b", "d"], 7)
    assert longest_path({}, {}) == ([], 0)
