"""`gowide eval`: every figure against a plain computation."""

import csv
import json
import os
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import transforms

from gowide_dist import load_model
from gowide_dist.data.encode import Options, encode
from gowide_dist.data.loader import Loader
from gowide_dist.errors import DataError, RunError
from gowide_dist.files import sha256
from gowide_dist.insight.evaluate import NUM_BINS, calibration_error, evaluate, table
from gowide_dist.insight.trained import open_trained
from gowide_dist.run import Run
from gowide_dist.timeline import Batching
from tests.command import gowide, refused
from tests.fashion import encode_part, write_job


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
    network = load_model(finished_run.path, "distill")
    with closing(Loader(data / "val.beton", Batching(1000), train=False, resolution=28)) as loader:
        batch = next(iter(loader.batches()))
        images = torch.from_numpy((batch.images.numpy() / np.float32(255) - mean) / std).permute(0, 3, 1, 2)
        with torch.inference_mode():
            return network(images)[0], batch.labels.clone()


def test_every_figure(finished_run, plain):
    logits, labels = plain
    evaluation = evaluate(open_trained(finished_run.path, "distill"))
    predicted = logits.argmax(1)
    assert evaluation["images"] == 1000
    assert evaluation["top1"] == pytest.approx(100 * (predicted == labels).float().mean().item())
    assert (
        evaluation["top1"]
        == pytest.approx(evaluation["top1_in_training"])
        == pytest.approx(finished_run.stage("distill/thin").done.top1)
    )
    assert evaluation["top5"] == pytest.approx(finished_run.stage("distill/thin").done.top5)
    assert evaluation["nll"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    by_hand = np.zeros((10, 10), int)
    for label, other in zip(labels.tolist(), predicted.tolist(), strict=True):
        by_hand[label, other] += 1
    assert evaluation["confusion"] == by_hand.tolist()
    assert evaluation["per_class_images"] == by_hand.sum(1).tolist()
    assert evaluation["per_class_top1"] == pytest.approx((100 * by_hand.diagonal() / by_hand.sum(1)).tolist())
    assert evaluation["balanced_top1"] == pytest.approx(np.mean(evaluation["per_class_top1"]))
    in_training = finished_run.stage("distill/thin").done
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
    trained = open_trained(finished_run.path, "distill/thin")
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
    evaluation = evaluate(open_trained(finished_run.path, "distill"))
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
    line = refused("eval", finished_run.path, "distill", "--data", data)
    others = f"other classes than those of distill/thin in {finished_run.path}"
    assert line == f"{data / 'val.beton'}: {others}: class 5 is 'Clog' instead of 'Sandal'"
    info.write_text(info.read_text().replace(',\n    "Ankle boot"', "").replace("Clog", "Sandal"))
    with pytest.raises(DataError, match="class 9 is 'missing' instead of 'Ankle boot'"):
        evaluate(open_trained(finished_run.path, "distill"), data / "val.beton")


def test_changed_weights_are_refused_and_older_ones_need_their_data(finished_run, tmp_path):
    shutil.copytree(finished_run.path, tmp_path / "run")
    copy = Run(tmp_path / "run")
    weights = copy.stage("distill/thin").model
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(RunError, match="weights missing or changed since training"):
        open_trained(copy.path, "distill").network()
    own = open_trained(copy.path, "baseline/thin").preprocessing
    stage_dir, older = copy.stage("baseline/thin"), copy.stage("baseline/thin").model
    save_file(load_file(older), older)  # without metadata
    stage_dir.finish(stage_dir.done.model_copy(update={"model_sha256": sha256(older)}))
    assert open_trained(copy.path, "baseline/thin").preprocessing == own
    values = yaml.safe_load(copy.recipe_path.read_text())
    values["data"]["train"] = str(encode_part(tmp_path, 60, 20) / "train.beton")
    copy.recipe_path.write_text(yaml.safe_dump(values))
    assert open_trained(copy.path, "baseline/basic").preprocessing.mean == own.mean
    with pytest.raises(DataError, match="differs from the data that baseline/thin was trained on"):
        open_trained(copy.path, "baseline/thin")
    values["data"]["train"] = str(tmp_path / "gone" / "train.beton")
    copy.recipe_path.write_text(yaml.safe_dump(values))
    assert load_model(copy.path, "baseline", "thin").preprocessing is None


@pytest.fixture(scope="module")
def photos(finished_run, tmp_path_factory):
    """Validation images as files, some of other sizes: three of the ten classes have a folder, one of them is empty."""
    folder = tmp_path_factory.mktemp("photos")
    beton = finished_run.path.parents[1] / "data" / "val.beton"
    with closing(Loader(beton, Batching(200), train=False, resolution=28)) as loader:
        batch = next(iter(loader.batches()))
        for name, label in (("Sandal", 5), ("Bag", 8)):
            (folder / name).mkdir()
            for index in np.flatnonzero(batch.labels.numpy() == label)[:20]:
                image = Image.fromarray(batch.images[index].numpy())
                image = image.resize((45 + index % 30, 61)) if index % 2 else image
                image.save(folder / name / f"{index}.{'jpg' if index % 3 else 'png'}")
    (folder / "Coat").mkdir()
    return folder


def test_a_copied_run_is_enough(moved, finished_run, other_data):
    own = open_trained(finished_run.path, "distill")
    trained = open_trained(moved, "distill")
    assert trained.preprocessing == own.preprocessing
    assert (
        evaluate(trained, other_data / "val.beton")["confusion"] == evaluate(own, other_data / "val.beton")["confusion"]
    )
    line = refused("eval", moved, "distill")
    assert line == "/nowhere/data/val.beton: not found here; `gowide eval` takes other images by --data or --images"
    shown = gowide("report", moved)
    assert shown.returncode == 0, shown.stderr


def test_a_plain_folder_of_images(moved, photos, tmp_path):
    """By Pillow, as torchvision's own pipeline prepares them; by name, whatever classes are absent."""
    photos = shutil.copytree(photos, tmp_path / "photos")
    (photos / "Bag" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(next((photos / "Bag").glob("*.jpg")).read_bytes())
    shown = gowide("eval", moved, "distill", "--images", photos, "--out", tmp_path / "out", "--json")
    assert shown.returncode == 0, shown.stderr
    evaluation = json.loads(shown.stdout)
    counts = dict(zip(evaluation["classes"], evaluation["per_class_images"], strict=True))
    assert {name for name, count in counts.items() if count} == {"Sandal", "Bag"}
    assert evaluation["per_class_top1"][0] is None
    assert evaluation["top1_in_training"] is None
    assert evaluation["top1"] > 50
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open(errors="surrogateescape")))
    logits = np.load(tmp_path / "out" / "logits.npy")
    network = load_model(moved, "distill")
    taken = network.preprocessing
    theirs = transforms.Compose(
        [
            transforms.Resize(taken.resize_px),
            transforms.CenterCrop(taken.resolution),
            transforms.ToTensor(),
            transforms.Normalize(taken.mean, taken.std),
        ]
    )
    assert len(rows) == len(logits) == evaluation["images"]
    for row, own in zip(rows, logits, strict=True):
        path = photos / row["image"]
        assert path.parent.name == row["class"]
        images = theirs(Image.open(path).convert("RGB"))[None]
        assert torch.allclose(taken(path), images, atol=1e-5)
        with torch.inference_mode():
            expected = network(images)[0][0].numpy()
        assert np.abs(own - expected).max() < 1e-4
        assert row["predicted"] == taken.classes[expected.argmax()]


