"""`gowide eval`: every figure against a plain computation."""

import csv
import json
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from gowide_dist import load_model
from gowide_dist.data.loader import Loader
from gowide_dist.errors import DataError, RunError
from gowide_dist.insight.evaluate import NUM_BINS, calibration_error, evaluate, table
from gowide_dist.insight.trained import open_trained
from gowide_dist.run import Run
from gowide_dist.timeline import Batching
from tests.command import gowide, refused
from tests.fashion import encode_part


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """300 further validation images."""
    return encode_part(tmp_path_factory.mktemp("other"), 60, 300)


@pytest.fixture(scope="module")
def plain(finished_run):
    """Logits and labels of the run's validation images, from `load_model` as a user calls it."""
    data = finished_run.path.parents[1] / "data"
    info = json.loads((data / "dataset.json").read_text())
    mean, std = (np.array(info[name], np.float32) for name in ("mean", "std"))
    network = load_model(finished_run.path, "finetune")
    with closing(Loader(data / "val.beton", Batching(1000), train=False, resolution=28)) as loader:
        batch = next(iter(loader.batches()))
        images = torch.from_numpy((batch.images.numpy() / np.float32(255) - mean) / std).permute(0, 3, 1, 2)
        with torch.inference_mode():
            return network(images)[0], batch.labels.clone()


def test_every_figure(finished_run, plain):
    logits, labels = plain
    evaluation = evaluate(open_trained(finished_run.path, "finetune"))
    predicted = logits.argmax(1)
    assert evaluation["images"] == 1000
    assert evaluation["top1"] == pytest.approx(100 * (predicted == labels).float().mean().item())
    assert (
        evaluation["top1"]
        == pytest.approx(evaluation["top1_in_training"])
        == pytest.approx(finished_run.stage("finetune/thin").done.top1)
    )
    assert evaluation["top5"] == pytest.approx(finished_run.stage("finetune/thin").done.top5)
    assert evaluation["nll"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    by_hand = np.zeros((10, 10), int)
    for label, other in zip(labels.tolist(), predicted.tolist(), strict=True):
        by_hand[label, other] += 1
    assert evaluation["confusion"] == by_hand.tolist()
    assert evaluation["per_class_images"] == by_hand.sum(1).tolist()
    assert evaluation["per_class_top1"] == pytest.approx((100 * by_hand.diagonal() / by_hand.sum(1)).tolist())
    assert evaluation["balanced_top1"] == pytest.approx(np.mean(evaluation["per_class_top1"]))
    in_training = finished_run.stage("finetune/thin").done
    assert in_training.balanced_top1 == pytest.approx(evaluation["balanced_top1"]) != pytest.approx(in_training.top1)
    assert f"its mean over classes {evaluation['balanced_top1']:.2f} %" in table(evaluation)
    assert evaluation["classes"][6] == "Shirt"

    confidence = logits.double().softmax(1).amax(1)
    ece = 0.0
    for m in range(1, NUM_BINS + 1):
        inside = (confidence > (m - 1) / NUM_BINS) & (confidence <= m / NUM_BINS)
        if inside.any():
            hits = (predicted == labels)[inside].double().mean()
            ece += inside.double().mean().item() * abs(hits - confidence[inside].mean()).item()
    assert evaluation["ece"] == pytest.approx(100 * ece, rel=1e-3)


def test_calibration_by_hand():
    """Four images with confidence 80 %, three of them right; one with confidence 100 %, wrong."""
    logits = torch.tensor([[np.log(4), 0.0]] * 4 + [[0.0, 900.0]])
    error = calibration_error(logits, torch.tensor([0, 0, 0, 1, 0]))
    assert error == pytest.approx(100 * (4 * abs(0.75 - 0.8) + 1 * abs(0 - 1)) / 5)


def test_printed_and_written_evaluations_agree(finished_run, tmp_path):
    before = sorted(path for path in finished_run.path.rglob("*"))
    shown = gowide("eval", finished_run.path, "baseline/basic", "--out", tmp_path / "out", "--json")
    assert shown.returncode == 0, shown.stderr
    evaluation = json.loads(shown.stdout)
    assert (evaluation["stage"], evaluation["network"], evaluation["images"]) == ("baseline", "basic", 1000)
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == evaluation
    rows = list(csv.reader((tmp_path / "out" / "confusion.csv").open()))
    assert rows[0] == ["class", *evaluation["classes"]]
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == evaluation["confusion"]
    assert sorted(path for path in finished_run.path.rglob("*")) == before


def test_other_images(finished_run, other_data):
    trained = open_trained(finished_run.path, "finetune/thin")
    own = evaluate(trained)
    evaluation = evaluate(trained, other_data / "val.beton")
    assert (evaluation["images"], evaluation["top1_in_training"]) == (300, None)
    lines = table(evaluation).splitlines()
    assert lines[0].endswith(f"on 300 images of {other_data / 'val.beton'}")
    assert "in training" not in lines[1]
    assert f"({own['top1']:.2f} in training)" in table(own)
    assert "[red]pear" in table({**own, "classes": ("[red]pear", *own["classes"][1:])})


def test_table_of_many_classes(finished_run):
    accuracies = [100.0 - label for label in range(30)]
    many = {"classes": tuple(f"class {label}" for label in range(30)), "per_class_images": [100] * 30}
    confusion = torch.zeros(30, 30, dtype=torch.int64).tolist()
    evaluation = evaluate(open_trained(finished_run.path, "finetune"))
    lines = table({**evaluation, **many, "per_class_top1": accuracies, "confusion": confusion}).splitlines()
    assert lines[3].startswith("worst of 30 classes")
    assert [line.split()[1] for line in lines[4:]] == [str(label) for label in range(29, 19, -1)]


def test_data_of_other_classes_is_refused(finished_run, other_data, tmp_path):
    with pytest.raises(RunError, match="baseline is several networks; name one of baseline/thin, baseline/basic"):
        open_trained(finished_run.path, "baseline")
    with pytest.raises(RunError, match="baselin is not there; did you mean 'baseline'"):
        open_trained(finished_run.path, "baselin")
    data = tmp_path / "data"
    shutil.copytree(other_data, data)
    info = data / "dataset.json"
    info.write_text(info.read_text().replace("Sandal", "Clog"))
    line = refused("eval", finished_run.path, "finetune", "--data", data)
    others = f"other classes than those of finetune/thin in {finished_run.path}"
    assert line == f"{data / 'val.beton'}: {others}: class 5 is 'Clog' instead of 'Sandal'"
    info.write_text(info.read_text().replace(',\n    "Ankle boot"', "").replace("Clog", "Sandal"))
    with pytest.raises(DataError, match="class 9 is 'missing' instead of 'Ankle boot'"):
        evaluate(open_trained(finished_run.path, "finetune"), data / "val.beton")


def test_changed_weights_or_training_images_are_refused(finished_run, tmp_path):
    shutil.copytree(finished_run.path, tmp_path / "run")
    copy = Run(tmp_path / "run")
    weights = copy.stage("finetune/thin").model
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(RunError, match="weights missing or changed since training"):
        open_trained(copy.path, "finetune").network()
    values = yaml.safe_load(copy.recipe_path.read_text())
    values["data"]["train"] = str(encode_part(tmp_path, 60, 20) / "train.beton")
    copy.recipe_path.write_text(yaml.safe_dump(values))
    with pytest.raises(DataError, match="differs from the data that baseline/thin was trained on"):
        open_trained(copy.path, "baseline/thin")
