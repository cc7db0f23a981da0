"""A finished network as files that programs without this package load, each compared with PyTorch's logits."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gowide_dist.bench import cpu_name
from gowide_dist.data.loader import Loader
from gowide_dist.errors import InternalError, RunError, UserError
from gowide_dist.files import PARTIAL, replacing, sha256, writing_to
from gowide_dist.insight import text
from gowide_dist.insight.latency import latency_ms
from gowide_dist.insight.trained import Classifier, Trained, predict
from gowide_dist.networks.architecture import ARCHITECTURES, Architecture
from gowide_dist.networks.teacher import fold_batch_norms
from gowide_dist.progress import say

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SAFETENSORS, PT2, ONNX, INT8_ONNX = "model.safetensors", "model.pt2", "model.onnx", "model.int8.onnx"
CONFIG, REPORT = "config.json", "export.json"
LOGITS_TOLERANCE = 1e-4  # difference of a float32 file's logits from PyTorch's, relative to the largest if above 1
MAX_INT8_LOSS = 1.0  # points of top-1; with more the user is warned
CALIBRATION_IMAGES = 512
LATENCY_BATCHES = (1, 64)
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_DYNAMIC_BATCH = {"images": {0: torch.export.Dim("batch", min=1)}}

Forward: TypeAlias = Callable[[Tensor], Tensor]  # uint8 images [B, H, H, 3] -> logits [B, K]
Figures: TypeAlias = dict[str, dict[str, Any]]  # by file name; PyTorch's own under "pytorch"


def export(trained: Trained, to: Path, *, int8: bool = True, images: int | None = None) -> dict[str, Any]:
    """Write `config.json`, `model.safetensors`, `model.pt2`, `model.onnx` and, with int8, `model.int8.onnx`.

    The last three take uint8 images [B, H, H, 3] (RGB, any B) and give logits [B, K]: normalisation is inside. Each is
    timed, and compared with PyTorch on all validation images or on `images` of them, evenly spaced. Returns the content
    of `export.json`, which is written last. Does nothing if the folder holds this export already.

    Raises UserError if packages are missing or the folder holds anything else, InternalError if logits differ by more
    than LOGITS_TOLERANCE; then nothing is written.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"export needs {', '.join(missing)}: pip install -c constraints.txt -e '.[export]'")
    to = to.absolute()
    versions = {name: metadata.version(name) for name in ("gowide_dist", "torch", *_PACKAGES)}
    asked = {"int8": int8, "images": images, "with": versions, "threads": torch.get_num_threads()}
    _check_folder(to, trained.done.model_sha256)
    if report := _read_report(to, trained.done.model_sha256, asked):
        say(f"{to}: already exported; nothing to do")
        return report
    try:
        with writing_to(to, "--to"), replacing(to, REPORT) as folder:
            report = _write(folder, trained, asked)
            if not int8:
                (to / INT8_ONNX).unlink(missing_ok=True)  # of an earlier export
    finally:
        with contextlib.suppress(OSError):
            to.rmdir()  # empty after a failure
    return report


def _check_folder(to: Path, model_sha256: str) -> None:
    """Raises RunError if the folder holds anything else than an export of these weights, whole or interrupted."""
    for config in (to / CONFIG, to / PARTIAL / CONFIG):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(config.read_text())["model_sha256"] == model_sha256:
                return
    if to.exists() and (not to.is_dir() or {path.name for path in to.iterdir()} - {PARTIAL}):
        raise RunError(f"{to}: holds something else than an export of these weights; remove it or choose another --to")


