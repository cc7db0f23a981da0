"""The whole chain on real images in real processes: exact, resumable, and careful with what is there."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import closing

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from gowide_dist import load_model, load_recipe
from gowide_dist.data.encode import Options, encode
from gowide_dist.environment import code_version
from gowide_dist.errors import DataError, UserError
from gowide_dist.pipeline import open_data
from gowide_dist.prepare import check_data
from gowide_dist.run import Run, read_metrics
from gowide_dist.world import join
from tests.command import GOWIDE, HEARING, LIMIT_S, gowide, killed_when, refused
from tests.data.conftest import write_image_folder
from tests.fashion import chain, encode_part, without_times, write_job

STAGES = ["teacher/wide", "imitate/thin", "distill/thin", "finetune/thin"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """600 training and 200 validation images: 10 steps an epoch."""
    return encode_part(tmp_path_factory.mktemp("fashion"), 600, 200)


@pytest.fixture(scope="session")
def job(data, tmp_path_factory):
    return write_job(tmp_path_factory.mktemp("jobs"), chain(data))


@pytest.fixture(scope="session")
def finished(job, tmp_path_factory):
    """The chain trained without a disturbance by two processes, on a stdout that is ASCII and pretends to have colours."""
    runs = tmp_path_factory.mktemp("undisturbed") / "größe"
    result = gowide("run", job, "--nproc", 2, "--runs", runs, env={"PYTHONIOENCODING": "ascii", "FORCE_COLOR": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "gr??e" in result.stdout and "\x1b" not in result.stdout + result.stderr
    return Run(runs / "chain"), result.stdout


def weights(run):
    return {key: run.stage(key).done.model_sha256 for key in STAGES}


def what_was_measured(run, key):
    return without_times(read_metrics(run.stage(key).metrics))


def test_two_processes_say_what_their_gradients_cost(finished):
    lines = [line for line in read_metrics(finished[0].stage("finetune/thin").metrics) if line["kind"] == "train"]
    assert lines
    # all of what is left, where other work on the machine made the step that was measured a long one
    assert all(0 < line["comm_wait"] <= 1 - line["data_wait"] for line in lines)


def test_the_run_directory(finished, data):
    run, printed = finished
    assert all(f"{key}  done: top-1" in printed for key in STAGES)
    assert (run.report / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = (run.report / "results.csv").read_text().splitlines()
    assert rows[0].startswith(
        "stage,network,parameters,mflops,epochs,top1,top5,seconds,student_epochs,images,train_tflops,"
    )
    assert [row.split(",")[0] for row in rows[1:]] == ["teacher", "imitate", "distill", "finetune"]
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    done = run.stage("distill/thin").done
    assert done.parents.keys() == {"imitate/thin", "teacher/wide"}
    assert (done.steps, done.images, done.epochs, done.world_size) == (20, 1200, 2, 2)
    assert 10 < run.stage("teacher/wide").done.top1 <= run.stage("teacher/wide").done.top5 <= 100
    lines = read_metrics(run.stage("imitate/thin").metrics)
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == [
        1,
        3,
        4,
        6,
        8,
        9,
        10,
        11,
        12,
        15,
        16,
        18,
        20,
    ]  # logged, saved, ends of epochs, phases from first to last
    assert [line["step"] for line in lines if line["kind"] == "val"] == [10, 20]
    assert [sorted(name for name in line if "mse" in name) for line in lines if line["kind"] == "train"] == [
        *[["mse_block1"]] * 7, *[["mse_block2"]] * 6]  # fmt: skip
    assert list((run.stage("teacher/wide").path / "tensorboard").iterdir())


def test_the_finished_network(finished):
    run, _ = finished
    network = load_model(run.path, "finetune")
    assert not network.training
    stored = load_file(run.stage("finetune/thin").model)
    assert all(torch.equal(value, stored[name]) for name, value in network.state_dict().items())


def test_the_same_again_finds_all_done(finished, job):
    run, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.path.glob("stages/**/*") if path.name != "lock"}
    result = gowide("run", job, "--nproc", 2, "--runs", run.path.parent)
    assert result.returncode == 0
    assert "all 4 stages are done, nothing to train" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


def reached(stage_dir, step):
    """Whether a checkpoint of this step or a later one is written, or on a busy machine all is over."""
    steps = [int(path.stem.removeprefix("step-")) for path in stage_dir.glob("checkpoints/step-*.json")]
    return max(steps, default=-1) >= step or (stage_dir / "done.json").exists()


def test_kills_change_nothing(finished, job, tmp_path):
    """SIGKILL in the middle of epochs and of both phases of the imitation: the same bits in the end."""
    undisturbed, _ = finished
    run = Run(tmp_path / "chain")
    command = ("run", job, "--nproc", 2, "--runs", tmp_path)
    for key, step in (("teacher/wide", 3), ("imitate/thin", 6), ("imitate/thin", 15), ("distill/thin", 12)):
        stage_dir = run.stage(key).path
        killed_when(lambda stage_dir=stage_dir, step=step: reached(stage_dir, step), *command)
    result = gowide(*command)
    assert result.returncode == 0, result.stderr
    assert weights(run) == weights(undisturbed)
    assert {run.stage(key).done.stream for key in STAGES} == {undisturbed.stage(key).done.stream for key in STAGES}
    for key in STAGES:
        assert what_was_measured(run, key) == what_was_measured(undisturbed, key)


def of_this_decade(data):
    """The chain with every option that mixes, augments, prunes or weighs."""
    recipe = chain(data)
    recipe["data"]["augment"] |= {
        "trivial_augment": True, "erase": 0.5, "color_jitter": {"brightness": 0.4, "saturation": 0.4, "hue": 0.1}
    }  # fmt: skip
    mixed = {"mixup": 0.4, "cutmix": 1.0}
    kl = {"objective": "kl", "train": "thin", "teacher": "teacher", "epochs": 2, "optim": {"lr": 0.05}}
    return recipe | {
        "stages": {
            "teacher": recipe["stages"]["teacher"] | mixed | {"label_smoothing": 0.1},
            "imitate": recipe["stages"]["imitate"]
            | {"start": "pruned", "order": "joint", "prefix": "trained", "block_weights": [1.0, 2.0]},
            "distill": kl | mixed | {"init": "imitate", "loss": "dist", "standardise": True, "labels_weight": 0.3}
            | {"teacher_logits": "stored"},
            "all_at_once": kl | mixed | {"start": "pruned", "temperature": 4.0, "blocks_weight": 0.5},
            "decoupled": kl | {"start": "teacher", "loss": "dkd", "temperature": 4.0},
        }
    }  # fmt: skip


def same_bits_if_killed(job, tmp_path, *keys):
    """Train in two processes, once undisturbed, once killed at step 6 of some of the five instances: the latter's run."""
    for name in ("undisturbed", "killed"):
        command = ("run", job, "--nproc", 2, "--runs", tmp_path / name)
        for key in keys if name == "killed" else ():
            folder = tmp_path / name / "chain" / "stages" / key
            killed_when(lambda folder=folder: reached(folder, 6), *command)
        result = gowide(*command)
        assert result.returncode == 0, result.stderr
    undisturbed, killed = (Run(tmp_path / name / "chain") for name in ("undisturbed", "killed"))
    of_all = [*undisturbed.recipe().instances]
    assert len(of_all) == 5
    shas = [[run.stage(key).done.model_sha256 for key in of_all] for run in (undisturbed, killed)]
    assert shas[0] == shas[1]
    return killed


