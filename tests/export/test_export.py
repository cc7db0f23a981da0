"""`gowide export`: logits of the files in their runtimes against the network's own, on real images."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
import yaml
from PIL import Image
from safetensors.torch import load_file

from gowide_dist import load_model, load_recipe
from gowide_dist.cli import main
from gowide_dist.data.loader import Loader
from gowide_dist.data.preprocessing import read_preprocessing
from gowide_dist.errors import DataError, RunError
from gowide_dist.export import compare, process
from gowide_dist.export.counterparts import in_timm, in_torchvision, timm_weights
from gowide_dist.export.folder import export
from gowide_dist.export.formats import Request
from gowide_dist.files import sha256
from gowide_dist.insight.trained import balanced_samples, open_trained
from gowide_dist.networks.architecture import structure_of
from gowide_dist.networks.build import build_network
from gowide_dist.networks.foreign import settings_class
from gowide_dist.pipeline import walk
from gowide_dist.prepare import prepare
from gowide_dist.timeline import Batching
from tests.command import gowide, refused
from tests.docs import DOCS, fenced_blocks
from tests.fashion import write_job

PAGE = DOCS / "export.md"


@pytest.fixture(scope="module")
def exported(finished_run):
    """The export of docs/export.md, and the output of its last command."""
    root = finished_run.path.parents[1]
    for line in fenced_blocks(PAGE, "bash")[0].splitlines():
        shown = gowide(*line.split()[1:], cwd=root)
        assert shown.returncode == 0, shown.stderr
    return root / "exports" / "demo", shown.stdout


@pytest.fixture(scope="module")
def val(finished_run):
    """The validation images, uint8 [1000, 28, 28, 3], and their labels."""
    beton = finished_run.path.parents[1] / "data" / "val.beton"
    with closing(Loader(beton, Batching(1000), train=False, resolution=28)) as loader:
        batch = next(iter(loader.batches()))
        return batch.images.numpy().copy(), batch.labels.numpy().copy()


def torch_logits(run, stage, images, network=None):
    """Logits from `load_model` as a user calls it."""
    info = json.loads((run.path.parents[1] / "data" / "dataset.json").read_text())
    mean, std = (np.array(info[name], np.float32) for name in ("mean", "std"))
    pixels = torch.from_numpy((images / np.float32(255) - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return load_model(run.path, stage, network)(pixels)[0].numpy()


def onnx_logits(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


@pytest.mark.parametrize("num_images", [1, 3, 64])
def test_files_give_the_logits_of_the_network(finished_run, exported, val, num_images):
    folder, _ = exported
    images = val[0][:num_images]
    expected = torch_logits(finished_run, "distill", images)
    assert expected.shape == (num_images, 10)
    assert np.abs(onnx_logits(folder / "model.onnx", images) - expected).max() < 1e-4
    program = torch.export.load(folder / "model.pt2").module()
    with torch.inference_mode():
        assert np.abs(program(torch.from_numpy(images)).numpy() - expected).max() < 1e-4
    assert (
        load_file(folder / "model.safetensors").keys() == load_model(finished_run.path, "distill").state_dict().keys()
    )


def test_figures_of_the_report(finished_run, exported, val):
    folder, printed = exported
    report, config = (json.loads((folder / name).read_text()) for name in ("export.json", "config.json"))
    done = finished_run.stage("distill/thin").done
    images, labels = val
    assert report["validation"]["images"] == 1000
    assert report["calibration"]["images"] == 510  # 51 of each class
    formats = report["formats"]
    files = {name: file["sha256"] for form in formats.values() for name, file in form["files"].items()}
    assert {path.name for path in folder.iterdir()} == {"config.json", "export.json", *files}
    assert all(digest == sha256(folder / name) for name, digest in files.items())
    assert done.model_sha256 == config["model_sha256"] == report["model_sha256"] == files["model.safetensors"]
    ran = {name: form["runtimes"] for name, form in formats.items()}
    for name, file in (("onnx", "model.onnx"), ("onnx-int8", "model.int8.onnx")):
        best = onnx_logits(folder / file, images).argmax(1)
        assert ran[name]["onnxruntime"]["top1"] == pytest.approx(100 * (best == labels).mean(), abs=0.11)
        assert ran[name]["opencv"]["top1"] == pytest.approx(ran[name]["onnxruntime"]["top1"], abs=1)
        assert ran[name]["opencv"]["with"]["opencv-python"]
        assert file in printed
    assert report["pytorch"]["top1"] == pytest.approx(done.top1) == pytest.approx(config["top1"])
    for figures in (ran["onnx"]["onnxruntime"], ran["onnx"]["opencv"], ran["pt2"]["torch"]):
        assert 0 < figures["largest_logit_difference"] < 1e-4
        assert figures["top1_agreement"] == 100
    # Loose bounds: after seconds of training the logits of different classes are close.
    int8 = ran["onnx-int8"]["onnxruntime"]
    assert done.top1 - int8["top1"] <= 3
    assert 90 < int8["top1_agreement"] <= 100
    for figures in (report["pytorch"], *(each for form in ran.values() for each in form.values())):
        assert figures["latency_ms"]["1"] > 0
    assert (config["classes"][6], config["fingerprint"]) == ("Shirt", done.fingerprint)
    assert config["torchvision"] is config["timm"] is None


def test_files_hold_no_paths_of_this_machine(exported):
    folder, _ = exported
    for path in folder.glob("model.*"):
        assert str(DOCS.parent).encode() not in path.read_bytes()
        assert sys.prefix.encode() not in path.read_bytes()


def test_the_examples_of_the_documentation(finished_run, exported, val, tmp_path):
    (tmp_path / "exports").mkdir()
    shutil.copytree(exported[0], tmp_path / "exports" / "demo")
    for name, image in zip(("one.png", "two.png"), val[0], strict=False):
        Image.fromarray(image).save(tmp_path / name)
    best = torch_logits(finished_run, "distill", val[0][:2]).argmax(1)
    classes = json.loads((exported[0] / "config.json").read_text())["classes"]
    blocks = [
        block for block in fenced_blocks(PAGE, "python") if "import onnxruntime" in block or "torch.export" in block
    ]
    assert len(blocks) == 2
    for block in blocks:
        code = f"import sys; sys.modules['gowide_dist'] = None\n{block}"
        shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert shown.returncode == 0, shown.stderr
        assert [line.split("  ")[0] for line in shown.stdout.splitlines()] == [classes[label] for label in best]


def test_a_second_export_does_nothing_and_other_folders_are_refused(finished_run, exported, tmp_path, capsys):
    trained = open_trained(finished_run.path, "distill")
    folder = tmp_path / "export"
    request = Request(("safetensors",), images=64)
    first = export(trained, folder, request)
    assert first["validation"]["images"] == 64
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(times) == {"config.json", "export.json", "model.safetensors"}
    assert export(trained, folder, request) == first
    assert capsys.readouterr().err.endswith(f"{folder}: already exported; nothing to do\n")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert list(tmp_path.iterdir()) == [folder]

    with pytest.raises(RunError, match="contains files other than an export of these weights"):
        export(open_trained(finished_run.path, "baseline/basic"), folder, request)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    line = refused("export", finished_run.path, "distill", "--to", tmp_path / "other")
    assert line.startswith(f"{tmp_path / 'other'}: contains files other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["letter.txt"]


def test_a_copied_run_is_exported(moved, finished_run, exported, tmp_path):
    """Without data compared on noise, and not quantised."""
    shown = gowide("export", moved, "distill", "--to", tmp_path / "alone", "--format", "pt2,onnx-int8", "--symmetric")
    assert shown.returncode == 0, shown.stderr
    assert "note: onnx-int8 left out: no training images to calibrate; --data DIR says where they are" in shown.stderr
    report = json.loads((tmp_path / "alone" / "export.json").read_text())
    assert set(report["formats"]) == {"safetensors", "pt2"}
    assert report["validation"] == {"data": "noise", "images": 64}
    assert report["pytorch"]["top1"] is None
    assert report["formats"]["pt2"]["runtimes"]["torch"]["largest_logit_difference"] < 1e-4
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "alone" / name).read_bytes() == (exported[0] / name).read_bytes()
    taken = load_model(finished_run.path, "distill").preprocessing
    assert read_preprocessing(tmp_path / "alone" / "model.safetensors") == taken
    config = json.loads((tmp_path / "alone" / "config.json").read_text())
    assert config["normalise"] == {"mean": [*taken.mean], "std": [*taken.std], "of": "pixels / 255"}

    with pytest.raises(DataError, match="not found"):
        export(open_trained(moved, "distill"), tmp_path / "none", Request(("safetensors", "pt2")), data=tmp_path)


def test_interrupted_and_smaller_exports_are_replaced(finished_run, tmp_path, capsys):
    trained = open_trained(finished_run.path, "distill")
    folder = tmp_path / "export"
    (folder / ".partial").mkdir(parents=True)  # left by a process that was killed
    (folder / ".partial" / "config.json").write_text(json.dumps({"model_sha256": trained.done.model_sha256}))
    (folder / "model.onnx").touch()  # already moved
    (folder / "model.int8.onnx").touch()
    (folder / "timm").mkdir()
    (folder / "timm" / "config.json").touch()
    export(trained, folder, Request(("safetensors",), images=8))
    assert {path.name for path in folder.iterdir()} == {"config.json", "export.json", "model.safetensors"}
    assert "note: model.int8.onnx, model.onnx, timm/config.json of an earlier export removed" in capsys.readouterr().err


def test_options_of_onnx_and_the_warning_of_a_loss(moved, finished_run, val, tmp_path, monkeypatch, capsys):
    """A fixed batch, which images fill up; a fixed opset; zero points of 0; the run's data at another place."""
    monkeypatch.setattr(compare, "MAX_INT8_LOSS", -100.0)
    request = Request(("safetensors", "onnx-int8"), opset=19, batch=5, symmetric=True, images=32)
    data = finished_run.path.parents[1] / "data"
    report = export(open_trained(moved, "baseline/basic"), tmp_path / "export", request, data)
    assert "warning: model.int8.onnx in onnxruntime loses " in capsys.readouterr().err
    assert (report["validation"]["images"], report["calibration"]["images"]) == (32, 510)
    [figures, _] = report["formats"]["onnx-int8"]["runtimes"].values()
    assert [*figures["latency_ms"]] == ["5"] and figures["top1_agreement"] > 80
    assert not (tmp_path / "export" / "model.onnx").exists()  # not asked for
    model = onnx.load(tmp_path / "export" / "model.int8.onnx")
    assert model.opset_import[0].version == 19
    shape = model.graph.input[0].type.tensor_type.shape
    assert [each.dim_value for each in shape.dim] == [5, 28, 28, 3]
    values = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    zero_points = [values[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert zero_points and not np.concatenate([each.ravel() for each in zero_points]).any()
    expected = torch_logits(finished_run, "baseline", val[0][:5], "basic")
    assert np.abs(onnx_logits(tmp_path / "export" / "model.int8.onnx", val[0][:5]) - expected).max() < 1


def test_a_network_that_is_trained_to_be_rounded(finished_run, val, tmp_path):
    """Its files of 8 bits have the ranges and the weights of the training, and give its answers."""
    trained = open_trained(finished_run.path, "eight")
    quantisation = trained.preprocessing.quantisation
    report = export(trained, tmp_path / "export", Request(("safetensors", "pt2", "onnx-int8", "openvino-int8")))
    assert report["rounded"]["top1"] == pytest.approx(trained.done.top1, abs=0.11)
    assert report["pytorch"]["top1"] != report["rounded"]["top1"]
    assert "(PyTorch, rounded to 8 bits)" in compare.table(report)
    for name, least in (("onnx-int8", 98), ("openvino-int8", 90)):
        assert next(iter(report["formats"][name]["runtimes"].values()))["top1_agreement"] > least
    model = onnx.load(tmp_path / "export" / "model.int8.onnx")
    values = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    steps = {float(values[node.input[1]]) for node in model.graph.node if node.op_type == "QuantizeLinear"}
    trained_with = sorted(max(-low, high) / 127 for low, high in quantisation.ranges)
    assert sorted(steps) == pytest.approx(sorted({*trained_with}), rel=1e-5)
    logits = onnx_logits(tmp_path / "export" / "model.int8.onnx", val[0][:64])
    expected = torch_logits(finished_run, "eight", val[0][:64])
    assert np.abs(logits - expected).mean() < 0.02 * np.abs(expected).max()
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["quantised"] == "symmetric"
    state = load_file(tmp_path / "export" / "model.safetensors")
    assert state.keys() == load_file(finished_run.stage("baseline/basic").model).keys()
    shown = gowide("report", finished_run.path)
    assert shown.returncode == 0 and "eight     basic" in shown.stdout, shown.stderr


def test_channels_that_are_always_zero_cost_no_bias_its_precision(finished_run, tmp_path):
    """By a batch norm that saw no variance the weights behind them become huge, and with these a step of the bias."""
    values = yaml.safe_load(finished_run.recipe_path.read_text())
    values["networks"] = {"mobile": {"arch": "mobilenet_v2", "channels": 0.1, "stem": "strided"}}
    torch.manual_seed(0)
    state = build_network(values["networks"]["mobile"], 10).state_dict()
    for index in range(2, 12):
        expansion, depthwise = (f"features.{index}.conv.{layer}" for layer in (0, 1))
        state[f"{expansion}.1.weight"][:4], state[f"{expansion}.1.bias"][:4] = 0.0, -1.0  # behind the rectifier: zero
        state[f"{depthwise}.1.running_var"][:4], state[f"{depthwise}.1.bias"][:4] = 1e-12, 1.0
        state[f"{depthwise}.0.weight"][:4] *= 1e3
    torch.save(state, tmp_path / "weights.pth")
    stage = {"train": "mobile", "objective": "labels", "epochs": 0, "init": {"file": str(tmp_path / "weights.pth")}}
    prepared = prepare(load_recipe(write_job(tmp_path, {**values, "stages": {"take": stage}})), tmp_path / "runs")
    walk(prepared.run, ["take/mobile"])
    report = export(open_trained(prepared.run.path, "take"), tmp_path / "export", Request(("onnx-int8",), images=64))
    assert report["formats"]["onnx-int8"]["runtimes"]["onnxruntime"]["largest_logit_difference"] < 1e-4


def test_a_public_network(finished_run, val, tmp_path):
    """torchvision and timm load the exported weights, if they have the architecture."""
    public = torchvision.models.resnet18(num_classes=10)
    torch.save(public.state_dict(), tmp_path / "weights.pth")
    values = yaml.safe_load(finished_run.recipe_path.read_text())
    values["networks"] = {"public": {"arch": "resnet18"}}
    stage = {"train": "public", "objective": "labels", "epochs": 0, "init": {"file": str(tmp_path / "weights.pth")}}
    prepared = prepare(load_recipe(write_job(tmp_path, {**values, "stages": {"take": stage}})), tmp_path / "runs")
    walk(prepared.run, ["take/public"])
    trained = open_trained(prepared.run.path, "take")
    report = export(trained, tmp_path / "export", Request(("safetensors", "timm"), images=8))
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    build = getattr(torchvision.models, config["torchvision"]["model"])
    network = build(**config["torchvision"]["arguments"]).eval()
    network.load_state_dict(load_file(tmp_path / "export" / "model.safetensors"))
    mean, std = (torch.tensor(config["normalise"][name])[:, None, None] for name in ("mean", "std"))
    images = val[0][:8]
    with torch.inference_mode():
        expected = network((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()
    theirs = timm.create_model(f"local-dir:{tmp_path / 'export' / 'timm'}", pretrained=True).eval()
    with torch.inference_mode():
        logits = theirs((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()
    assert np.abs(logits - expected).max() < 1e-4
    assert theirs.pretrained_cfg["label_names"] == config["classes"]
    assert report["formats"]["timm"]["runtimes"]["timm"]["top1_agreement"] == 100


@pytest.mark.parametrize(
    ("network", "model", "argument"),
    [
        ({"arch": "resnet50", "width": 2}, "resnet50", {"width_per_group": 128}),
        ({"arch": "resnet50", "width": 0.3}, None, {}),  # 19.2 channels a group
        ({"arch": "resnet18", "width": 2}, None, {}),
        ({"arch": "resnet50", "stem": "small"}, None, {}),
        ({"arch": "resnet50", "pre_activation": True}, None, {}),
        ({"arch": "resnet50", "stem_channels": 32}, None, {}),
        ({"arch": "mobilenet_v2", "channels": 0.35}, "mobilenet_v2", {"width_mult": 0.35}),
        ({"arch": "mobilenet_v2", "width": 4}, None, {}),
        ({"arch": "mobilenet_v2", "stem": "small"}, None, {}),
    ],
)
def test_networks_of_torchvision(network, model, argument):
    found = in_torchvision(structure_of(network).model_validate(network))
    assert found == (model and (model, argument))


def test_a_file_with_other_logits_is_not_kept(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "LOGITS_TOLERANCE", 0.0)
    command = [
        "gowide",
        "export",
        finished_run.path,
        "distill",
        "--to",
        tmp_path / "export",
        "--format",
        "pt2",
        "--images",
        8,
    ]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    at_sigint = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as left:
        main()
    signal.signal(signal.SIGINT, at_sigint)  # the command's end ignores it
    assert left.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("gowide: model.")
    assert "from PyTorch's on 8 validation images, 0 is allowed; nothing was written" in line
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_disk_does_not_hold_leaves_nothing(finished_run, exported, tmp_path):
    """PyTorch's own writing of a file would abort the process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((exported[0] / "model.pt2").stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(RunError, match="cannot be written"):
            export(open_trained(finished_run.path, "distill"), tmp_path / "to", Request(("pt2",)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--format", "litert"], "--format litert needs litert-torch: install them in an environment of their own"),
        (["--format", "onxx"], "--format: no 'onxx', did you mean 'onnx'?"),
        (["--format", "timm"], "--format timm: timm has no network like thin; leave timm out"),
        (["--format", "pt2", "--opset", "20"], "--opset: is of ONNX files, and --format asks for none"),
        (["--format", "onnx", "--symmetric"], "--symmetric: is of onnx-int8 and openvino-int8"),
        (["--format", "safetensors", "--batch", "2"], "--batch: weights take any number of images"),
        (["--converter", "litert=python"], "--converter litert=python: there is no file python; give the python of"),
        (["--converter", f"litert={sys.executable}"], "--converter litert: --format asks for no litert; add it"),
        (["--format", "onnx", "--converter", "onnx=/bin/false"], "--converter: /bin/false is no Python that runs"),
        (["--format", "onnx", "--converter", "onnx=/bin/echo"], "--converter: /bin/echo is no Python that runs"),
        (["--format", "onnx", "--converter", "onnx=/bin/true"], "--converter: /bin/true is no Python that runs"),
        (["--converter", "pt2=/bin/false"], "--converter pt2=/bin/false: should be FORMAT=PYTHON"),
    ],
)
def test_what_cannot_be_exported_is_said_before_any_work(finished_run, tmp_path, arguments, line, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["gowide", "export", str(finished_run.path), "distill", "--to", str(tmp_path / "to"), *arguments]
    )
    at_sigint = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as left:
        main()
    signal.signal(signal.SIGINT, at_sigint)
    assert left.value.code == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(f"gowide: {line}")
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_and_a_runtime_that_fail(finished_run, exported, tmp_path):
    """One line of their own, whatever the libraries write."""
    job = {"convert": "onnx", "source": "nothing.pt2", "target": str(tmp_path / "a"), "opset": None, "batch": None}
    with pytest.raises(process.BackendError, match=r"nothing\.pt2"):
        process.convert(Path(sys.executable), job)
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    with pytest.raises(process.BackendError, match="its process was killed by SIGKILL"):
        process.convert(killed, job)
    killed.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(process.BackendError, match="ended without writing it"):
        process.convert(killed, job)
    killed.write_text("#!/bin/sh\necho '{}'\nsleep 30\n")
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), process.running(killed, job, 10):
        raise KeyboardInterrupt
    assert time.monotonic() - start < 15, "waited for what the script had started"
    (tmp_path / "broken.onnx").write_bytes(b"broken")
    job = {"run": "onnxruntime", "file": str(tmp_path / "broken.onnx"), "threads": 1, "batch": 1, "image": [8, 8, 3]}
    with (
        pytest.raises(process.BackendError, match="Protobuf parsing failed"),
        process.running(Path(sys.executable), job, 10),
    ):
        pass
    job |= {"file": str(exported[0] / "model.onnx"), "packages": ["onnxruntime"]}  # images of another size
    with (
        pytest.raises(process.BackendError, match="invalid dimensions"),
        process.running(Path(sys.executable), job, 10),
    ):
        pass


def test_openvino(finished_run, tmp_path):
    report = export(open_trained(finished_run.path, "distill"), tmp_path / "to", Request(("openvino", "openvino-int8")))
    float32, int8 = (form["runtimes"]["openvino"] for form in report["formats"].values())
    assert float32["top1_agreement"] == 100 and float32["largest_logit_difference"] < 1e-4
    assert 90 < int8["top1_agreement"] < 100 and int8["with"]["openvino"]
    names = {"model.xml", "model.bin", "model.int8.xml", "model.int8.bin", "config.json", "export.json"}
    assert {path.name for path in (tmp_path / "to").iterdir()} == names


@pytest.mark.parametrize(
    ("network", "model", "arguments"),
    [
        ({"arch": "resnet50", "width": 2}, "resnet50", {"base_width": 128}),
        ({"arch": "mobilenet_v2", "channels": 0.35}, "mobilenetv2_035", {}),
        ({"arch": "mobilenet_v2", "channels": 0.3}, None, {}),  # none of timm's
        ({"arch": "resnet18", "stem": "small"}, None, {}),
        ({"torchvision": "mobilenet_v2"}, "mobilenetv2_100", {}),
        ({"torchvision": "resnet18", "zero_init_residual": True}, None, {}),
        ({"timm": "convnext_atto", "drop_rate": 0.1}, "convnext_atto", {"drop_rate": 0.1}),
    ],
)
def test_networks_of_timm(network, model, arguments):
    """timm's network with our weights gives our logits."""
    found = in_timm(settings_class(network).model_validate(network))
    assert found == (model and (model, arguments))
    if found and model.startswith("mobilenet"):  # others have torchvision's names
        ours = build_network(network, 7).eval()
        for module in ours.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.running_mean)
                torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
        theirs = timm.create_model(model, num_classes=7, **arguments).eval()
        theirs.load_state_dict(timm_weights(found, ours.plain.state_dict()))
        images = torch.randn(2, 3, 64, 64)
        with torch.inference_mode():
            assert torch.allclose(theirs(images), ours(images)[0], atol=1e-4)


def test_calibration_images_are_balanced():
    labels = np.array([0] * 90 + [1] * 8 + [3] * 2)
    chosen = balanced_samples(labels, 15)
    assert np.bincount(labels[chosen]).tolist() == [5, 5, 0, 2]
    assert np.diff(chosen).min() > 0 and chosen[4] - chosen[0] == 89
    assert np.bincount(labels[balanced_samples(labels, 1)]).tolist() == [1, 1, 0, 1]