def test_what_is_no_folder_of_the_classes_is_refused(moved, photos, tmp_path):
    def line(folder):
        return refused("eval", moved, "distill", "--images", folder)

    shutil.copytree(photos, tmp_path / "val")
    (tmp_path / "val" / "Sandals").mkdir()
    unknown = "class folder Sandals is none of the network's 10 classes, did you mean 'Sandal'?"
    assert line(tmp_path / "val") == f"{tmp_path / 'val'}: {unknown}"
    (tmp_path / "val" / "Sandals").rmdir()
    assert line(tmp_path).startswith(
        f"{tmp_path}: class folder val is none of the network's 10 classes, valid: T-shirt/top"
    )
    assert line(tmp_path).endswith(f"; or give {tmp_path}/val")
    assert line(tmp_path / "val" / "Bag").endswith(
        "Bag: no class folders in it; it should hold a folder of images for each class"
    )
    assert (
        line(tmp_path / "val" / "Bag" / "none")
        == f"{tmp_path}/val/Bag/none: not a folder; it should hold a folder of images for each class"
    )
    shutil.rmtree(tmp_path / "val" / "Bag")
    shutil.rmtree(tmp_path / "val" / "Sandal")
    assert line(tmp_path / "val") == f"{tmp_path}/val: no images in its class folders"
    (tmp_path / "val" / "Coat" / "a.png").write_bytes(b"no image")
    damaged = line(tmp_path / "val")
    assert damaged.startswith(f"{tmp_path}/val/Coat/a.png: not an image")
    both = refused("eval", moved, "distill", "--images", photos, "--data", tmp_path)
    assert both == "eval: --data and --images both say which images; keep one of them"


def test_imagenets_network_as_torchvision_has_it(photos, tmp_path):
    """Its format, its normalisation, its pipeline, and logits to 1e-4, from `gowide run` and `gowide eval`."""
    torch.manual_seed(0)
    public = torchvision.models.resnet18(num_classes=3).eval()
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in public.state_dict().items()}},
        tmp_path / "resnet18.pth",
    )
    folder = tmp_path / "images"
    for split in ("train", "val"):
        shutil.copytree(photos, folder / split)
        shutil.copy(next((photos / "Bag").iterdir()), folder / split / "Coat")
    encode("imagefolder", tmp_path / "data", folder, Options(jpg_share=1.0, workers=1))
    recipe = {
        "name": "public",
        "data": {**{split: f"data/{split}.beton" for split in ("train", "val")}, "resolution": 56, "augment": {"crop": {}}, "center_crop": 0.875},
        "batch_size": 4,
        "networks": {"public": {"arch": "resnet18", "normalise": "imagenet"}},
        "stages": {"take": {"train": "public", "objective": "labels", "epochs": 0, "init": {"file": "resnet18.pth"}}},
    }  # fmt: skip
    write_job(tmp_path, recipe)
    ran = gowide("run", "public.yaml", "--nproc", 1, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "normalise" not in ran.stderr
    shutil.rmtree(tmp_path / "data")
    shown = gowide("eval", "runs/public", "take", "--images", folder / "val", "--out", "out", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    theirs = transforms.Compose(
        [
            transforms.Resize(64),
            transforms.CenterCrop(56),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    data = torchvision.datasets.ImageFolder(folder / "val", theirs)
    with torch.inference_mode():
        expected = public(torch.stack([image for image, _ in data])).numpy()
    assert np.abs(np.load(tmp_path / "out" / "logits.npy") - expected).max() < 1e-4