def test_the_options_of_this_decade_are_continued_exactly_too(data, tmp_path):
    """Two processes, SIGKILL in four stages: the same bits in the end."""
    job = write_job(tmp_path, of_this_decade(data))
    same_bits_if_killed(job, tmp_path, "teacher/wide", "distill/thin", "all_at_once/thin", "decoupled/thin")


def of_mobile_networks(data):
    """A wide MobileNetV2, a thin one by all stages, and one that is thin in all channels."""
    mobile = {"arch": "mobilenet_v2", "channels": 0.35, "width": 0.5, "stem": "strided"}
    recipe = chain(
        data, networks={"thin": mobile, "wide": {"widen": "thin", "by": 4}, "thinner": mobile | {"channels": 0.1}}
    )
    stages = recipe["stages"]
    for stage in stages.values():
        stage["epochs"] = 1
    whole = {"order": "joint", "prefix": "trained", "start": "pruned"}
    last = {"finetune": stages.pop("finetune"), "channels": stages["imitate"] | {"train": "thinner"}}
    stages["imitate"] |= whole
    return recipe | {"stages": stages | last}


def test_a_mobile_chain_is_continued_exactly_too(data, tmp_path):
    """Two processes, SIGKILL in the distillation and between phases of an imitation: the same bits in the end."""
    job = write_job(tmp_path, of_mobile_networks(data))
    killed = same_bits_if_killed(job, tmp_path, "distill/thin", "channels/thinner")
    network = torchvision.models.mobilenet_v2(
        num_classes=10, width_mult=0.1
    )  # the transforms are merged: names, shapes
    weights = load_file(killed.stage("channels/thinner").model)
    assert weights.keys() == network.state_dict().keys()


