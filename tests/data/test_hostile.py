"""What users' disks and files come up with: encodings that meet, odd places, odd images."""

import os
import signal
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gowide_dist.data import decode, memory, sources
from gowide_dist.data.encode import Options, encode_fashion_mnist, encode_ffcv, encode_image_folder
from gowide_dist.data.images import read_rgb
from gowide_dist.data.info import read_dataset_info
from gowide_dist.data.loader import Loader
from gowide_dist.data.verify import verify_dataset
from gowide_dist.errors import DataError
from gowide_dist.files import try_lock
from gowide_dist.timeline import Batching
from tests.command import GOWIDE, LIMIT_S
from tests.data.conftest import write_image_folder
from tests.idx import write_fashion_mnist

ONE = Options(jpg_share=1.0, workers=1)
CROP = decode.RandomCrop(True, 0.1, 1.0, 3 / 4, 4 / 3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile") / "images"
    write_image_folder(root, 12, 8, num_classes=2)
    return root


def test_two_encodes_into_one_folder(images: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    with (
        try_lock(out / ".lock") as mine,
        pytest.raises(DataError, match="another process is encoding into it; wait for it"),
    ):
        assert mine
        encode_image_folder(out, images, ONE)
    encode_image_folder(out, images, ONE)
    verify_dataset(out)
    assert {path.name for path in out.iterdir()} == {"train.beton", "val.beton", "dataset.json", ".lock"}


def test_a_link_to_another_disk_and_the_folder_itself(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = Path("/dev/shm") / f"gowide-test-{os.getpid()}"
    disk.mkdir()
    try:
        (tmp_path / "link").symlink_to(disk)
        encode_image_folder(tmp_path / "link", images, ONE)
        verify_dataset(disk)
    finally:
        for path in disk.iterdir():
            path.unlink()
        disk.rmdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    encode_image_folder(Path(), images, ONE)
    verify_dataset(tmp_path / "here")


def test_files_that_are_there_are_not_overwritten(images: Path, tmp_path: Path):
    encode_image_folder(tmp_path / "theirs", images, ONE)
    (tmp_path / "theirs" / "dataset.json").unlink()
    before = (tmp_path / "theirs" / "train.beton").read_bytes()
    with pytest.raises(DataError, match=r"theirs: holds train\.beton, which was not encoded there; move it"):
        encode_image_folder(tmp_path / "theirs", images, ONE)
    with pytest.raises(DataError, match=r"theirs: is where the images are; choose another --out"):
        encode_ffcv(tmp_path / "theirs", tmp_path / "theirs", Options(None, subset=4))
    assert (tmp_path / "theirs" / "train.beton").read_bytes() == before


def test_a_folder_that_cannot_be_read_is_named(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def scandir(path):
        if Path(path) == images / "val" / "class 1":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    real = os.scandir
    monkeypatch.setattr(sources.os, "scandir", scandir)
    with pytest.raises(DataError, match=r"val/class 1: cannot be read \(Permission denied\)"):
        encode_image_folder(tmp_path / "out", images, ONE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_an_encode(tmp_path: Path, number: int):
    write_image_folder(tmp_path / "images", 400, 8, num_classes=2, least_px=600, most_px=700)
    command = [
        GOWIDE,
        "encode",
        "imagefolder",
        "--root",
        tmp_path / "images",
        "--out",
        tmp_path / "out",
        "--workers",
        "2",
    ]
    encode = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True)

    def group() -> list[int]:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == encode.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found

    try:
        deadline = time.monotonic() + LIMIT_S
        written = tmp_path / "out" / ".partial" / "train.beton"
        while not (written.exists() and written.stat().st_size):
            assert encode.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        encode.send_signal(number)
        assert encode.wait(LIMIT_S) == (143 if number == signal.SIGTERM else -9)
        while left := group():
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        assert (tmp_path / "out").exists() == (number == signal.SIGKILL)
        assert "Traceback" not in encode.stderr.read()
    finally:
        if group():
            os.killpg(encode.pid, signal.SIGKILL)
        encode.wait()
        encode.stderr.close()


def test_a_channel_that_never_changes(tmp_path: Path):
    for split in ("train", "val"):
        folder = tmp_path / "images" / split / "one"
        folder.mkdir(parents=True)
        for index in range(3):
            pixels = np.random.default_rng(index).integers(0, 256, (9, 9, 3), np.uint8)
            pixels[..., 1], pixels[..., 2] = 0, 6
            Image.fromarray(pixels).save(folder / f"{index}.png")
    info = encode_image_folder(tmp_path / "out", tmp_path / "images", Options(jpg_share=0.0, workers=1))
    assert info.std[0] > 0.2
    assert info.std[1:] == pytest.approx((1 / 255, 1 / 255), abs=1e-6)
    assert read_dataset_info(tmp_path / "out" / "train.beton") == info


def test_exif_that_cannot_be_written_again(tmp_path: Path):
    """Turned by the orientation alone: a width in letters is a tag that Pillow reads but refuses to write."""
    entries = struct.pack(">HHHI4s", 2, 0x0100, 2, 4, b"abc\0") + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + entries + b"\0\0\0\0"
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    Image.fromarray(pixels).save(tmp_path / "odd.jpg", exif=exif, quality=95)
    upright = read_rgb((tmp_path / "odd.jpg").read_bytes())
    assert upright.shape == (16, 8, 3)
    assert upright[:6].max() < 60
    assert upright[10:].min() > 200


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_without_a_scale_are_bad_images(tmp_path: Path, kind):
    Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / "odd.tif")
    with pytest.raises(ValueError, match="nothing says which is white"):
        read_rgb((tmp_path / "odd.tif").read_bytes())


@pytest.mark.parametrize("place", ["train/caf\udce9", "root\udce9/train/one"])
def test_names_that_are_no_text_are_refused_at_once(tmp_path: Path, place: str):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "a.png")
    root = tmp_path / Path(place).parts[0] if place.startswith("root") else tmp_path
    with pytest.raises(DataError, match=r"\\udce9.*: its name is no UTF-8; rename it"):
        encode_image_folder(tmp_path / "out", root, Options(held_out=1, workers=1))
    assert not (tmp_path / "out").exists()


def test_a_bad_file_whose_name_is_no_text_is_skipped(images: Path, tmp_path: Path):
    write_image_folder(tmp_path / "images", 4, 4, num_classes=1)
    (tmp_path / "images" / "train" / "class 0" / "caf\udce9.jpg").write_bytes(b"no image")
    encode_image_folder(tmp_path / "out", tmp_path / "images", Options(jpg_share=1.0, workers=1, skip_bad=True))
    assert b"caf\xe9.jpg\tno image of a kind that Pillow knows" in (tmp_path / "out" / "skipped.txt").read_bytes()


def test_fewer_validation_images_than_processes(small_set: Path, tmp_path: Path):
    write_fashion_mnist(tmp_path / "idx", 20, 2)
    encode_fashion_mnist(tmp_path / "out", tmp_path / "idx")
    for rank in range(3):
        with pytest.raises(DataError, match=r"val\.beton: 2 images for 3 processes; take fewer of these"):
            Loader(tmp_path / "out" / "val.beton", Batching(6, 3, rank), train=False, resolution=28)


def test_memory_is_looked_at_before_it_is_taken(small_set: Path):
    with pytest.raises(DataError, match=r"loading takes .* GiB, .* GiB are free; take a smaller batch"):
        Loader(small_set / "train.beton", Batching(600), train=True, geometry=CROP, resolution=300_000)


def test_cached_files_are_not_memory_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a control group of 32 GiB, 29 of them files that the kernel has cached."""
    group = tmp_path / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{32 << 30}\n")
    (group / "memory.current").write_text(f"{31 << 30}\n")
    (group / "memory.stat").write_text(f"anon {2 << 30}\ninactive_file {20 << 30}\nactive_file {9 << 30}\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert memory._cgroup_headrooms() == [30 << 30]


def test_a_resumed_epoch_reads_ahead_only_what_is_left(photo_set: Path):
    loader = Loader(
        photo_set / "train.beton", Batching(4), train=True, geometry=CROP, resolution=32, order="quasi-random",
        window_pages=1,
    )  # fmt: skip
    try:
        loader._beton.pages = np.arange(len(loader._beton)) // 10  # a page for every ten images: 25
        whole, rest, none = (loader._epoch_order(0, start)[1] for start in (0, 40, loader.steps_per_epoch))
        assert (len(whole), len(none)) == (25, 0)
        assert list(rest) == list(whole)[-len(rest) :]
        assert 8 <= len(rest) <= 10  # of 60 steps 20 are left, a third
    finally:
        loader.close()
