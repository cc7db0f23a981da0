"""An encode that stops goes on from what it has, and ends with the bytes of one that never stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gowide_dist.data import workers
from gowide_dist.data.encode import Options, encode
from gowide_dist.data.images import encode_sample
from gowide_dist.data.partial import _RECORD
from gowide_dist.errors import DataError
from gowide_dist.stop import WARNING_SIGNAL
from tests.command import GOWIDE, LIMIT_S, killed_when
from tests.data.conftest import photo, write_image_folder
from tests.idx import write_fashion_mnist

HALF_JPG = Options(jpg_share=0.5, workers=1)


def content(out: Path) -> dict[str, bytes]:
    assert not (out / ".partial").exists()
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


class Watched:
    """encode_sample, counted, and with something that happens at call number `at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = -1, error: BaseException | None = None):
        self.count, self.at, self.error = 0, at, error
        monkeypatch.setattr(workers, "encode_sample", self)

    def __call__(self, *arguments):
        self.count += 1
        if self.count == self.at and self.error:
            raise self.error
        return encode_sample(*arguments)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_image_folder(tmp_path / "photos", 60, 12)
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def large_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough of them for an encode to be caught in the middle."""
    root = tmp_path_factory.mktemp("large") / "photos"
    write_image_folder(root, 200, 8, num_classes=2, least_px=600, most_px=700)
    return root


@pytest.mark.parametrize("at", [1, 2, 30, 60, 61, 70])
def test_an_interrupted_encode_goes_on(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int):
    encode("imagefolder", tmp_path / "whole", photos, HALF_JPG)
    Watched(monkeypatch, at, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encode("imagefolder", tmp_path / "out", photos, HALF_JPG)
    # A chunk of 8 that is not finished is lost.
    done = (at - 1) // 8 * 8 if at <= 60 else 60 + (at - 61) // 8 * 8
    assert (tmp_path / "out").exists() == (done > 0)
    again = Watched(monkeypatch)
    encode("imagefolder", tmp_path / "out", photos, HALF_JPG)
    assert again.count == 72 - done
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_stopped_again_and_again(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encode("imagefolder", tmp_path / "whole", photos, HALF_JPG)
    total = 0
    for _ in range(20):
        watched = Watched(monkeypatch, 13, SystemExit(143))
        try:
            encode("imagefolder", tmp_path / "out", photos, HALF_JPG)
            break
        except SystemExit:
            total += watched.count
    assert total < 2 * 72
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def damage(path: Path) -> bytes:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    return whole


@pytest.mark.parametrize("mend", ["skip", "remove", "replace", "restore", "add", "subset", "quality"])
def test_a_bad_image_does_not_cost_the_others(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mend: str):
    """Whatever is done about it: what can be taken over is, wherever it belongs now."""
    bad = photos / "train" / "class 2" / "0022.jpg"
    whole = damage(bad)
    with pytest.raises(DataError, match=r"bad images: 1,.*0022\.jpg \(premature end of data segment\)"):
        encode("imagefolder", tmp_path / "out", photos, HALF_JPG)
    options = HALF_JPG
    if mend == "skip":
        options = Options(jpg_share=0.5, skip_bad=True, workers=1)
    elif mend == "restore":
        bad.write_bytes(whole)
    elif mend == "replace":
        Image.fromarray(photo(np.random.default_rng(5), 80, 60)).save(bad)
    else:
        bad.unlink()
    if mend == "add":
        for name in ("0000a.jpg", "z.jpg"):
            Image.fromarray(photo(np.random.default_rng(6), 50, 60)).save(photos / "train" / "class 1" / name)
    if mend == "subset":
        options = Options(jpg_share=0.5, subset=20, workers=1)
    if mend == "quality":
        options = Options(jpg_share=0.5, quality=80, workers=1)
    again = Watched(monkeypatch)
    encode("imagefolder", tmp_path / "out", photos, options)
    # With another number of images others of them become JPEG.
    most = {"skip": 1, "restore": 1, "replace": 1, "quality": 71, "subset": 20 + 12}.get(mend, 45)
    assert again.count <= most
    monkeypatch.undo()
    encode("imagefolder", tmp_path / "whole", photos, options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_removed_image_costs_no_other_where_all_are_stored_alike(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = Options(jpg_share=1.0, workers=1)
    bad = photos / "train" / "class 2" / "0022.jpg"
    damage(bad)
    with pytest.raises(DataError, match="bad images: 1,"):
        encode("imagefolder", tmp_path / "out", photos, options)
    bad.unlink()
    again = Watched(monkeypatch, 1, KeyboardInterrupt())
    encode("imagefolder", tmp_path / "out", photos, options)
    assert again.count == 0
    monkeypatch.undo()
    encode("imagefolder", tmp_path / "whole", photos, options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_good_image_that_has_changed_meanwhile_is_encoded_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Watched(monkeypatch, 57, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encode("imagefolder", tmp_path / "out", photos, HALF_JPG)
    monkeypatch.undo()
    for path in (photos / "train" / "class 0").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    for name in ("out", "whole"):
        encode("imagefolder", tmp_path / name, photos, HALF_JPG)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_pixels_in_memory_go_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_fashion_mnist(tmp_path / "idx", 40, 20)
    encode("fashion-mnist", tmp_path / "whole", tmp_path / "idx")
    Watched(monkeypatch, 26, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encode("fashion-mnist", tmp_path / "out", tmp_path / "idx")
    again = Watched(monkeypatch)
    encode("fashion-mnist", tmp_path / "out", tmp_path / "idx")
    assert again.count == 60 - 24
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_torn_journal_and_images_without_a_record(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As after a power cut."""
    encode("imagefolder", tmp_path / "whole", photos, HALF_JPG)
    Watched(monkeypatch, 50, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encode("imagefolder", tmp_path / "out", photos, HALF_JPG)
    monkeypatch.undo()
    partial = tmp_path / "out" / ".partial"
    journal = partial / "train.journal"
    os.truncate(journal, journal.stat().st_size - 100)
    with (partial / "train.beton").open("ab") as file:
        file.write(b"rubbish" * 1000)
    shutil.copytree(tmp_path / "out", tmp_path / "short")
    os.truncate(
        tmp_path / "short" / ".partial" / "train.beton", (partial / "train.beton").stat().st_size // 2 * 2 - 30_000
    )
    for name in ("out", "short"):
        encode("imagefolder", tmp_path / name, photos, HALF_JPG)
        assert content(tmp_path / name) == content(tmp_path / "whole")


@pytest.mark.parametrize("damaged", ["first", "middle", "all", "moments", "offset", "version"])
def test_damage_to_what_a_stopped_encode_has_left(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damaged: str
):
    encode("imagefolder", tmp_path / "whole", photos, HALF_JPG)
    Watched(monkeypatch, 50, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encode("imagefolder", tmp_path / "out", photos, HALF_JPG)
    partial = tmp_path / "out" / ".partial"
    data, journal = np.memmap(partial / "train.beton"), np.memmap(partial / "train.journal", _RECORD)
    if damaged in ("first", "middle", "all"):
        numbers = {"first": [0], "middle": [20, 21], "all": range(48)}[damaged]
        data[[int(journal["offset"][number]) + 30 for number in numbers]] ^= 255
    elif damaged == "moments":
        numbers = [3]
        journal["moments"][3] += 1
    else:  # nothing that follows can be trusted
        numbers = range(48)
        journal["offset"][:] = 2**64 - 1 if damaged == "offset" else int.from_bytes(b"0aaf6404", "little")
    again = Watched(monkeypatch)
    encode("imagefolder", tmp_path / "out", photos, HALF_JPG)
    assert again.count == 72 - 48 + len(numbers)
    note = (
        "train.journal: damaged, or of another version" if damaged in ("offset", "version") else "damaged on the disk"
    )
    assert note in capsys.readouterr().err
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_after_a_full_disk(tmp_path: Path):
    """On a file system of two megabytes, which then gets larger, in a mount namespace of its own."""
    write_fashion_mnist(tmp_path / "idx", 2000, 20)
    (tmp_path / "small").mkdir()
    command = f"{GOWIDE} encode fashion-mnist --root idx"
    script = (
        f"mount -t tmpfs -o size=2m tmpfs small && {command} --out small/out; echo status $?;"
        f"mount -o remount,size=20m small && {command} --out small/out && {command} --out whole && "
        "cmp small/out/train.beton whole/train.beton && cmp small/out/dataset.json whole/dataset.json"
    )
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert "gowide: small/out: disk full or quota exceeded; free space and run the same command again" in done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("status 2\n")
    (before,) = re.findall(r"^(\d+) of 2,000 images have been encoded before", done.stderr, re.MULTILINE)
    assert int(before) > 600  # of the 800 that two megabytes hold


def test_a_killed_command_goes_on(large_photos: Path, tmp_path: Path):
    arguments = ["encode", "imagefolder", "--root", large_photos, "--out", tmp_path / "out", "--workers", "1"]
    data = tmp_path / "out" / ".partial" / "train.beton"
    killed_when(lambda: data.exists() and data.stat().st_size > 1 << 23, *arguments)
    encode("imagefolder", tmp_path / "out", large_photos, Options(jpg_share=1.0, workers=1))
    encode("imagefolder", tmp_path / "whole", large_photos, Options(jpg_share=1.0, workers=1))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("number", [WARNING_SIGNAL, signal.SIGTERM])
def test_a_job_that_is_warned_or_ended_goes_on(large_photos: Path, tmp_path: Path, number: int):
    """Slurm signals every process of the job: the status is what `launch.slurm` queues it again for."""
    out, options = tmp_path / "out", Options(jpg_share=1.0, workers=2)
    main = "import sys; from gowide_dist.launch.encode import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["imagefolder", str(out), str(large_photos), json.dumps(asdict(options))]
    command = [sys.executable, "-c", main, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        data = out / ".partial" / "train.beton"
        while not (data.exists() and data.stat().st_size > (1 << 23) + 500_000):  # some images, not a part of one
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        os.killpg(process.pid, number)
        assert process.wait(LIMIT_S) == 128 + number
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    again = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
    (before,) = re.findall(r"^(\d+) of 200 images have been encoded before", again.stderr, re.MULTILINE)
    assert int(before) > 0
    encode("imagefolder", tmp_path / "whole", large_photos, options)
    assert content(out) == content(tmp_path / "whole")