def test_three_processes_continue_exactly_too(finished, job, tmp_path):
    """With three, the order in which gradients are added up could change at a restart."""
    command = ("run", job, "--nproc", 3, "--only", "teacher")
    assert gowide(*command, "--runs", tmp_path / "a").returncode == 0
    run = Run(tmp_path / "b" / "chain")
    saved = run.stage("teacher/wide").checkpoints / "step-000000009.json"
    killed_when(saved.exists, *command, "--runs", tmp_path / "b")
    assert gowide(*command, "--runs", tmp_path / "b").returncode == 0
    undisturbed = Run(tmp_path / "a" / "chain").stage("teacher/wide").done
    assert run.stage("teacher/wide").done.model_sha256 == undisturbed.model_sha256
    by_two = finished[0].stage("teacher/wide").done  # the same samples at the same steps, though rounded differently
    assert run.stage("teacher/wide").done.stream == undisturbed.stream == by_two.stream
    assert by_two.model_sha256 != undisturbed.model_sha256


def test_a_damaged_checkpoint_is_passed_over(finished, job, tmp_path):
    run = Run(tmp_path / "chain")
    command = ("run", job, "--nproc", 2, "--runs", tmp_path, "--only", "teacher")
    folder = run.stage("teacher/wide").checkpoints
    killed_when((folder / "step-000000006.json").exists, *command)
    newest = sorted(folder.glob("*.json"))[-1].with_suffix(".pt")  # one that was cut off has none
    newest.write_bytes(newest.read_bytes()[:-100])
    result = gowide(*command)
    assert result.returncode == 0
    assert "damaged, skipped" in result.stderr
    assert run.stage("teacher/wide").done.model_sha256 == weights(finished[0])["teacher/wide"]


def test_a_teacher_that_is_trained_is_shared(finished, data, tmp_path):
    run, _ = finished
    shutil.copytree(run.path, tmp_path / "chain")
    recipe = chain(data, name="second")
    recipe["stages"] = {"wide-one": recipe["stages"]["teacher"]}
    result = gowide("run", write_job(tmp_path, recipe), "--nproc", 2, "--runs", tmp_path)
    assert result.returncode == 0
    assert "wide-one/wide  copied from" in result.stdout
    mine, theirs = (
        Run(tmp_path / name).stage(key).done for name, key in (("second", "wide-one/wide"), ("chain", "teacher/wide"))
    )
    assert mine.model_copy(update={"stage": "teacher"}) == theirs


def test_another_recipe_in_the_same_place(finished, job):
    run, _ = finished
    line = refused("run", job, "--runs", run.path.parent, "stages.distill.epochs=5", "--nproc", 2)
    assert "holds distill/thin of another recipe (stages.distill.epochs was 2, is 5)" in line
    assert "--fresh" in line
    assert run.stage("distill/thin").done.epochs == 2


def test_fresh_forgets_what_differs_alone(finished, job, tmp_path):
    run, _ = finished
    shutil.copytree(run.path, tmp_path / "chain")
    result = gowide("run", job, "--nproc", 2, "--runs", tmp_path, "--fresh", "stages.finetune.epochs=2")
    assert result.returncode == 0, result.stderr
    again = Run(tmp_path / "chain")
    assert again.stage("finetune/thin").done.epochs == 2
    assert again.stage("distill/thin").done == run.stage("distill/thin").done