def _read_report(to: Path, model_sha256: str, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """`export.json`, if it is of the same weights and options and the files are unchanged since."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        report: dict[str, Any] = json.loads((to / REPORT).read_text())
        is_same = (report["model_sha256"], report["asked"]) == (model_sha256, asked)
        if is_same and all(sha256(to / name) == file["sha256"] for name, file in report["files"].items()):
            return report
    return None


def _write(folder: Path, trained: Trained, asked: Mapping[str, Any]) -> dict[str, Any]:
    data, has_int8 = trained.recipe.data, asked["int8"]
    files = [SAFETENSORS, PT2, ONNX, *([INT8_ONNX] if has_int8 else [])]
    with contextlib.closing(trained.validation_images(data.val, asked["images"])) as validation:  # raises before work
        say(f"writing {', '.join(files)}")
        (folder / CONFIG).write_text(json.dumps(config(trained), indent=2) + "\n")
        shutil.copyfile(trained.run.stage(trained.instance.key).model, folder / SAFETENSORS)
        network = trained.network()
        program = _program(Classifier(fold_batch_norms(network), trained.info).eval(), data.resolution)
        torch.export.save(program, folder / PT2)
        _write_onnx(program, folder / ONNX)
        num_calibration = _write_int8(folder, trained) if has_int8 else 0
        classifier = Classifier(network, trained.info).eval()
        figures, num_images = _measure(classifier, [folder / name for name in files[1:]], validation)
    described = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in files}
    report = {
        "model_sha256": trained.done.model_sha256,
        "asked": asked,
        "cpu": cpu_name(),
        "validation": {"data": str(data.val), "images": num_images},
        "calibration": {"data": str(data.train), "images": num_calibration} if has_int8 else None,
        "pytorch": figures["pytorch"],
        "files": {name: described[name] | figures.get(name, {}) for name in files},
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    if has_int8 and (loss := figures["pytorch"]["top1"] - figures[INT8_ONNX]["top1"]) > MAX_INT8_LOSS:
        say(f"warning: {INT8_ONNX} loses {loss:.2f} points of top-1")
    return report


def config(trained: Trained) -> dict[str, Any]:
    """What a program needs to use the files: how to prepare images, and the classes of the logits."""
    data, info, done = trained.recipe.data, trained.info, trained.done
    architecture = trained.instance.architecture
    return {
        "stage": done.stage,
        "network": done.network,
        "architecture": architecture.model_dump(mode="json"),
        "torchvision": _in_torchvision(architecture, len(info.classes)),
        "classes": info.classes,
        "input": {
            "name": "images",
            "dtype": "uint8",
            "layout": "NHWC",  # as image files are decoded: no copy for the caller, channels_last inside
            "shape": ["batch", data.resolution, data.resolution, 3],
            "channels": "RGB",
        },
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", len(info.classes)]},
        "prepare": {
            "resize_shorter_side_px": round(data.resolution / (data.center_crop or 1.0)),
            "resize": "bilinear, antialiased",
            "center_crop_px": data.resolution,
        },
        "normalise": {"mean": info.mean, "std": info.std, "of": "pixels / 255"},
        "resolution": data.resolution,
        "top1": done.top1,
        "top5": done.top5,
        "fingerprint": done.fingerprint,
        "model_sha256": done.model_sha256,
    }


def _in_torchvision(architecture: Architecture, num_classes: int) -> dict[str, Any] | None:
    """The function of torchvision.models that builds the network, and its arguments, if there is one."""
    width = architecture.width
    shape = (architecture.block, architecture.depths)
    name = next((name for name, known in ARCHITECTURES.items() if known == shape), None)
    has_width = (64 * width).is_integer() if architecture.block == "bottleneck" else width == 1
    is_plain = (architecture.stem, architecture.base, architecture.channels) == ("imagenet", 64, 1)
    if name is None or not (has_width and is_plain):
        return None
    width_per_group = {} if width == 1 else {"width_per_group": round(64 * width)}
    return {"model": name, "arguments": {"num_classes": num_classes, **width_per_group}}


def _program(classifier: Classifier, resolution: int) -> ExportedProgram:
    """The graph of a classifier for any number of images."""
    example = torch.zeros(2, resolution, resolution, 3, dtype=torch.uint8)  # a batch of 1 would become a constant
    program = torch.export.export(classifier, (example,), dynamic_shapes=_DYNAMIC_BATCH)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds paths of this machine
    return program


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    import onnx

    exported = torch.onnx.export(
        program, input_names=["images"], output_names=["logits"], dynamic_shapes=_DYNAMIC_BATCH, verbose=False
    )
    assert exported is not None
    model = exported.model_proto
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for entry in (model, graph, *graph.node, *values):
        entry.ClearField("metadata_props")  # the exporter's notes, many times the size of the graph
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _write_int8(folder: Path, trained: Trained) -> int:
    """Quantise model.onnx to 8 bits; return the number of training images that calibrated the activations' ranges.

    Signed weights and signed activations: with unsigned ones, processors without VNNI add pairs of products in 16 bits
    and saturate (ten points of top-1 on Fashion-MNIST).
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        num_images = 0

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            if (batch := next(batches, None)) is None:
                return None
            self.num_images += len(batch.images)
            return {"images": batch.images.numpy()}

    with (
        contextlib.closing(trained.training_images(CALIBRATION_IMAGES)) as images,
        tempfile.TemporaryDirectory() as tmp,
    ):
        batches, reader = images.batches(), Reader()
        prepared = Path(tmp) / ONNX
        quant_pre_process(folder / ONNX, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            folder / INT8_ONNX,
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
        return reader.num_images


@torch.inference_mode()
def _measure(classifier: Classifier, paths: list[Path], validation: Loader) -> tuple[Figures, int]:
    """Top-1, agreement with PyTorch and latency of PyTorch and of each file, one after the other; and how many images.

    Raises InternalError if a float32 file's logits differ by more than LOGITS_TOLERANCE allows.
    """
    expected, labels = predict(classifier, validation, "validating PyTorch")
    predicted, num_images = expected.argmax(dim=1), len(labels)
    allowed = LOGITS_TOLERANCE * max(1.0, float(expected.abs().max()))
    batches = validation.batches()
    images = next(batches).images.clone()
    batches.close()
    inputs = {size: images[torch.arange(size) % len(images)] for size in LATENCY_BATCHES}

    def top1(logits: Tensor) -> float:
        return _percent(logits.argmax(dim=1) == labels)

    def latencies(forward: Forward) -> dict[str, float]:
        return {str(size): round(latency_ms(forward, batch), 3) for size, batch in inputs.items()}

    figures: Figures = {"pytorch": {"top1": top1(expected), "latency_ms": latencies(classifier)}}
    for path in paths:
        forward = _open(path)
        logits, _ = predict(forward, validation, f"validating {path.name}")
        difference = float((logits - expected).abs().max())
        if path.name != INT8_ONNX and not difference <= allowed:  # also if it is NaN
            raise InternalError(
                f"{path.name}: its logits differ by up to {difference:.2g} from PyTorch's on {num_images:,} validation "
                f"images, {allowed:.2g} is allowed; nothing was written"
            )
        figures[path.name] = {
            "top1": top1(logits),
            "top1_agreement": _percent(logits.argmax(dim=1) == predicted),
            "largest_logit_difference": difference,
            "latency_ms": latencies(forward),
        }
        del forward
        gc.collect()  # ends a session's threads, which would spin beside the next file's
    return figures, num_images


def _open(path: Path) -> Forward:
    """The file in its runtime on the CPU, with as many threads as PyTorch has."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _percent(mask: Tensor) -> float:
    return 100 * int(mask.sum()) / len(mask)


def table(report: Mapping[str, Any]) -> str:
    """The content of `export.json` for the terminal."""

    def cell(row: Mapping[str, Any], key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    rows = []
    for name, row in {"(PyTorch, eager)": report["pytorch"], **report["files"]}.items():
        megabytes = f"{row['bytes'] / 1e6:,.2f}" if "bytes" in row else ""
        figures = (("top1", ".2f"), ("top1_agreement", ".2f"), ("largest_logit_difference", ".1e"))
        latencies = (cell(row.get("latency_ms", {}), str(size), ",.2f") for size in LATENCY_BATCHES)
        rows.append((name, megabytes, *(cell(row, key, form) for key, form in figures), *latencies))
    head = ("file", "MB", "top-1 %", "as PyTorch %", "logits differ by", *(f"ms, batch {n}" for n in LATENCY_BATCHES))
    lines = [
        text.table(head, rows) + "\n",
        f"compared on {report['validation']['images']:,} images of {report['validation']['data']}",
    ]
    if calibration := report["calibration"]:
        lines.append(f"int8 calibrated on {calibration['images']:,} images of {calibration['data']}")
    lines.append(f"latency: medians, {report['asked']['threads']} threads of {report['cpu']}")
    return "\n".join(lines)
