"""Writing files atomically, locks, digests."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from gowide_dist.errors import FULL_DISK, RunError, is_full

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{(\w+)\})")  # $NAME or ${NAME}
_URL = re.compile("(https?|ftp|s3|gs|hf|abfss?|file):/")  # of two slashes, a Path keeps one
PARTIAL = ".partial"  # folder of files that are being written
_NO_WEIGHTS = (
    "holds no weights, or not all; give a .safetensors file, or a state dict as torchvision publishes it (.pth)"
)
_DOWNLOADED_INSTEAD = {  # by the first bytes of a file
    b"version https://git-lfs": "a pointer of Git LFS in place of the weights; get them with `git lfs pull`",
    b"<": "a web page in place of the weights; download the file again",
    b"{": "JSON in place of the weights; download the file again, or of several files the weights themselves",
    b"\x1f\x8b": "packed by gzip; unpack it",
    b"\x89HDF": "HDF5, as Keras writes it; give PyTorch's weights",
    b"\x93NUMPY": "an array of NumPy's; give PyTorch's weights",
}


def expanded(path: str | Path) -> Path:
    """A path that a user has written, with its variables and then `~` or `~user` replaced, as a shell does.

    Raises ValueError if it is a URL, if a variable has no value, or if a user or a home is unknown.
    """
    if _URL.match(str(path)):
        raise ValueError(f"{path}: a URL; nothing is ever downloaded, give a file that is here")

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not (value := os.environ.get(name)):
            raise ValueError(f"{path}: the variable {name} is not set; set it, or write the path out")
        return value

    try:
        return Path(_VARIABLE.sub(value_of, str(path))).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no such user, or no home folder; write the path out") from None


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever its name: with the length of a JSON object, then that."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def no_weights(path: Path) -> str:
    """Why a file that holds no weights does not, as far as its first bytes tell."""
    with path.open("rb") as file:
        if not (head := file.read(64).lstrip()):
            return "empty; get the file again"
    if is_safetensors(path) or (head.startswith(b"PK") and not zipfile.is_zipfile(path)):
        return "cut short or damaged; download the file again"
    return next((cause for start, cause in _DOWNLOADED_INSTEAD.items() if head.startswith(start)), _NO_WEIGHTS)


def temporary_name(name: str) -> str:
    """What this process calls a file while it writes it; of "*", a pattern for every process's."""
    return f".{name}.{name if name == '*' else f'{platform.node()}-{os.getpid()}'}"


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` when the context ends without an exception, also after a power cut."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file that is complete or absent, also after a power cut."""
    with atomic(path) as file:
        file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)


class HashingFile:
    """An open file that hashes what is written to it, from start to end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256 = file, hashlib.sha256()
        self.flush = file.flush
        self.failure: OSError | None = None  # of a write: who writes through this may raise something else in its place

    def write(self, content: bytes | memoryview) -> int:
        self._sha256.update(content)
        try:
            return self._file.write(content)
        except OSError as error:
            self.failure = error
            raise

    def sync(self) -> str:
        """Write buffers to the disk; the SHA-256 of the content."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._sha256.hexdigest()


@contextmanager
def writing_to(path: Path, option: str) -> Iterator[None]:
    """Turns an OSError into a RunError that says: `path` cannot be written, choose another with `option`.

    Or that its disk is full.
    """
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise RunError(f"{path}: {FULL_DISK}") from error
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}); choose another place with {option}"
        ) from error


@contextmanager
def replacing(folder: Path, marker: str) -> Iterator[Path]:
    """A new empty folder inside `folder`, whose files replace those in `folder` unless there is an exception.

    The file `marker` says that the others are complete: the old one is deleted first, the new one is moved last.
    """
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        move_up(partial, marker)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move_up(folder: Path, marker: str) -> None:
    """Move all in a folder into its parent; an old file `marker` is deleted first, the new one moved last."""
    (folder.parent / marker).unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == marker):
        if path.is_dir():
            shutil.rmtree(folder.parent / path.name, ignore_errors=True)
        path.replace(folder.parent / path.name)


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Whether this process got the lock file's lock, which it has until the context ends."""
    with path.open("a") as file:
        yield flock(file, fcntl.LOCK_EX)


def flock(file: IO[str], kind: int) -> bool:
    """Lock an open file, if no other process has. Raises RunError if the file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise RunError(f"{file.name}: cannot be locked ({error.strerror}): choose a file system with locks") from error
    return True


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