def test_a_second_writer_is_refused(job, tmp_path):
    with Run(tmp_path / "chain").stage("teacher/wide").lock():
        line = refused("run", job, "--runs", tmp_path, "--nproc", 2)
    assert "is training teacher/wide there; wait for it or end it" in line
    assert "process" in line


def test_a_loss_that_is_no_number_stops_the_stage(job, tmp_path):
    line = refused(
        "run", job, "--runs", tmp_path, "--nproc", 2, "--only", "teacher", "stages.teacher.optim.lr=1e30",
        "stages.teacher.schedule.warmup_epochs=1", "checkpoints.every_steps=1",
    )  # fmt: skip
    place = Run(tmp_path / "chain").stage("teacher/wide")
    saved = sorted(place.checkpoints.glob("*.pt"))[-1]
    assert f"the last good checkpoint is {saved}" in line
    step = int(line.split("not finite at step ")[1].split(" ")[0])
    assert f"(learning rate {1e30 * (step - 1) / 10:g})" in line
    state = torch.load(saved, weights_only=True)
    assert state["step"] == step - 1
    assert all(value.isfinite().all() for value in state["objective"].values())
    assert place.done is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_leaves(finished, job, tmp_path, number):
    """Also where the terminal is closed: then with it what is printed."""
    command = ("run", job, "--nproc", 2, "--runs", tmp_path, "--only", "teacher")
    place = Run(tmp_path / "chain").stage("teacher/wide")
    unplanned = ("checkpoints.every_steps=null", "checkpoints.every_minutes=null", "log_every_steps=1")
    master, terminal = pty.openpty()
    launcher = subprocess.Popen(
        [*HEARING, GOWIDE, *map(str, command), *unplanned], stdout=terminal, stderr=terminal, start_new_session=True
    )
    os.close(terminal)
    reader = threading.Thread(target=read_all, args=(master,), daemon=True)
    try:
        deadline = time.monotonic() + LIMIT_S
        reader.start()
        while not read_metrics(place.metrics):
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        launcher.send_signal(number)
        launcher.wait(LIMIT_S)
    finally:
        launcher.kill()
        launcher.wait()
        os.close(master)
    assert len(list(place.checkpoints.glob("step-*.json"))) == 1
    assert gowide(*command).returncode == 0
    assert place.done.model_sha256 == weights(finished[0])["teacher/wide"]


