"""Weights & Biases, in its offline mode: what it would send is read from its own files."""

import json
import sys
import time

import pytest

from gowide_dist.train.metrics import MetricsLog


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name, value in {"PROJECT": "thin", "MODE": "offline", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    folder = tmp_path / "demo" / "stages" / "teacher" / "wide"
    folder.mkdir(parents=True)
    return folder


def records(path):
    """What a W&B file holds. The process that writes it may end it a moment after `finish()` has come back."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    deadline = time.monotonic() + 20
    while True:
        store, found = DataStore(), []
        store.open_for_scan(str(path))
        while content := store.scan_data():
            found.append(Record.FromString(content))
        if found and found[-1].HasField("exit"):
            return found
        assert time.monotonic() < deadline, f"{path}: never ended"
        time.sleep(0.05)


def sent(folder):
    """Run ids and, in order, the history of all W&B runs that were begun in a stage's folder."""
    ids, names, history = set(), set(), []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for record in records(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                names.add((record.run.project, record.run.run_group, record.run.display_name))
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                history.append({name: json.loads(text) for name, text in items.items() if not name.startswith("_")})
    return ids, names, history


def trained(folder, start, steps):
    log = MetricsLog(folder / "metrics.jsonl", step=start)
    for step in steps:
        log.append("train", step, {"loss": step / 4})
    return log


def test_one_run_per_stage_and_no_step_twice(offline):
    killed = trained(offline, 0, [5, 10, 15])  # never closed
    killed._mirror._run.finish()  # its files are whole, which a kill does not promise
    killed_again = trained(offline, 10, [12])
    killed_again.close()
    log = trained(offline, 10, [12, 15, 20])
    log.append("val", 20, {"top1": 90.0})
    log.close()
    ids, names, history = sent(offline)
    assert len(ids) == 1
    assert names == {("thin", "demo", "demo/teacher/wide")}
    assert [(row["step"], row.get("train/loss"), row.get("val/top1")) for row in history] == [
        (5, 1.25, None), (10, 2.5, None), (15, 3.75, None), (20, 5.0, None), (20, None, 90.0),
    ]  # fmt: skip


def test_what_was_trained_before_it_was_asked_for_is_sent_too(offline, monkeypatch):
    with monkeypatch.context() as without:
        without.delenv("WANDB_PROJECT")
        trained(offline, 0, [5, 10, 15]).close()
    assert not (offline / "wandb.json").exists()
    trained(offline, 10, [15]).close()
    assert [row["step"] for row in sent(offline)[2]] == [5, 10, 15]


def test_trouble_is_one_warning(offline, monkeypatch, capfd):
    (offline / "wandb.json").write_text("{")
    trained(offline, 0, [5]).close()
    warning = capfd.readouterr().err
    assert warning.count("Weights & Biases failed") == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    trained(offline, 5, [10]).close()
    assert "pip install 'gowide_dist[wandb]'" in capfd.readouterr().err
    assert [json.loads(line)["step"] for line in (offline / "metrics.jsonl").read_text().splitlines()] == [5, 10]
