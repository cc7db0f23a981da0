"""A real Slurm for the tests in this folder: started once, stopped in the end."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from gowide_dist.launch.queue import read_jobs
from gowide_dist.run import Run, read_metrics
from tests.command import gowide
from tests.fashion import chain, encode_part, write_job

CLUSTER = Path(__file__).parents[2] / "slurm" / "devcluster" / "cluster.sh"
PROGRAMS = ("slurmctld", "slurmdbd", "munged", "mariadbd")
LIMIT_S = 300  # so slow is a machine that is busy with other things; what hangs stays longer
PROFILE = {
    "partition": "main", "nodes": 2, "cpus_per_task": 1, "timeout_min": 30, "signal_delay_s": 20, "cpu_bind": "none",
    "node_local": [],
}  # fmt: skip


class Cluster:
    """The dev cluster, and what tests do to its jobs."""

    def __init__(self, folder):
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # each has a cluster of its own
        apart = {"PORT0": str(17400 + 100 * worker), "FIRST_JOB": str(1 + 1000 * worker)}
        self.env = {**os.environ, "DEVCLUSTER_DIR": str(folder), **apart}
        self.conf = folder / "etc" / "slurm.conf"

    def __call__(self, *arguments):
        return self.run(CLUSTER, *arguments, env=self.env)

    @staticmethod
    def run(*command, **options):
        result = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=120, check=False, **options
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def processes(self, job_id):
        """Process ids of a job's training processes, by rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                program, *arguments = (path / "cmdline").read_text().split("\0")
                entries = (path / "environ").read_text(errors="replace").split("\0")
                environ = dict(entry.split("=", 1) for entry in entries if "=" in entry)
                is_training = "python" in program and "submitit.core._submit" in arguments
                if is_training and environ.get("SLURM_JOB_ID") == job_id:
                    found[int(environ["SLURM_PROCID"])] = int(path.name)
        return found


def until(moment, what, limit_s=LIMIT_S):
    deadline = time.monotonic() + limit_s
    while not moment():
        assert time.monotonic() < deadline, f"{what}: never came"
        time.sleep(0.2)


class Submitted:
    """A run on the cluster."""

    def __init__(self, cluster, folder, recipe, **profile):
        self.cluster = cluster
        self.job = write_job(folder, recipe)
        self.profile = folder / "profile.yaml"
        self.profile.write_text(yaml.safe_dump({**PROFILE, **profile}))
        self.runs = folder / "runs"
        self.run = Run(self.runs / recipe["name"])

    def submit(self, *arguments):
        result = gowide("submit", self.job, "--cluster", self.profile, "--runs", self.runs, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def id(self, key):
        return read_jobs(self.run.slurm)[key][-1]

    def squeue(self, key, field):
        return self.cluster.run("squeue", "-h", "--states=all", "-j", self.id(key), f"--Format={field}:60").strip()

    def log(self, key):
        path = self.run.slurm / f"{self.id(key)}_0_log.out"
        return path.read_text() if path.exists() else ""

    def status(self):
        result = gowide("status", self.run.path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def step(self, key):
        rows = read_metrics(self.run.stage(key).metrics)
        return rows[-1]["step"] if rows else 0

    def reaches(self, key, step):
        self.until(key, lambda: self.step(key) >= step, f"step {step}")

    def finishes(self, key):
        self.until(key, lambda: (self.run.stage(key).path / "done.json").exists(), "the end")
        return self.run.stage(key).done

    def until(self, key, moment, what):
        """Wait for a moment, while the job is alive; Slurm is asked seldom, for it may take seconds to answer."""
        asked = time.monotonic()

        def there():
            nonlocal asked
            if moment():
                return True
            if time.monotonic() - asked > 3:
                assert self.squeue(key, "State") not in ("FAILED", "CANCELLED", "TIMEOUT"), f"failed before {what}"
                asked = time.monotonic()
            return False

        try:
            until(there, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.status()}\n{self.log(key)}") from error

    def signal(self, key, number, *ranks):
        processes = self.cluster.processes(self.id(key))
        for rank in ranks or processes:
            os.kill(processes[rank], number)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    missing = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing:
        pytest.skip(f"no Slurm here ({', '.join(missing)}): `make setup-test` installs it")
    if os.getuid():
        pytest.skip("only root can give the nodes namespaces of their own")
    found = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        found("up")
        yield found
    finally:
        found("down")


@pytest.fixture(scope="module", autouse=True)
def commands_reach_it(cluster):
    """Files of other folders that come in between find no Slurm."""
    os.environ["SLURM_CONF"] = str(cluster.conf)
    yield
    del os.environ["SLURM_CONF"]


@pytest.fixture(autouse=True)
def empty_cluster(cluster):
    """Every test begins and ends with all nodes there and no jobs."""
    yield
    for job_id in cluster.run("squeue", "-h", "-o", "%i").split():
        for process in cluster.processes(job_id).values():
            os.kill(process, signal.SIGCONT)
        cluster.run("scancel", job_id)
    until(lambda: not cluster.run("squeue", "-h"), "an empty queue")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """600 training and 200 validation images: 10 steps an epoch."""
    return encode_part(tmp_path_factory.mktemp("fashion"), 600, 200)


@pytest.fixture(scope="session")
def long_stage(data):
    """A recipe of one stage with 300 steps."""
    recipe = chain(data, name="long", log_every_steps=10, eval_every_epochs=15, checkpoints={"every_steps": 100})
    recipe["stages"] = {"teacher": {**recipe["stages"]["teacher"], "epochs": 30}}
    return recipe


@pytest.fixture(scope="module")
def undisturbed(cluster, long_stage, tmp_path_factory):
    """What comes of it when nothing happens."""
    submitted = Submitted(cluster, tmp_path_factory.mktemp("undisturbed"), long_stage)
    submitted.submit()
    return submitted.finishes("teacher/wide")


@pytest.fixture
def long(cluster, long_stage, tmp_path):
    """A function that submits the long stage."""

    def submit(**profile):
        submitted = Submitted(cluster, tmp_path, long_stage, **profile)
        submitted.submit()
        return submitted

    return submit