def test_under_nohup_a_closed_terminal_changes_nothing(finished, job, tmp_path):
    place = Run(tmp_path / "chain").stage("teacher/wide")
    command = ["nohup", GOWIDE, "run", str(job), "--nproc", "2", "--runs", str(tmp_path), "--only", "teacher"]
    with (tmp_path / "out").open("w") as out:
        launcher = subprocess.Popen(
            [*command, "log_every_steps=1"], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
        try:
            deadline = time.monotonic() + LIMIT_S
            while not read_metrics(place.metrics):
                assert launcher.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.killpg(launcher.pid, signal.SIGHUP)
            assert launcher.wait(LIMIT_S) == 0, (tmp_path / "out").read_text()
        finally:
            launcher.kill()
            launcher.wait()
    assert place.done.model_sha256 == weights(finished[0])["teacher/wide"]


def read_all(file):
    """Until the other end is closed."""
    with contextlib.suppress(OSError):
        while os.read(file, 1 << 16):
            pass


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=nowhere/train.beton"], "nowhere/dataset.json: not found"),
        (["data.classes=100"], "has 10 classes, the recipe says 100"),
        (["batch_size=1000"], "batch_size: 1000 is more than the 600 images"),
        (["batch_size=61"], "batch_size: 61 is not divisible by 2 processes"),
        (["data.resolution=32"], "resolution"),
        (["stages.distill.epoch=1"], "unknown key 'epoch', did you mean 'epochs'?"),
        (["sync_batch_norm=true"], "sync_batch_norm: PyTorch has it for GPUs only, and the 2 processes have none"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(job, tmp_path, monkeypatch, overrides, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert message in refused("run", job, "--runs", tmp_path / "runs", "--nproc", 2, *overrides)
    assert not (tmp_path / "runs").exists()


def test_images_of_many_sizes_need_to_be_cut(job, tmp_path):
    write_image_folder(tmp_path / "images", 80, 20, num_classes=10)
    encode("imagefolder", tmp_path / "data", tmp_path / "images", Options(jpg_share=1.0, workers=1))
    given = [f"data.{part}={tmp_path / 'data' / part}.beton" for part in ("train", "val")]
    arguments = ["run", job, "--runs", tmp_path / "runs", *given]
    assert "say how they become 28 px, for example data.augment.crop: {scale: [0.08, 1.0]}" in refused(*arguments)
    assert "for example data.center_crop: 0.875" in refused(*arguments, "data.augment.crop={scale: [0.5, 1.0]}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("num_classes", "overrides", "message"),
    [
        (1, [], "train.beton: has one class, .*, so that there is nothing to tell apart"),
        (2, ["standardise=true"], r"stages\.distill\.standardise: the z-scores of two classes differ in sign alone"),
        (2, ["loss=dkd", "target_weight=0"], r"stages\.distill\.target_weight: of two classes, .* set it above 0"),
        (2, ["loss=dkd"], None),
        (3, ["standardise=true"], None),
    ],
)
def test_of_few_classes_there_is_something_to_learn(tmp_path, num_classes, overrides, message):
    write_image_folder(tmp_path / "images", 6, 3, num_classes=num_classes)
    encode("imagefolder", tmp_path / "data", tmp_path / "images", Options(jpg_share=1.0, workers=1))
    options = ["batch_size=6", "data.augment={crop: {}}", "data.center_crop=1"]
    job = write_job(tmp_path, chain(tmp_path / "data"))
    recipe = load_recipe(job, [*options, *(f"stages.distill.{override}" for override in overrides)])
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_data(recipe)


@pytest.mark.parametrize(("side", "center_crop"), [(24, 0.875), (40, 1.0), (28, "null")])
def test_squares_of_one_size_can_be_cropped_too(job, side, center_crop):
    """To a smaller resolution, to a larger one, and in training alone."""
    options = [f"data.resolution={side}", "data.augment={crop: {}}", f"data.center_crop={center_crop}"]
    recipe, _ = check_data(load_recipe(job, options))
    with join() as world, open_data(recipe, world) as data, closing(data.train(0)) as training:
        for loader in (training, data.val):
            with closing(loader.batches()) as batches:
                assert next(batches).images.shape == (60, side, side, 3)


@pytest.mark.parametrize(
    ("overrides", "example"),
    [
        ([], "data.augment.crop: {scale: [0.08, 1.0]}"),
        (["data.center_crop=0.875"], "data.augment.crop: {scale: [0.08, 1.0]}"),
        (["data.augment={crop: {}}"], "data.center_crop: 0.875"),
    ],
)
def test_squares_of_another_side_need_to_be_cut(job, overrides, example):
    with pytest.raises(
        DataError, match="have 28 px, the recipe says 24; take their side, or say how they become 24 px"
    ):
        check_data(load_recipe(job, ["data.resolution=24", *overrides]))
    with pytest.raises(DataError, match=re.escape(f"for example {example}")):
        check_data(load_recipe(job, ["data.resolution=24", *overrides]))


def test_a_truncated_file_is_refused(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    file = tmp_path / "data" / "train.beton"
    file.write_bytes(file.read_bytes()[:-1000])
    job = write_job(tmp_path, chain(tmp_path / "data"))
    assert "truncated" in refused("run", job, "--runs", tmp_path / "runs", "--nproc", 2)
    assert not (tmp_path / "runs").exists()


def test_a_machine_without_git(monkeypatch):
    """Git says which commit it was, where there is git."""
    assert set(code_version()) == {"gowide_dist", "commit", "dirty"}
    monkeypatch.setenv("PATH", "/nowhere")
    version = code_version()
    assert version["gowide_dist"]
    assert version["commit"] is version["dirty"] is None
