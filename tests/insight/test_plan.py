"""What a recipe will cost. Hours worked out by hand from the stages' multiply-adds, which have tests of their own."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gowide_dist import load_recipe
from gowide_dist.data.encode import encode
from gowide_dist.errors import DataError
from gowide_dist.files import sha256
from gowide_dist.identity import fingerprint, identities
from gowide_dist.insight.assumed import data_size, this_machines_cores
from gowide_dist.insight.plan import longest_path, plan, plan_seeds, plan_table
from gowide_dist.insight.stage_plan import restarts
from gowide_dist.insight.text import duration
from gowide_dist.launch.local import KEEP_FREED_MEMORY
from gowide_dist.launch.profile import Device, Profile
from gowide_dist.networks.build import build_network
from gowide_dist.prepare import check_data, prepare
from gowide_dist.recipe import load_seeds
from gowide_dist.run import Done, Run
from gowide_dist.train.checkpoint import save_checkpoint
from gowide_dist.train.costs import IMPORTS
from tests.command import gowide, refused
from tests.fashion import chain, write_job, write_part

ROOT = Path(__file__).parents[2]
IMAGES, VAL = 180, 60
SLOW = Device(name="abacus", tflops=1e-5, efficiency=0.5, start_s=30)  # 5 MFLOP/s


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    write_part(root / "idx", IMAGES, VAL)
    encode("fashion-mnist", root / "data", root / "idx")
    return root / "data"


@pytest.fixture
def job(data, tmp_path):
    return write_job(tmp_path, chain(data))


def on(recipe, tmp_path, **profile):
    profile = Profile(**{"device": SLOW, "timeout_min": 10**6, **profile})
    return plan(recipe, data_size(recipe), profile, runs=tmp_path / "runs")


def test_hours_by_hand(job, tmp_path):
    recipe = load_recipe(job)
    stem = 3 * 4 * 9 * 14 * 14  # whose input needs no gradient
    result = on(recipe, tmp_path, processes_per_node=2)
    teacher, imitate, distill, finetune = result.stages
    thin, wide = distill.macs["forward"], teacher.macs["forward"]
    # 2 epochs of 180 images at 3 x wide, 2 passes of 60 at 1 x wide; 2 operations each; two processes of 5 MFLOP/s
    seconds = 2 * (2 * IMAGES * (3 * wide - stem) + 2 * VAL * wide) / 1e7
    assert teacher.hours == pytest.approx((30 + seconds) / 3600)
    assert teacher.device_hours == pytest.approx(2 * teacher.hours)
    seconds = 2 * (2 * IMAGES * (3 * thin - stem + wide) + 2 * VAL * (thin + wide)) / 1e7
    assert distill.hours == pytest.approx((30 + seconds) / 3600)
    assert (distill.images, distill.steps, distill.batch_per_process) == (360, 6, 30)
    assert distill.macs == {"forward": thin, "backward": 2 * thin - stem, "teacher": wide}
    assert result.longest_path == ["teacher/wide", "imitate/thin", "distill/thin", "finetune/thin"]
    assert result.longest_hours == pytest.approx(teacher.hours + imitate.hours + distill.hours + finetune.hours)
    assert "multiply-adds counted once" in result.assumptions["FLOPs"]


def test_stored_answers_are_asked_for_once(data, tmp_path):
    values = chain(data)
    values["stages"]["distill"]["teacher_logits"] = "stored"
    values["stages"]["again"] = {**values["stages"]["distill"], "labels_weight": 0.5}
    result = on(load_recipe(write_job(tmp_path, values)), tmp_path)
    stages = {stage.stage: stage for stage in result.stages}
    wide = stages["teacher/wide"].macs["forward"]
    assert (stages["distill/thin"].macs["teacher"], stages["again/thin"].macs["teacher"]) == (wide, 0)
    assert stages["again/thin"].parents == ("imitate/thin", "teacher/wide")
    once = 2 * IMAGES * 2 * wide / 5e6 / 3600
    assert f"they save {duration(once)} of {duration(2 * once)} on all devices" in result.notes[0]
    assert "(2 epochs x 180 images x 20 bytes, all 10 classes)" in result.notes[0]
    values["stages"].pop("again")
    for teacher_logits in ("stored", "live"):  # for one student there is nothing to save
        values["stages"]["distill"]["teacher_logits"] = teacher_logits
        assert on(load_recipe(write_job(tmp_path, values)), tmp_path).notes == []


def test_students_of_one_stage_ask_together(data, tmp_path):
    recipe = chain(data)
    recipe["networks"]["thinner"] = {**recipe["networks"]["thin"], "depths": [1, 1]}
    kd = {**recipe["stages"]["distill"], "init": None, "train": ["thin", "thinner"]}
    recipe["stages"] = {"teacher": recipe["stages"]["teacher"], "kd": kd}
    recipe = load_recipe(write_job(tmp_path, recipe))
    here, on_cluster, apart = (
        plan(recipe, data_size(recipe), this_machines_cores(1)), on(recipe, tmp_path), on(recipe, tmp_path, together=False)
    )  # fmt: skip
    assert here.notes == [] and "by teacher_logits: stored, they save" in apart.notes[0]
    (_, *together), (_, *one_job), (_, *jobs) = here.stages, on_cluster.stages, apart.stages
    for stages in (together, one_job):
        assert [stage.macs["teacher"] > 0 for stage in stages] == [True, False]
    assert [stage.macs["teacher"] > 0 for stage in jobs] == [True, True]
    assert on_cluster.longest_path == ["teacher/wide", "kd/thin", "kd/thinner"]
    assert apart.longest_path == ["teacher/wide", max(jobs, key=lambda stage: stage.hours).stage]
    hours, alone = [stage.hours for stage in one_job], [stage.hours for stage in jobs]
    assert on_cluster.notes[-1] == (
        f"kd: thin, thinner are one job of {duration(sum(hours))}, {duration(sum(hours))} on all devices; with together: "
        f"false 2 jobs, the longest of {duration(max(alone))}, {duration(sum(alone))} on all devices"
    )
    most = max(sum(stage.memory.values()) for stage in jobs)
    enough_for_one = {"device": SLOW.model_copy(update={"memory_gb": 1e-9 * (most + 1)})}
    assert not any(line.startswith("kd/") for line in on(recipe, tmp_path, together=False, **enough_for_one).warnings)
    [warning] = [line for line in on(recipe, tmp_path, **enough_for_one).warnings if line.startswith("kd/")]
    assert warning.startswith("kd/thin, kd/thinner: need about ")
    assert warning.endswith("; or train the networks one by one: together: false, or --sequential")


def test_seeds_share_the_teacher(job, tmp_path):
    recipes = load_seeds(job, [], [0, 1, 2])
    assert [recipe.name for recipe in recipes] == ["chain", "chain-1", "chain-2"]
    assert [recipe.instances["teacher/wide"].seed for recipe in recipes] == [0, 0, 0]
    assert [recipe.instances["distill/thin"].seed for recipe in recipes] == [0, 1, 2]
    profile = Profile(device=SLOW, timeout_min=10**6)
    seeds = plan_seeds(recipes, data_size(recipes[0]), profile)
    alone = plan(load_recipe(job), data_size(recipes[0]), profile)
    teacher, *students = (stage.hours for stage in alone.stages)
    assert [each.stages[0].state for each in seeds.plans] == ["to do", "shared with chain", "shared with chain"]
    assert seeds.hours == pytest.approx(teacher + 3 * sum(students))
    assert seeds.longest_hours == pytest.approx(alone.longest_hours)


def test_requeues_by_hand(job, tmp_path):
    recipe = load_recipe(job)
    seconds = 3600 * on(recipe, tmp_path).stages[0].hours  # with 30 s to start
    limit_s = 180
    teacher = on(recipe, tmp_path, timeout_min=3, signal_delay_s=20).stages[0]
    assert teacher.requeues == -(-(seconds - limit_s) // (limit_s - 50))  # each loses 20 s before and 30 s after
    assert teacher.hours * 3600 == pytest.approx(seconds + 30 * teacher.requeues)


def test_gpus_wait_for_data(job, tmp_path):
    recipe = load_recipe(job)
    slow_cpus = SLOW.model_copy(update={"images_per_s_per_cpu": 0.5, "tflops": 1.0})
    result = on(recipe, tmp_path, gpus_per_node=2, cpus_per_task=3, device=slow_cpus)
    # 2 epochs of 180 and 2 passes of 60 images at 2 x 3 x 0.5 images a second
    assert result.stages[0].hours * 3600 == pytest.approx(30 + (2 * IMAGES + 2 * VAL) / 3)
    assert any(line.startswith("teacher/wide: a GPU could take") and "decode 2:" in line for line in result.warnings)
    assert any("60 images on 2 GPUs are 30 per GPU, fewer than 32" in line for line in result.warnings)


def test_too_little_memory(job, tmp_path):
    recipe = load_recipe(job)
    warnings = on(recipe, tmp_path, device=SLOW.model_copy(update={"memory_gb": 0.001})).warnings
    assert sum("of it the teacher's, but abacus has" in line for line in warnings) == 2
    assert all("even one image at a time does not fit" in line for line in warnings)
    memory = on(recipe, tmp_path).stages[0].memory
    of_batch = memory["activations"] + memory["transient"] + memory["heap"]
    little = (sum(memory.values()) - 0.6 * of_batch) / 1e9
    warnings = on(recipe, tmp_path, device=SLOW.model_copy(update={"memory_gb": little})).warnings
    assert any("stages.teacher.optim.accumulate=3 would do" in line for line in warnings)
    saved = on(load_recipe(job, ["checkpoints={every_minutes: 60}"]), tmp_path).stages[0].memory
    assert (saved["checkpoint"], memory["checkpoint"]) == (
        0,
        3 * memory["weights"],
    )  # the weights and their momentum, 1.5 times


PEAK = """
import sys, torch
import gowide_dist.train.loop, torch._dynamo, torch.utils.tensorboard
from pathlib import Path
from gowide_dist.pipeline import walk
from gowide_dist.run import Run
from gowide_dist.steps import memory_bytes
before = memory_bytes("VmHWM")  # getrusage's peak would be the parent's at least
walk(Run(Path(sys.argv[1])), ["teacher/wide"])
print("peak", memory_bytes("VmHWM") - before)
"""


def test_memory_is_what_training_takes(data, tmp_path):
    values = chain(data, batch_size=90, log_every_steps=1, checkpoints={})
    values["networks"] = {
        "thin": {"block": "basic", "depths": [1, 1], "base": 64, "stem": "small"},
        "wide": {"widen": "thin", "by": 2},
    }
    prepared = prepare(load_recipe(write_job(tmp_path, values)), tmp_path / "runs")
    command = [sys.executable, "-c", PEAK, str(prepared.run.path)]
    environment = {**os.environ, **KEEP_FREED_MEMORY}  # as the launcher starts it
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    recipe = prepared.recipe
    memory = plan(recipe, data_size(recipe), this_machines_cores(1)).stages[0].memory
    assert int(shown.split()[-1]) == pytest.approx(sum(memory.values()) - IMPORTS, rel=0.25)


def test_what_is_done_and_what_is_left(job, tmp_path):
    recipe, checksums = check_data(load_recipe(job))
    known = identities(recipe, checksums)
    run = Run(tmp_path / "runs" / recipe.name)
    teacher, imitate = run.stage("teacher/wide"), run.stage("imitate/thin")
    for stage_dir in (teacher, imitate):
        stage_dir.claim(known[stage_dir.key])
    teacher.model.write_bytes(b"weights")
    teacher.finish(
        Done(
            stage="teacher", network="wide", fingerprint=fingerprint(known["teacher/wide"]), parents={},
            model_sha256=sha256(teacher.model), top1=1, top5=1, epochs=2, steps=6, images=360, stream="0", seconds=1, world_size=1,
        )
    )  # fmt: skip
    metadata = {"fingerprint": fingerprint(known["imitate/thin"])}
    save_checkpoint(imitate.checkpoints, {}, step=3, metadata=metadata, keep=2)
    before = sorted(tmp_path.rglob("*"))
    stages = {row["stage"]: row for row in json.loads(plan_json(job, tmp_path))["stages"]}
    assert sorted(tmp_path.rglob("*")) == before
    assert (stages["teacher/wide"]["state"], stages["teacher/wide"]["hours"]) == ("done", 0)
    assert (stages["imitate/thin"]["state"], stages["imitate/thin"]["steps_left"]) == ("from step 3", 3)
    assert (stages["distill/thin"]["state"], stages["distill/thin"]["steps_left"]) == ("to do", 6)
    sibling = json.loads(plan_json(job, tmp_path, "name=other"))["stages"][0]
    assert sibling["state"] == f"done in {run.path}"


def plan_json(job, tmp_path, *more):
    result = gowide("plan", job, "--runs", tmp_path / "runs", "--json", *more)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_data_that_is_not_there_yet(tmp_path):
    values = chain(tmp_path / "soon")
    job = write_job(tmp_path, values)
    assert "or give its size with --images N --classes K" in refused("plan", job)
    told = json.loads(plan_json(job, tmp_path, "--images", "600", "--classes", "7"))
    assert told["stages"][0]["images"] == 1200
    assert told["data"]["classes"] == 7
    recipe = load_recipe(ROOT / "jobs" / "imagenet_rn50.yaml", ["data.train=away/imagenet/train.beton"])
    size = data_size(recipe)
    assert (size.train, size.val, size.classes, size.jpegs) == (1_281_167, 50_000, 1000, True)
    with pytest.raises(DataError, match="batch_size: 60 is more than the 59 training images"):
        recipe = load_recipe(job)
        plan(recipe, data_size(recipe, images=59, classes=2), this_machines_cores(1))


def test_imagenet_on_gpus(tmp_path):
    recipe = load_recipe(ROOT / "jobs" / "imagenet_rn50.yaml", ["data.train=away/imagenet/train.beton"])
    profile = Profile(gpus_per_node=8, cpus_per_task=12, timeout_min=600, signal_delay_s=2,
                      device=Device(name="A100", tflops=312, efficiency=0.2, memory_gb=4))  # fmt: skip
    size = data_size(recipe)
    result = plan(recipe, size, profile)
    text = plan_table(result)
    apart = plan_table(plan(recipe, size, profile.model_copy(update={"together": False})))
    assert result.stages[0].total_macs == pytest.approx(3 * 37.1e9 * 90 * 1_281_024, rel=0.01)
    assert "teacher/wide: needs about" in text and "optim.accumulate=" in text
    assert "a validation pass takes" in text
    assert "distill/full, distill/half, distill/quarter: " in apart
    assert "2.69 GB (50 epochs x 1,281,024 images x 42 bytes, 10 best classes)" in apart
    unsaved = recipe.model_copy(update={"checkpoints": recipe.checkpoints.model_copy(update={"every_minutes": None})})
    assert "without periodic checkpoints" in plan_table(plan(unsaved, size, profile))


def test_mistakes_are_one_line(job, tmp_path):
    gpus = tmp_path / "gpus.yaml"
    gpus.write_text("gpus_per_node: 4\n")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("device: {name: x, tflops: fast}\n")
    for arguments, message in [
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        ([job, "stages.distil.epochs=2"], "did you mean 'distill'?"),
        ([job, "--cluster", "nowhere.yaml"], "nowhere.yaml: no such file"),
        ([job, "--cluster", gpus], "does not say how fast its GPUs are"),
        ([job, "--cluster", wrong], "device.tflops: should be a valid number"),
        ([job, "--classes", 3], "has 10; leave the option out"),
        ([job, "data.resolution=20"], "resolution"),
        ([job, "--nproc", 7], "batch_size: 60 is not divisible by 7 processes"),
        ([job, "--measure", "--cluster", "slurm/clusters/cpu.yaml"], "cpu.yaml: no such file"),
        ([job, "--scale", "batch_size=4"], "batch_size: 4 is less than one image for each of the 8 devices of a node"),
    ]:
        assert message in refused("plan", *arguments, cwd=tmp_path)
    for arguments in (["--cluster", ROOT / "slurm/clusters/cpu.yaml"], ["--scale"]):
        assert "leave out --cluster and --scale" in refused("plan", job, "--measure", *arguments)


def test_measured(data, tmp_path):
    """Real steps in two processes; files only where they are temporary."""
    job = write_job(tmp_path, chain(data))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = ("plan", job, "--measure", "--nproc", 2, "--runs", tmp_path / "runs", "--json")
    result = gowide(*command, env={"TMPDIR": str(scratch)})
    assert result.returncode == 0, result.stderr
    planned = json.loads(result.stdout)
    assert all(stage["hours"] > 0 and stage["num_processes"] == 2 for stage in planned["stages"])
    assert sum("measured now" in line for line in planned["assumptions"].values()) == 1
    assert "distill/thin:" in result.stderr and "s a step" in result.stderr
    assert "top-1" not in result.stdout + result.stderr
    assert sorted(tmp_path.iterdir()) == [job, scratch]
    assert not list(scratch.glob("gowide-*"))


@pytest.mark.parametrize(
    ("work", "timeout", "lost", "times"),
    [(10, 10, 2, 0), (11, 10, 2, 1), (18, 10, 2, 1), (19, 10, 2, 2), (26, 10, 2, 2), (11, 10, 10, math.inf)],
)  # fmt: skip
def test_restarts(work, timeout, lost, times):
    assert restarts(work, timeout, lost) == times
    if times and times < math.inf:  # it fits into that many allocations and into none fewer
        assert work + times * lost <= (times + 1) * timeout
        assert work + (times - 1) * lost > times * timeout


def test_the_longest_path():
    parents = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"], "e": []}
    assert longest_path({"a": 1, "b": 5, "c": 2, "d": 1, "e": 6.5}, parents) == (["a", "b", "d"], 7)
    assert longest_path({}, {}) == ([], 0)


def test_weights_that_get_the_datasets_normalisation_are_told(data, tmp_path):
    recipe = chain(data)
    stage = {"train": "wide", "objective": "labels", "epochs": 0, "init": {"file": str(tmp_path / "public.pth")}}
    recipe["stages"] = {"teacher": stage}
    wide = load_recipe(write_job(tmp_path, recipe)).instances["teacher/wide"].architecture
    torch.save(build_network(wide, 10).state_dict(), tmp_path / "public.pth")
    own = [note for note in on(load_recipe(write_job(tmp_path, recipe)), tmp_path).notes if "public.pth" in note]
    assert len(own) == 1
    assert own[0].endswith("published ones mostly expect networks.wide.normalise: imagenet")
    recipe["networks"]["wide"]["normalise"] = "imagenet"
    result = on(load_recipe(write_job(tmp_path, recipe)), tmp_path)
    assert result.notes == result.warnings == []
    torch.save(build_network(wide, 7).state_dict(), tmp_path / "public.pth")
    [warning] = on(load_recipe(write_job(tmp_path, recipe)), tmp_path).warnings
    assert warning.startswith(f"stages.teacher.init.file: {tmp_path}/public.pth: of 7 classes, here are 10")


def test_a_teacher_that_is_normalised_otherwise_takes_memory_for_its_images(job, tmp_path):
    plain, other = (
        on(load_recipe(job, extra), tmp_path).stages for extra in ([], ["networks.wide.normalise=imagenet"])
    )
    pixels = 60 * 3 * 28**2
    assert [stage.memory["images"] // pixels for stage in plain] == [5, 5, 5, 5]
    assert [stage.memory["images"] // pixels for stage in other] == [5, 9, 9, 5]
