"""Unusual disks and files of users: concurrent encodes, linked and unreadable folders, odd images."""

import os
import signal
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gowide_dist.data import decode, sources
from gowide_dist.data.encode import Options, encode
from gowide_dist.data.images import read_rgb
from gowide_dist.data.info import read_dataset_info
from gowide_dist.data.loader import Loader
from gowide_dist.data.order import quasi_random_order, read_ahead_schedule
from gowide_dist.data.verify import verify_dataset
from gowide_dist.errors import DataError
from gowide_dist.files import try_lock
from gowide_dist.timeline import Batching
from tests.command import GOWIDE, LIMIT_S
from tests.data.conftest import write_image_folder
from tests.idx import write_fashion_mnist

JPG = Options(jpg_share=1.0, workers=1)
CROP = decode.RandomResizedCrop(True, 0.1, 1.0, 3 / 4, 4 / 3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile") / "images"
    write_image_folder(root, 12, 8, num_classes=2)
    return root


def test_two_encodes_into_one_folder(images: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    with (
        try_lock(out / ".lock") as locked,
        pytest.raises(DataError, match="another process is encoding into it; wait for it"),
    ):
        assert locked
        encode("imagefolder", out, images, JPG)
    encode("imagefolder", out, images, JPG)
    verify_dataset(out)
    assert {path.name for path in out.iterdir()} == {"train.beton", "val.beton", "dataset.json", ".lock"}


def test_out_may_be_a_link_to_another_disk_or_the_working_directory(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disk = Path("/dev/shm") / f"gowide-test-{os.getpid()}"
    disk.mkdir()
    try:
        (tmp_path / "link").symlink_to(disk)
        encode("imagefolder", tmp_path / "link", images, JPG)
        verify_dataset(disk)
    finally:
        for path in disk.iterdir():
            path.unlink()
        disk.rmdir()
    (tmp_path / "working directory").mkdir()
    monkeypatch.chdir(tmp_path / "working directory")
    encode("imagefolder", Path(), images, JPG)
    verify_dataset(tmp_path / "working directory")


def test_existing_files_are_not_overwritten(images: Path, tmp_path: Path):
    encode("imagefolder", tmp_path / "existing", images, JPG)
    (tmp_path / "existing" / "dataset.json").unlink()
    before = (tmp_path / "existing" / "train.beton").read_bytes()
    with pytest.raises(DataError, match=r"existing: holds train\.beton, which was not encoded there; move it"):
        encode("imagefolder", tmp_path / "existing", images, JPG)
    with pytest.raises(DataError, match=r"existing: is the folder of the images; choose another --out"):
        encode("ffcv", tmp_path / "existing", tmp_path / "existing", Options(None, subset=4))
    assert (tmp_path / "existing" / "train.beton").read_bytes() == before


def test_leftovers_of_a_killed_encode_are_replaced(images: Path, tmp_path: Path):
    """Killed while it moved its files up: train.beton had been moved, val.beton not yet."""
    out = tmp_path / "out"
    (out / ".partial").mkdir(parents=True)
    for leftover in (out / "train.beton", out / ".partial" / "val.beton", out / ".partial" / "dataset.json"):
        leftover.write_bytes(b"leftover")
    encode("imagefolder", out, images, JPG)
    verify_dataset(out)
    assert {path.name for path in out.iterdir()} == {"train.beton", "val.beton", "dataset.json", ".lock"}


def test_a_folder_that_cannot_be_read_is_named(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def scandir(path):
        if Path(path) == images / "val" / "class 1":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    real = os.scandir
    monkeypatch.setattr(sources.os, "scandir", scandir)
    with pytest.raises(DataError, match=r"val/class 1: cannot be read \(Permission denied\)"):
        encode("imagefolder", tmp_path / "out", images, JPG)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_an_encode(tmp_path: Path, number: int):
    write_image_folder(tmp_path / "images", 400, 8, num_classes=2, least_px=600, most_px=700)
    folders = ["--root", tmp_path / "images", "--out", tmp_path / "out"]
    command = [GOWIDE, "encode", "imagefolder", *map(str, folders), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def group() -> list[int]:
        alive = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == process.pid and fields[0] != "Z":
                alive.append(int(stat.parent.name))
        return alive

    try:
        deadline = time.monotonic() + LIMIT_S
        written = tmp_path / "out" / ".partial" / "train.beton"
        while not (written.exists() and written.stat().st_size):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(LIMIT_S) == (143 if number == signal.SIGTERM else -9)
        while left := group():
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        assert (tmp_path / "out" / ".partial").exists()  # the next encode goes on from there
        assert "Traceback" not in process.stderr.read()
    finally:
        if group():
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


def test_a_constant_channel(tmp_path: Path):
    for split in ("train", "val"):
        folder = tmp_path / "images" / split / "one"
        folder.mkdir(parents=True)
        for index in range(3):
            pixels = np.random.default_rng(index).integers(0, 256, (9, 9, 3), np.uint8)
            pixels[..., 1], pixels[..., 2] = 0, 6
            Image.fromarray(pixels).save(folder / f"{index}.png")
    info = encode("imagefolder", tmp_path / "out", tmp_path / "images", Options(jpg_share=0.0, workers=1))
    assert info.std[0] > 0.2
    assert info.std[1:] == pytest.approx((1 / 255, 1 / 255), abs=1e-6)
    assert read_dataset_info(tmp_path / "out" / "train.beton") == info


def test_exif_that_pillow_cannot_write(tmp_path: Path):
    """Pillow reads a tag of the wrong type (a width in letters) but refuses to write it: only the orientation counts."""
    entries = struct.pack(">HHHI4s", 2, 0x0100, 2, 4, b"abc\0") + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + entries + b"\0\0\0\0"
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    Image.fromarray(pixels).save(tmp_path / "odd.jpg", exif=exif, quality=95)
    upright = read_rgb((tmp_path / "odd.jpg").read_bytes()).pixels
    assert upright.shape == (16, 8, 3)
    assert upright[:6].max() < 60
    assert upright[10:].min() > 200


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_known_scale_are_bad_images(tmp_path: Path, dtype):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "odd.tif")
    with pytest.raises(ValueError, match="white level is unknown"):
        read_rgb((tmp_path / "odd.tif").read_bytes())


@pytest.mark.parametrize("path", ["train/caf\udce9", "root\udce9/train/one"])
def test_names_that_are_no_utf8_are_refused_at_once(tmp_path: Path, path: str):
    folder = tmp_path / path
    folder.mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "a.png")
    root = tmp_path / Path(path).parts[0] if path.startswith("root") else tmp_path
    with pytest.raises(DataError, match=r"\\udce9.*: the name is not valid UTF-8; rename it"):
        encode("imagefolder", tmp_path / "out", root, Options(held_out=1, workers=1))
    assert not (tmp_path / "out").exists()


def test_a_bad_file_whose_name_is_no_utf8_is_skipped(images: Path, tmp_path: Path):
    write_image_folder(tmp_path / "images", 4, 4, num_classes=1)
    (tmp_path / "images" / "train" / "class 0" / "caf\udce9.jpg").write_bytes(b"no image")
    encode("imagefolder", tmp_path / "out", tmp_path / "images", Options(jpg_share=1.0, workers=1, skip_bad=True))
    assert b"caf\xe9.jpg\tnot an image in a format that Pillow knows" in (tmp_path / "out" / "skipped.txt").read_bytes()


def test_fewer_validation_images_than_processes(small_set: Path, tmp_path: Path):
    write_fashion_mnist(tmp_path / "idx", 20, 2)
    encode("fashion-mnist", tmp_path / "out", tmp_path / "idx")
    for rank in range(3):
        with pytest.raises(DataError, match=r"val\.beton: 2 images for 3 processes; start at most 2"):
            Loader(tmp_path / "out" / "val.beton", Batching(6, 3, rank), train=False, resolution=28)


def test_free_memory_is_checked_before_allocation(small_set: Path):
    with pytest.raises(DataError, match=r"loading takes .* GiB, .* GiB are free; take a smaller batch"):
        Loader(small_set / "train.beton", Batching(600), train=True, geometry=CROP, resolution=300_000)


def test_a_resumed_epoch_reads_ahead_only_the_pages_that_are_left():
    pages = np.arange(241) // 10  # a page for every ten images: 25
    steps_per_epoch = 60
    _, needed = quasi_random_order(pages, window_pages=1, seed=0, epoch=0)
    whole, rest, none = (
        read_ahead_schedule(needed, window_pages=1, steps_per_epoch=steps_per_epoch, start=start)
        for start in (0, 40, steps_per_epoch)
    )
    assert ([page for _, page in whole], len(none)) == (needed.tolist(), 0)
    assert list(rest) == list(whole)[-len(rest) :]
    assert 8 <= len(rest) <= 10  # of 60 steps 20 are left, a third


def test_a_pipe_among_the_images_is_a_bad_image(images: Path, tmp_path: Path):
    os.mkfifo(next(path for path in sorted(images.rglob("*")) if path.is_file()).with_name("pipe.png"))
    with pytest.raises(DataError, match=r"pipe.png \(not a regular file\)"):
        encode("imagefolder", tmp_path / "out", images, Options(workers=1))
