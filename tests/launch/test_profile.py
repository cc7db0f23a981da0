import os
from pathlib import Path

import pytest

from gowide_dist.errors import RecipeError
from gowide_dist.launch.profile import Profile, load_profile
from gowide_dist.launch.queue import call, without_options_of_the_shell
from gowide_dist.launch.slurm import Job, Worker, sbatch_script
from gowide_dist.recipe import Recipe
from tests.fashion import chain


def load(tmp_path, text):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return load_profile(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodess: 2", "unknown key 'nodess', did you mean 'nodes'?"),
        ("nodes: 4-1", "nodes: should be a number or a range like 1-4, not '4-1'"),
        ("nodes: 0", "nodes: should be a number or a range like 1-4, not '0'"),
        ("stages: {teacher: {noodes: 1}}", "stages.teacher: unknown key 'noodes', did you mean 'nodes'?"),
        ("sbatch: {time: 3}", "sbatch.time: say it with timeout_min"),
        ("sbatch: {no-requeue: true}", "sbatch.no-requeue: say it with requeue"),
        ("notify: [mail, me]", "notify: should be a valid string"),
        ("together: 1 job", "together: should be a valid boolean"),
        ("requeue: sometimes", "requeue: should be a valid boolean"),
        ("sbatch: {dependency: singleton}", "sbatch.dependency: is set by gowide submit"),
        ("sbatch: {exclusive: false}", "sbatch.exclusive: should be text or a number"),
        ("gpus_per_node: 2\nprocesses_per_node: 3", "there is one process per GPU"),
        ("timeout_min: 1\nsignal_delay_s: 60", "signal_delay_s: should be less than timeout_min"),
        ("setup: module load cuda", "setup: should be a list, not 'module"),
        ("mem_gb: -1", "mem_gb: should be greater than or equal to 0"),
        ("timeout_min: 1 day", "timeout_min: should be minutes, hours:minutes:seconds or days-hours:minutes:seconds"),
        ("timeout_min: 0", "timeout_min: should be greater than or equal to 1"),
        ("timeout_min: 0:00", "timeout_min: should be greater than or equal to 1"),
        ("gpus_per_node: a100", "should be a number, or a type and a number as a100:4, not 'a100'"),
        ("gpus_per_node: 'gpu:a100:4'", "as a100:4, not 'gpu:a100:4'"),
        ("gpu_option: gpus", "gpu_option: should be 'gpus-per-node' or 'gres'"),
        ("srun: [mpi=none]", "srun: 'mpi=none' should be an option, as --mpi=none"),
        ("srun: [--cpu-bind=none]", "say --cpu-bind with cpu_bind"),
        ("srun: [-n3]", "srun: say -n with processes_per_node"),
        ("srun: [--output=x]", "srun: --output is set by gowide submit"),
        ("sbatch: {parsable: true}", "sbatch.parsable: is set by gowide submit"),
        ("setup: [if true]", "setup: bash cannot read it: line 2: syntax error: unexpected end of file"),
        ("setup: ['#SBATCH -N 2']", "setup: '#SBATCH -N 2' comes too late for sbatch"),
        ("notify: echo it's over", "notify: bash cannot read it: line 1: unexpected EOF"),
        ("python: python '", "python: bash cannot read it"),
        ("environment: {NCCL DEBUG: 1}", "environment: 'NCCL DEBUG' should be the name of a variable"),
        ("partition: 3", "partition: should be a valid string"),
        ("- partition", "should hold a mapping"),
    ],
)
def test_faults_are_named_with_their_place(tmp_path, text, message):
    with pytest.raises(RecipeError) as error:
        load(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "cluster.yaml"))
    assert message in str(error.value)


def test_paths_take_home_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("LOCAL", "/local")
    profile = load(tmp_path, "node_local: [~/here, $LOCAL/tmp]\nenvironment: {OUT: $LOCAL}")
    assert [str(path) for path in profile.node_local] == ["/home/me/here", "/local/tmp"]
    assert profile.environment == {"OUT": "$LOCAL"}  # no path of ours
    with pytest.raises(RecipeError, match=r"node_local.0: \$NOT_SET/tmp: the variable NOT_SET is not set"):
        load(tmp_path, "node_local: [$NOT_SET/tmp]")


