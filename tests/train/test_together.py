"""Students that train together end with the bits that they have alone, and the teacher runs once for all of them."""

import itertools
import shutil

import pytest

from gowide_dist import load_recipe
from gowide_dist.identity import fingerprint
from gowide_dist.networks.teacher import Teacher
from gowide_dist.pipeline import walk
from gowide_dist.prepare import prepare
from gowide_dist.run import Run, read_metrics
from gowide_dist.train import loop, student
from gowide_dist.train.checkpoint import whole_checkpoints
from gowide_dist.train.student import TrainingError
from tests import fashion
from tests.command import gowide, killed_when
from tests.fashion import chain, encode_part, without_times, write_job

NETWORKS = ["thin", "slim", "narrow"]
STAGES = ["imitate", "distill", "finetune"]


def students(data):
    """The tiny chain with three students, one of them thin in all its channels; batches in parts, averaged weights."""
    recipe = chain(data)
    thin = recipe["networks"]["thin"]
    recipe["networks"] |= {"slim": {**thin, "width": 0.25}, "narrow": {**thin, "width": 1.0, "channels": 0.5}}
    for name in STAGES:
        recipe["stages"][name] |= {"train": NETWORKS}
    recipe["stages"]["distill"] |= {
        "epochs": 1,
        "optim": {"lr": 0.05, "accumulate": 2, "ema": 0.9},
        "mixup": 0.2,
        "cutmix": 1.0,
    }
    return recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return encode_part(tmp_path_factory.mktemp("fashion"), 240, 100)


@pytest.fixture(scope="module")
def taught(data, tmp_path_factory):
    """A folder of runs with one that has trained the teacher."""
    runs = tmp_path_factory.mktemp("taught")
    fashion.train(runs, students(data), "teacher")
    return runs


@pytest.fixture
def train(data, taught, tmp_path):
    """Train stages under that teacher in this process; the run."""

    def run(*overrides, folder="runs", only=tuple(STAGES), sequential=False):
        runs = tmp_path / folder
        if not (runs / "chain").exists():
            shutil.copytree(taught / "chain", runs / "chain")
        recipe = load_recipe(write_job(tmp_path, students(data)), overrides)
        prepared = prepare(recipe, runs, only=list(only))
        walk(prepared.run, [instance.key for instance in prepared.unfinished], sequential=sequential)
        return prepared.run

    return run


def results(run, stages=STAGES):
    """What must be equal of every student: its bits, what it saw, what it is, and what was measured on the way."""
    found = {}
    for key in (f"{stage}/{network}" for stage in stages for network in NETWORKS):
        done = run.stage(key).done
        lines = without_times(read_metrics(run.stage(key).metrics))
        found[key] = done.model_sha256, done.stream, done.fingerprint, done.top1, lines
    return found


class PowerCut(BaseException):
    pass


def test_the_same_bits_as_alone(train, monkeypatch, capsys):
    asked, ask = itertools.count(), Teacher._cached
    computed = itertools.count()

    def counting(self, images, question, compute):
        next(asked)
        return ask(self, images, question, lambda own: (next(computed), compute(own))[1])

    monkeypatch.setattr(Teacher, "_cached", counting)
    together = train()
    assert "distill/{thin,slim,narrow}" not in capsys.readouterr().out  # it prints what is done, each by its name
    assert next(asked) == 3 * next(computed)
    assert results(together) == results(train(folder="sequential", sequential=True))
    assert len({done for done, *_ in results(together).values()}) == 9
    seconds = [together.stage(f"distill/{name}").done.seconds for name in NETWORKS]
    assert len(set(seconds)) == 1


@pytest.mark.parametrize("saved", [1, 2, 3])
def test_restarts_are_exact(train, monkeypatch, saved):
    """A power cut after the first, the second or all of them have saved step 6: all continue at one step."""
    undisturbed = train(only=["imitate"])
    save, saves = student.save_checkpoint, itertools.count(1)

    def save_and_fail(folder, state, *, step, **rest):
        save(folder, state, step=step, **rest)
        if step == 6 and next(saves) == saved:
            raise PowerCut

    monkeypatch.setattr(student, "save_checkpoint", save_and_fail)
    with pytest.raises(PowerCut):
        train(only=["imitate"], folder="cut")
    monkeypatch.undo()
    starts = []
    start = student.Student.start
    monkeypatch.setattr(
        student.Student, "start", lambda self, step, state: (starts.append(step), start(self, step, state))[1]
    )
    run = train(only=["imitate"], folder="cut")
    assert starts == [6 if saved == 3 else 3] * 3
    assert results(run, ["imitate"]) == results(undisturbed, ["imitate"])


def test_students_ahead_of_the_others_train_alone(train, monkeypatch):
    """With one checkpoint kept there is no step in common after a power cut between two saves."""
    undisturbed = train(only=["imitate"])
    save, saves = student.save_checkpoint, itertools.count(1)

    def save_and_fail(*arguments, **rest):
        save(*arguments, **rest)
        if next(saves) == 4:  # the first student's second
            raise PowerCut

    monkeypatch.setattr(student, "save_checkpoint", save_and_fail)
    with pytest.raises(PowerCut):
        train("checkpoints.keep=1", only=["imitate"], folder="cut")
    monkeypatch.undo()
    run = Run(undisturbed.path.parent.parent / "cut" / "chain")
    places = [run.stage(f"imitate/{name}") for name in NETWORKS]
    steps = [whole_checkpoints(place.checkpoints, fingerprint(place.read_identity())) for place in places]
    assert steps == [[6], [3], [3]]
    assert results(train("checkpoints.keep=1", only=["imitate"], folder="cut"), ["imitate"]) == results(
        undisturbed, ["imitate"]
    )


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (0, "1, before anything is learnt; look at the weights that stages.imitate starts from"),
        (4, r"5 .*imitate/slim/checkpoints/step-000000003\.pt"),
    ],
)
def test_a_non_finite_loss_names_its_student(train, monkeypatch, step, says):
    train_step = loop.StageTraining._train_step

    def spoilt(self, *arguments):
        for each in self.students:
            if each.instance.network_name == "slim" and self.step == step:
                each.objective.student.conv1.weight.data[:] = float("nan")
        train_step(self, *arguments)

    monkeypatch.setattr(loop.StageTraining, "_train_step", spoilt)
    with pytest.raises(TrainingError, match=f"imitate/slim: the loss is not finite at step {says}"):
        train(only=["imitate"])


def test_two_processes_killed_and_continued(data, taught, tmp_path):
    """`gowide run` trains them together, also after SIGKILL; `--sequential` one after the other: the same bits."""
    job = write_job(tmp_path, students(data))
    for folder in ("together", "sequential"):
        shutil.copytree(taught / "chain", tmp_path / folder / "chain")
    command = ("run", job, "--nproc", 2, "--only", "imitate", "--runs", tmp_path / "together")
    run = Run(tmp_path / "together" / "chain")
    killed_when((run.stage("imitate/narrow").checkpoints / "step-000000003.json").exists, *command)
    result = gowide(*command)
    assert result.returncode == 0, result.stderr
    assert "imitate/{thin,slim,narrow}  continues at step" in result.stdout
    result = gowide(*command[:-1], tmp_path / "sequential", "--sequential")
    assert result.returncode == 0, result.stderr
    assert results(run, ["imitate"]) == results(Run(tmp_path / "sequential" / "chain"), ["imitate"])
