import json
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from gowide_dist.run import read_metrics
from gowide_dist.train.metrics import LossMeter, MetricsLog, StreamDigest, Throughput, mean_over_samples
from gowide_dist.world import join


@pytest.fixture
def world():
    with join() as alone:
        yield alone


def digest(world, steps, start="0"):
    stream = StreamDigest(start)
    for step, indices in steps:
        stream.add(step, torch.tensor(indices))
    stream.collect(world)
    return str(stream)


def test_the_digest_tells_which_samples_were_seen_when(world):
    whole = digest(world, [(0, [5, 1, 7, 3]), (1, [2, 0, 6, 4])])
    assert digest(world, [(0, [7, 3]), (1, [6, 4]), (0, [5, 1]), (1, [2, 0])]) == whole  # by two processes
    assert digest(world, [(1, [2, 0, 6, 4])], start=digest(world, [(0, [5, 1, 7, 3])])) == whole  # by a restart
    assert digest(world, [(0, [5, 1, 7, 4]), (1, [2, 0, 6, 3])]) != whole  # two samples at each other's step
    assert digest(world, [(0, [5, 1, 7, 3]), (1, [2, 0, 6, 6])]) != whole  # one twice, one never


def test_averages_of_an_interval(world):
    meter = LossMeter(step=10)
    for loss in (1.0, 2.0, 6.0):
        meter.add({"loss": torch.tensor(loss), "kl": torch.tensor(2 * loss)})
    assert meter.flush(world) == ({"loss": 3.0, "kl": 6.0}, None)


def test_throughput_counts_steps_and_the_wait_for_data():
    throughput = Throughput()
    for _ in range(4):
        with throughput.waiting():
            time.sleep(0.03)
        time.sleep(0.01)
    steps_per_s, data_wait = throughput.flush()
    assert 5 < steps_per_s <= 25
    assert 0.5 < data_wait < 1
    time.sleep(0.2)  # an evaluation, which counts for nothing
    with throughput.waiting():
        pass
    steps_per_s, data_wait = throughput.flush()
    assert steps_per_s > 20


def test_passes_over_a_batch_make_one_step(world):
    meter = LossMeter(step=0)
    for loss in (1.0, 3.0, 5.0, 9.0):
        meter.add({"loss": torch.tensor(loss), "kl": torch.tensor(2 * loss)}, num_passes=2)
    assert meter.flush(world) == ({"loss": 4.5, "kl": 9.0}, None)
    meter.add({"loss": torch.tensor(1.0)}, num_passes=2)
    meter.add({"loss": torch.tensor(float("nan"))}, num_passes=2)
    assert meter.flush(world)[1] == 3


def test_the_first_step_that_is_not_finite_is_named(world):
    meter = LossMeter(step=100)
    for loss in (1.0, float("nan"), float("inf")):
        meter.add({"loss": torch.tensor(loss)})
    assert meter.flush(world)[1] == 102


def test_means_weigh_every_sample_alike(world):
    one, other = ({"top1": torch.tensor(values)} for values in ([1.0, 0.0, 1.0], [0.0, 0.0, 0.0]))
    last = [{"top1": torch.tensor([0.0])}, {"top1": torch.tensor([1.0])}]
    assert mean_over_samples([[one, other], last], world) == [{"top1": 0.5}, {"top1": 0.25}]


def test_no_step_stands_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, step=0)
    for step in (5, 10, 15):
        log.append("train", step, {"loss": np.float64(1 / 3)})
    log.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "st')  # cut off by a kill
    log = MetricsLog(path, step=10)  # continued from a checkpoint at step 10
    log.append("train", 15, {"loss": 0.25})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(5, 0.333333), (10, 0.333333), (15, 0.25)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_the_clock_goes_on_where_the_kept_lines_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"kind": "train", "step": step, "loss": 1.0, "seconds": seconds} for step, seconds in ((5, 60), (10, 90))]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    log = MetricsLog(path, step=5)
    log.append("train", 10, {"loss": 0.5})
    log.close()
    assert 60 <= read_metrics(path)[-1]["seconds"] < 90


def train_twice(tmp_path):
    """Killed after step 15, continued from step 10."""
    log = MetricsLog(tmp_path / "metrics.jsonl", step=0)
    for step in (5, 10, 15):
        log.append("train", step, {"epoch": step / 10, "loss": 1 / step})
    log.close()
    log = MetricsLog(tmp_path / "metrics.jsonl", step=10)
    log.append("train", 15, {"epoch": 1.5, "loss": 0.25})
    log.append("val", 15, {"epoch": 1.5, "top1": 80.0})
    log.close()


def test_scalars_for_tensorboard(tmp_path):
    train_twice(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/epoch", "train/loss", "val/epoch", "val/top1"]
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10, 15]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([0.2, 0.1, 0.25])
    assert [(event.step, event.value) for event in events.Scalars("val/top1")] == [(15, 80.0)]


def test_event_files_hold_one_curve_also_for_readers_that_know_no_restarts(tmp_path):
    """Read as they are, without what TensorBoard makes of a restart: each step once, in order, later in time."""
    train_twice(tmp_path)
    paths = sorted((tmp_path / "tensorboard").iterdir())
    events = [event for path in paths for event in EventFileLoader(str(path)).Load() if event.summary.value]
    losses = [event for event in events if event.summary.value[0].tag == "train/loss"]
    assert [event.step for event in losses] == [5, 10, 15]
    assert [event.summary.value[0].tensor.float_val[0] for event in losses] == pytest.approx([0.2, 0.1, 0.25])
    assert [event.wall_time for event in events] == sorted(event.wall_time for event in events)


def test_a_tensorboard_that_runs_forgets_the_lost_continuation(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", step=0)
    for step in (5, 10, 15, 20):
        log.append("train", step, {"loss": 1.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    time.sleep(1.1)  # event files are named by the second
    log = MetricsLog(tmp_path / "metrics.jsonl", step=10)
    log.append("train", 12, {"loss": 2.0})
    log.close()
    points = [(event.step, event.value) for event in events.Reload().Scalars("train/loss")]
    assert points == [(5, 1.0), (10, 1.0), (12, 2.0)]
