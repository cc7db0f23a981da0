"""`gowide export`: the folder of a finished network's files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gowide_dist.bench import cpu_name
from gowide_dist.data.loader import Batch
from gowide_dist.errors import RunError, UserError
from gowide_dist.export.compare import Comparison
from gowide_dist.export.counterparts import in_timm, in_torchvision
from gowide_dist.export.formats import FORMATS, TIMM, Request, check_packages, is_int8, with_sources
from gowide_dist.export.writing import FormatWriter
from gowide_dist.files import PARTIAL, replacing, sha256, writing_to
from gowide_dist.insight.trained import BATCH_SIZE, Images, Trained
from gowide_dist.progress import say

CONFIG, REPORT = "config.json", "export.json"


def export(trained: Trained, to: Path, request: Request, data: Path | None = None) -> dict[str, Any]:
    """Write `config.json` and the files of the formats that are asked for.

    Those that are programs take uint8 images [B, H, H, 3] (RGB) and give logits [B, K]: normalisation is inside. Each
    is timed, and compared with PyTorch on all validation images, in the runtimes that are installed. data: the folder
    of the FFCV files, by default the run's; if these are not there, noise takes the place of validation images, and
    int8, which training images calibrate, is left out. Returns the content of `export.json`, which is written last; at
    once, if the folder holds this export already.

    Raises UserError if packages are missing or the folder holds anything else, InternalError if a conversion fails or
    logits differ too much; then nothing is written.
    """
    to, request = to.absolute(), request.of(trained.preprocessing.quantisation)
    train, val = _data_files(trained, data)
    if not train and (left_out := [name for name in request.formats if is_int8(name)]):
        say(f"note: {', '.join(left_out)} left out: no training images to calibrate; --data DIR says where they are")
        request = request.without(left_out)
    if TIMM in request.formats and not in_timm(trained.instance.architecture):
        raise UserError(f"--format timm: timm has no network like {trained.instance.network_name}; leave timm out")
    check_packages(request)
    asked = _asked(request, train, val)
    if report := _exported_already(to, trained.done.model_sha256, asked):
        say(f"{to}: already exported; nothing to do")
        return report
    exported = [_read_json(folder / CONFIG).get("model_sha256") for folder in (to, to / PARTIAL)]  # or interrupted
    is_ours = trained.done.model_sha256 in exported
    if not is_ours and to.exists() and (not to.is_dir() or {*to.iterdir()} - {to / PARTIAL}):
        raise RunError(f"{to}: contains files other than an export of these weights; remove it or choose another --to")
    try:
        with writing_to(to, "--to"), replacing(to, REPORT) as folder:
            report = _write(folder, trained, request, train, val) | {"asked": asked}
            (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        offered = {name for form in FORMATS.values() for name in form.files}
        earlier = sorted(name for name in offered - _digests(report).keys() if (to / name).exists())
        for name in earlier:
            (to / name).unlink()
        if earlier:
            say(f"note: {', '.join(earlier)} of an earlier export removed; --format names all formats of a folder")
    finally:
        for folder in (to / "timm", to):
            with contextlib.suppress(OSError):
                folder.rmdir()  # empty after a failure, or without what an earlier export had
    return report


def _data_files(trained: Trained, data: Path | None) -> tuple[Path | None, Path | None]:
    """The FFCV files of training and of validation images in a folder; of the run's own, those that are there."""
    if data:
        train, val = (None, data) if data.suffix == ".beton" else (data / "train.beton", data / "val.beton")
        return (train if train and train.exists() else None), val
    train, val = trained.recipe.data.train, trained.recipe.data.val
    return (train if train.exists() else None), (val if val.exists() else None)


