"""Encoding as a job of its own."""

import yaml

from gowide_dist.data.verify import verify_dataset
from gowide_dist.launch.queue import read_jobs
from tests.command import gowide
from tests.data.conftest import write_image_folder
from tests.fashion import chain
from tests.slurm.conftest import PROFILE, Submitted, until


def test_encode_as_a_job(cluster, tmp_path):
    write_image_folder(tmp_path / "images", 200, 40)
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump({**PROFILE, "cpus_per_task": 2}))
    arguments = ["encode", "imagefolder", "--out", tmp_path / "data", "--cluster", profile]

    sent = gowide(*arguments, "--root", tmp_path / "nowhere")
    assert sent.returncode == 0, sent.stderr
    until(lambda: not cluster.run("squeue", "-h"), "the end of the job")
    log = tmp_path / "data.slurm" / f"{read_jobs(tmp_path / 'data.slurm')['encode'][-1]}_0_log.out"
    assert f"{tmp_path / 'nowhere' / 'train'}: not found" in log.read_text()
    assert not (tmp_path / "data").exists()

    profile.write_text(yaml.safe_dump({**PROFILE, "cpus_per_task": 2, "sbatch": {"hold": True}}))
    sent = gowide(*arguments, "--root", tmp_path / "images")
    job_id = read_jobs(tmp_path / "data.slurm")["encode"][-1]
    log = tmp_path / "data.slurm" / f"{job_id}_0_log.out"
    assert sent.stdout.split() == [str(tmp_path / "data"), "job", job_id, str(log)]
    again = gowide(*arguments, "--root", tmp_path / "images")
    assert f"job {job_id} already" in again.stdout
    recipe = chain(tmp_path / "data", name="early")
    recipe["data"] |= {"resolution": 32, "augment": {"crop": {}}, "center_crop": 1.0}
    recipe["stages"] = {"teacher": recipe["stages"]["teacher"]}
    early = Submitted(cluster, tmp_path, recipe, nodes=1)
    assert "after encode of data" in early.submit()
    assert early.squeue("teacher/wide", "Reason") == "Dependency"
    cluster.run("scontrol", "release", job_id)
    until(lambda: not cluster.run("squeue", "-h"), "the end of the job")
    info = verify_dataset(tmp_path / "data", workers=1)
    assert {name: split.samples for name, split in info.splits.items()} == {"train": 200, "val": 40}
    assert "encoding train  200 images" in log.read_text()
    assert early.run.stage("teacher/wide").done.images == 2 * 180
    assert early.run.recipe().data.classes == len(info.classes)