def test_stages_override_the_profile(tmp_path):
    profile = load(
        tmp_path,
        """
nodes: 1
gpus_per_node: 8
environment: {NCCL_DEBUG: WARN}
stages:
  teacher: {nodes: 2-4, environment: {NCCL_SOCKET_IFNAME: ib0}}
  imitate/thin: {gpus_per_node: 1}
""",
    )
    instances = Recipe.model_validate(chain(tmp_path)).instances
    teacher, imitate, distill = (
        profile.resources(instances[key]) for key in ("teacher/wide", "imitate/thin", "distill/thin")
    )
    assert teacher.num_processes == [16, 24, 32]
    assert teacher.environment == {"NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": "ib0"}
    assert imitate.num_processes == [1]
    assert (distill.num_processes, distill.environment) == ([8], {"NCCL_DEBUG": "WARN"})


def test_an_override_that_does_not_fit(tmp_path):
    profile = Profile(signal_delay_s=300, timeout_min=60, stages={"teacher": {"timeout_min": 2}})
    with pytest.raises(RecipeError, match=r"stage teacher/wide: signal_delay_s: should be less than timeout_min"):
        profile.resources(Recipe.model_validate(chain(tmp_path)).instances["teacher/wide"])


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90:30", 91),
        ("12:00:00", 720),
        ("1-00:00:00", 1440),
        ("2-12", 3600),
        ("0-1:30", 90),
        ("010", 10),
        ("'30'", 30),
        ("1:00:01", 61),
    ],
)
def test_times_as_sbatch_takes_them(tmp_path, text, minutes):
    """YAML 1.1 would read 12:00:00 to the base of 60, as 43,200, and 010 to the base of 8."""
    assert load(tmp_path, f"timeout_min: {text}\nstages: {{teacher: {{timeout_min: {text}}}}}").timeout_min == minutes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpus_per_node: a100:4", ["--gpus-per-node=a100:4"]),
        ("gpus_per_node: a100:4\ngpu_option: gres", ["--gres=gpu:a100:4"]),
        ("gpus_per_node: 4\ngpu_option: gres", ["--gres=gpu:4"]),
        ("mem_gb: 0", ["--mem=0"]),
        ('notify: curl -d "$GOWIDE_STATE" host', ["GOWIDE_STATE=$1 GOWIDE_RUN=/ GOWIDE_STAGE=a/thin $limit "]),
        ("requeue: false", ["#SBATCH --no-requeue", 'sbatch --parsable --dependency="afterany:$id"']),
        ("mem_gb: 0.5", ["--mem=512M"]),
        ("mem_gb: 4.0", ["--mem=4G"]),
        ("timeout_min: 1-00:00:00", ["--time=1440"]),
        ("srun: [--mpi=none, --container-image=/a/b.sqsh]", [" --mpi=none --container-image=/a/b.sqsh "]),
        ("python: apptainer exec --nv image.sif python", [" apptainer exec --nv image.sif python -u -m submitit.core"]),
    ],
)
def test_what_sbatch_gets(tmp_path, text, expected):
    resources = load(tmp_path, text)._merged([], "a job")
    job = Job(("a/thin",), "a", Worker("m", ()), resources)
    script = sbatch_script(job, Path("/shared"), "")
    assert all(words in script for words in expected), script


def test_jobs_without_gpus_where_others_have_gpus_of_a_type(tmp_path):
    profile = load(tmp_path, "gpus_per_node: a100:4\ncpus_per_task: 8\nstages: {finetune: {gpus_per_node: 0}}")
    instances = Recipe.model_validate(chain(tmp_path)).instances
    scripts = [
        sbatch_script(Job(("a/thin",), "a", Worker("m", ()), resources), Path("/shared"), "")
        for resources in (profile.resources(instances["finetune/thin"]), profile.encode_resources())
    ]
    assert not any("gpu" in script for script in scripts)
    assert profile.resources(instances["teacher/wide"]).gpus_of_node == "a100:4"


def test_the_shells_variables_do_not_reach_slurm(monkeypatch):
    variables = {"SBATCH_TIMELIMIT", "SLURM_MEM_PER_CPU", "SLURM_JOB_ID", "SQUEUE_STATES", "SCANCEL_NAME"}
    kept = {"SLURM_CONF", "SLURM_JWT"}
    for name in variables | kept:
        monkeypatch.setenv(name, "1")
    with without_options_of_the_shell():
        assert (variables | kept) & os.environ.keys() == kept
    assert os.environ["SBATCH_TIMELIMIT"] == os.environ["SLURM_JOB_ID"] == "1"
    asked = {line.partition("=")[0] for line in call("env").splitlines()}
    assert (variables | kept) & asked == kept