def _asked(request: Request, train: Path | None, val: Path | None) -> dict[str, Any]:
    """All that an export depends on besides the weights, as JSON has it."""
    packages = {name for each in with_sources(request.formats) for name in FORMATS[each].packages}
    versions = {name: _version(name) for name in sorted({"gowide_dist", "torch", *packages})}
    return {
        **asdict(request),
        "formats": [*request.formats],
        "converters": {name: str(path) for name, path in request.converters.items()},
        "threads": torch.get_num_threads(),
        "with": {name: version for name, version in versions.items() if version},
        "train": train and str(train),
        "val": val and str(val),
    }


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _exported_already(to: Path, model_sha256: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The report of an earlier export that was the same, if its files are still as they were written."""
    report = _read_json(to / REPORT)
    if (report.get("model_sha256"), report.get("asked")) != (model_sha256, asked):
        return {}
    is_whole = all((to / name).exists() and sha256(to / name) == digest for name, digest in _digests(report).items())
    return report if is_whole else {}


def _digests(report: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of every file of an export."""
    files = (form["files"].items() for form in report["formats"].values())
    return {name: file["sha256"] for each in files for name, file in each}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one, if the file holds anything else."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(content := json.loads(path.read_text()), dict):
            return content
    return {}


def _write(folder: Path, trained: Trained, request: Request, train: Path | None, val: Path | None) -> dict[str, Any]:
    """Write, compare and time the files; the report, but for what was asked."""
    side = trained.recipe.data.resolution
    images: Images = trained.validation_images(val, request.images) if val else _Noise(side)  # raises before work
    with contextlib.closing(images) as validation:  # type: ignore[type-var]
        (folder / CONFIG).write_text(json.dumps(config(trained, request.batch), indent=2) + "\n")
        writer = FormatWriter(folder, trained, request, train)
        for name in with_sources(request.formats):
            say(f"writing {', '.join(FORMATS[name].files)}")
            writer.write(name)
        comparison = Comparison(trained, request, validation)
        formats: dict[str, Any] = {}
        for name in request.formats:
            files = {file: folder / file for file in FORMATS[name].files}
            sizes = {file: {"bytes": path.stat().st_size, "sha256": sha256(path)} for file, path in files.items()}
            formats[name] = {"files": sizes, "runtimes": comparison.runtimes(name, folder)}
    writer.remove_all_but(request.formats)
    comparison.warn_of_losses(formats)
    return {
        "model_sha256": trained.done.model_sha256,
        "cpu": cpu_name(),
        "validation": {"data": str(val) if val else "noise", "images": comparison.num_images},
        "calibration": writer.calibration,
        "pytorch": comparison.pytorch,
        "rounded": comparison.rounded,
        "formats": formats,
    }


class _Noise:
    """In place of validation images: random pixels."""

    steps_per_epoch = 1

    def __init__(self, side: int) -> None:
        pixels = torch.randint(256, (BATCH_SIZE, side, side, 3), dtype=torch.uint8, generator=torch.Generator())
        self._batch = Batch(pixels, torch.full([BATCH_SIZE], -1), torch.arange(BATCH_SIZE))

    def batches(self) -> Iterator[Batch]:
        yield self._batch

    def close(self) -> None:
        pass


def config(trained: Trained, batch: int | None = None) -> dict[str, Any]:
    """What a program needs to use the files: how to prepare images, and the classes of the logits.

    batch: the number of images that the files take at once; None: any, but for formats that have no such files.
    """
    architecture, preprocessing = trained.instance.architecture, trained.preprocessing
    side, num_classes, rounding = preprocessing.resolution, len(preprocessing.classes), preprocessing.quantisation
    # as images are decoded: no copy for the caller, channels_last inside
    shape = [batch or "batch", side, side, 3]
    counterparts = {"torchvision": in_torchvision(architecture), "timm": in_timm(architecture)}
    return {
        **({"quantised": "symmetric" if rounding.symmetric else True} if rounding else {}),
        **trained.done.model_dump(include={"stage", "network", "top1", "top5", "fingerprint", "model_sha256"}),
        "architecture": architecture.model_dump(mode="json", exclude={"normalise"}),
        **{
            name: found and {"model": found.model, "arguments": {"num_classes": num_classes, **found.arguments}}
            for name, found in counterparts.items()
        },
        "classes": preprocessing.classes,
        "resolution": side,
        "input": {"name": "images", "dtype": "uint8", "layout": "NHWC", "shape": shape, "channels": "RGB"},
        "output": {"name": "logits", "dtype": "float32", "shape": [batch or "batch", num_classes]},
        "prepare": {
            "resize_shorter_side_px": preprocessing.resize_px,
            "resize": "bilinear, antialiased",
            "center_crop_px": side,
        },
        "normalise": {"mean": preprocessing.mean, "std": preprocessing.std, "of": "pixels / 255"},
    }
