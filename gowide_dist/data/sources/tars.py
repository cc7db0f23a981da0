"""Images in tar archives, which are read where they lie: an archive without compression is files one after another."""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePath

from gowide_dist.data.sources import ImageList, Lister, say_left_out
from gowide_dist.data.sources.image_folder import is_no_image
from gowide_dist.data.sources.labels import Entry
from gowide_dist.errors import DataError


def members(path: Path, start: int = 0) -> Iterator[Entry]:
    """The files of an archive, or of one inside it that starts at byte `start`.

    Raises DataError if it is cut, damaged or compressed.
    """
    status = path.stat()
    try:
        with path.open("rb") as file:
            file.seek(start)
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 -- is nothing but `file`
            while member := archive.next():
                archive.members = []  # type: ignore[attr-defined] # tarfile would keep them all
                if member.offset_data + member.size > status.st_size:
                    raise DataError(f"{path}: cut off in {member.name}; get the file again")
                if member.isfile():
                    yield Entry(member.name, member.size, status.st_mtime_ns, member.offset_data)
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes any other end for one too
                raise DataError(f"{path}: cut off or damaged at byte {archive.offset:,}; get the file again")
    except tarfile.TarError as error:
        hint = "it is compressed: unpack it with gunzip" if is_compressed(path) else "get the file again"
        raise DataError(f"{path}: cannot be read ({error}); {hint}") from None


def is_compressed(path: Path) -> bool:
    """Whether a file begins as those of gzip, bzip2, xz or zstd do."""
    with path.open("rb") as file:
        return file.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))


def list_class_archives(path: Path) -> tuple[tuple[str, ...], ImageList]:
    """Classes and images of one archive a class, CLASS.tar: in an archive, as ImageNet's train is, or in a folder."""
    if path.is_dir():
        archives = [(archive.stem, archive, 0) for archive in sorted(path.glob("*.tar"))]
    else:
        archives = [
            (PurePath(entry.name).stem, path, entry.offset or 0)
            for entry in members(path)
            if entry.name.endswith(".tar")
        ]
    if not archives:
        raise DataError(f"{path}: no archives CLASS.tar in it")
    if len({name for name, _, _ in archives}) < len(archives):
        raise DataError(f"{path}: two archives of one class in it")
    lister, left_out = Lister(), []
    archives.sort()
    for label, (name, archive, start) in enumerate(archives):
        before = len(lister)
        lister.place(archive)
        for entry in members(archive, start):
            if is_no_image(PurePath(entry.name).name):
                left_out.append(entry.name)
            else:
                lister.add(PurePath(entry.name).name, label, entry.size, entry.mtime_ns, entry.offset or 0)
        if len(lister) == before:
            raise DataError(f"{path}: {name}.tar holds no images; get it again")
    say_left_out(path, left_out)
    return tuple(name for name, _, _ in archives), lister.finish()


def list_archive(path: Path) -> list[Entry]:
    """The images of an archive, by their names without folders."""
    entries = [entry._replace(name=PurePath(entry.name).name) for entry in members(path)]
    say_left_out(path, [entry.name for entry in entries if is_no_image(entry.name)])
    return [entry for entry in entries if not is_no_image(entry.name)]
