"""A finished network in the forms that programs without this package load, each compared with PyTorch's answers."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from gowide_dist.data.loader import Loader
from gowide_dist.errors import InternalError, RunError, UserError, is_full
from gowide_dist.files import sha256
from gowide_dist.insight.text import rendered
from gowide_dist.insight.trained import BATCH_SIZE, Classifier, Trained
from gowide_dist.networks.architecture import ARCHITECTURES, Architecture
from gowide_dist.networks.teacher import fold_batch_norms
from gowide_dist.progress import Track, say

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SAFETENSORS, PT2, ONNX, INT8_ONNX = "model.safetensors", "model.pt2", "model.onnx", "model.int8.onnx"
CONFIG, REPORT = "config.json", "export.json"
LOGITS_TOLERANCE = 1e-4  # between a float32 file's logits and PyTorch's, as a part of the largest if that is above 1
INT8_MAY_LOSE = 1.0  # points of top-1, before the user is warned
CALIBRATION_IMAGES = 512
LATENCY_BATCHES = (1, 64)
_REPEATS, _MIN_REPEATS, _REPEATS_END_S = 50, 3, 3.0
_WARM_UPS = 3
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")

Answer: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[np.float32]]  # images [B, H, H, 3] -> logits [B, K]
Figures: TypeAlias = dict[str, dict[str, Any]]  # by file, and of PyTorch


def export(trained: Trained, to: Path, *, int8: bool = True, images: int | None = None) -> dict[str, Any]:
    """Write `config.json`, `model.safetensors`, `model.pt2`, `model.onnx` and, with int8, `model.int8.onnx`.

    The last three take uint8 images [B, H, H, 3] (RGB, any B) and give logits [B, K]: normalisation is inside. Each is
    compared with PyTorch on the validation images, all or evenly chosen `images` of them, and timed. Returns what
    `export.json`, written last, says of that. Does nothing if the folder holds this export already.

    Raises UserError if packages are missing or the folder holds anything else, InternalError if logits differ by more
    than LOGITS_TOLERANCE; then nothing is written.
    """
    _check_packages()
    to = to.absolute()
    asked = {"int8": int8, "images": images, "with": _versions(), "threads": torch.get_num_threads()}
    _check_folder(to, trained)
    if found := _find_exported(to, trained, asked):
        say(f"{to}: already exported; nothing to do")
        return found
    partial = to.with_name(f".{to.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            report = _write(partial, trained, asked)
            to.mkdir(exist_ok=True)
            for name in (REPORT, INT8_ONNX):  # the latter may not come again
                (to / name).unlink(missing_ok=True)
            for name in (CONFIG, *report["files"], REPORT):
                (partial / name).replace(to / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if is_full(error):
            raise
        raise RunError(f"{to}: cannot be written ({error.strerror or error}); choose another --to") from error
    return report


def _check_packages() -> None:
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"export needs {', '.join(missing)}: pip install -c constraints.txt -e '.[export]'")


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("gowide_dist", "torch", *_PACKAGES)}


def _check_folder(to: Path, trained: Trained) -> None:
    """Raises RunError if the folder holds anything else than an export of the same weights."""
    try:
        config = json.loads((to / CONFIG).read_text())
        is_same = isinstance(config, dict) and config.get("model_sha256") == trained.done.model_sha256
    except (OSError, ValueError):
        is_same = False
    if not is_same and to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"{to}: holds something else than an export of these weights; remove it or choose another --to")


def _find_exported(to: Path, trained: Trained, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `export.json` says, if it is of the same weights, of what is asked, and the files are still as written."""
    try:
        report: dict[str, Any] = json.loads((to / REPORT).read_text())
        is_same = (report["model_sha256"], report["asked"]) == (trained.done.model_sha256, asked)
        is_whole = is_same and all(sha256(to / name) == file["sha256"] for name, file in report["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if is_whole else None


def _write(folder: Path, trained: Trained, asked: Mapping[str, Any]) -> dict[str, Any]:
    data = trained.recipe.data
    with closing(trained.validation_images(data.val, asked["images"])) as validation:  # complains before any work
        network = trained.network()
        folded = Classifier(fold_batch_norms(network), trained.info).eval()
        files = [SAFETENSORS, PT2, ONNX, *([INT8_ONNX] if asked["int8"] else [])]
        say(f"writing {', '.join(files)}")
        shutil.copyfile(trained.run.stage(trained.instance.key).model, folder / SAFETENSORS)
        program = _program(folded, data.resolution)
        torch.export.save(program, folder / PT2)
        _write_onnx(program, folder / ONNX)
        num_calibration = _write_int8(folder, trained) if asked["int8"] else 0
        classifier = Classifier(network, trained.info).eval()
        with torch.inference_mode():
            found, num_images = _compare(classifier, folder, files[1:], validation)
            timed = _time(classifier, folder, files[1:], validation)
    described = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in files}
    report = {
        "model_sha256": trained.done.model_sha256,
        "asked": asked,
        "cpu": _cpu(),
        "validation": {"data": str(data.val), "images": num_images},
        "calibration": {"data": str(data.train), "images": num_calibration} if asked["int8"] else None,
        "pytorch": found["pytorch"] | timed["pytorch"],
        "files": {name: described[name] | found.get(name, {}) | timed.get(name, {}) for name in files},
    }
    (folder / CONFIG).write_text(json.dumps(config(trained), indent=2) + "\n")
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    if asked["int8"] and (lost := found["pytorch"]["top1"] - found[INT8_ONNX]["top1"]) > INT8_MAY_LOSE:
        say(f"warning: {INT8_ONNX} loses {lost:.2f} points of top-1")
    return report


def config(trained: Trained) -> dict[str, Any]:
    """What a program must know to use the files: of the images that go in, and the classes that come out."""
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
            "layout": "NHWC",  # as image files are decoded: no copy for whoever calls, channels_last for who computes
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
    plain = (architecture.stem, architecture.base, architecture.channels) == ("imagenet", 64, 1)
    if name is None or not (has_width and plain):
        return None
    width_per_group = {} if width == 1 else {"width_per_group": round(64 * width)}
    return {"model": name, "arguments": {"num_classes": num_classes, **width_per_group}}


def _program(classifier: Classifier, resolution: int) -> ExportedProgram:
    """The graph of a classifier for any number of images."""
    example = torch.zeros(2, resolution, resolution, 3, dtype=torch.uint8)  # 1 would be taken for a constant
    program = torch.export.export(classifier, (example,), dynamic_shapes=_dynamic_batch())
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _dynamic_batch() -> dict[str, Any]:
    return {"images": {0: torch.export.Dim("batch", min=1)}}


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    import onnx

    made = torch.onnx.export(
        program, input_names=["images"], output_names=["logits"], dynamic_shapes=_dynamic_batch(), verbose=False
    )
    assert made is not None
    made.save(path)
    model = onnx.load(path)
    for noted in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
    ):
        noted.ClearField("metadata_props")  # the exporter's notes, many times as long as the graph
    for tensor in model.graph.initializer:
        tensor.ClearField("metadata_props")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _write_int8(folder: Path, trained: Trained) -> int:
    """Quantise model.onnx to 8 bits; how many training images set the ranges of the activations.

    Signed weights and signed activations: with unsigned ones, processors without VNNI add up pairs of products in 16
    bits and clip them (ten points of top-1 on Fashion-MNIST).
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.num_images = 0
            self.batches = images.batches()

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            batch = next(self.batches, None)
            if batch is None:
                return None
            self.num_images += len(batch.images)
            return {"images": batch.images.numpy()}

    with closing(trained.training_images(CALIBRATION_IMAGES)) as images, tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / ONNX
        quant_pre_process(folder / ONNX, prepared, skip_optimization=True, skip_symbolic_shape=True)
        reader = Reader()
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


def _open(path: Path, *, alone: bool) -> Answer:
    """The file in its runtime, with as many threads as PyTorch has; `alone` if nothing else computes meanwhile."""
    if path.suffix == ".pt2":
        return _answer(torch.export.load(path).module())
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if not alone:  # or its idle threads go on spinning beside PyTorch's
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def answer(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(["logits"], {"images": images})[0]
        return logits

    return answer


def _answer(module: torch.nn.Module) -> Answer:
    def answer(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = module(torch.from_numpy(images)).numpy()
        return logits

    return answer


def _compare(classifier: Classifier, folder: Path, files: list[str], validation: Loader) -> tuple[Figures, int]:
    """For PyTorch and each file: top-1, and how far its answers are from PyTorch's; and on how many images.

    Raises InternalError if a float32 file's logits differ by more than LOGITS_TOLERANCE allows.
    """
    answers = {"pytorch": _answer(classifier), **{name: _open(folder / name, alone=False) for name in files}}
    hits, agreed, furthest = (dict.fromkeys(answers, 0), dict.fromkeys(answers, 0), dict.fromkeys(answers, 0.0))
    num_images, largest = 0, 1.0
    progress = Track(
        "comparing", validation.steps_per_epoch, "batches", rate_unit="images", per_thing=BATCH_SIZE, stderr=True
    )
    with progress as shown:
        for step, batch in enumerate(validation.batches(), start=1):
            images, labels = batch.images.numpy(), batch.labels.numpy()
            reference = answers["pytorch"](images)
            largest = max(largest, float(abs(reference).max()))
            for name, answer in answers.items():
                logits = answer(images) if name != "pytorch" else reference
                best = logits.argmax(axis=1)
                hits[name] += int((best == labels).sum())
                agreed[name] += int((best == reference.argmax(axis=1)).sum())
                furthest[name] = max(furthest[name], float(np.nan_to_num(abs(logits - reference), nan=math.inf).max()))
            num_images += len(images)
            shown.update(step)
    for name in files:
        if name != INT8_ONNX and not furthest[name] <= LOGITS_TOLERANCE * largest:
            raise InternalError(
                f"{name}: its logits differ by up to {furthest[name]:.2g} from PyTorch's on {num_images:,} validation "
                f"images, {LOGITS_TOLERANCE * largest:.2g} is allowed; nothing was written"
            )
    found: Figures = {
        name: {
            "top1": 100 * hits[name] / num_images,
            "top1_agreement": 100 * agreed[name] / num_images,
            "largest_logit_difference": furthest[name],
        }
        for name in files
    }
    return {**found, "pytorch": {"top1": 100 * hits["pytorch"] / num_images}}, num_images


def _time(classifier: Classifier, folder: Path, files: list[str], validation: Loader) -> Figures:
    """Latency in ms of PyTorch and of each file, alone one after the other: medians by batch size."""
    batches = validation.batches()
    images = next(batches).images.numpy().copy()
    batches.close()
    inputs = {size: np.resize(images, (size, *images.shape[1:])) for size in LATENCY_BATCHES}
    timed: Figures = {}
    for name in ("pytorch", *files):
        answer = _answer(classifier) if name == "pytorch" else _open(folder / name, alone=True)
        timed[name] = {"latency_ms": {str(size): _latency_ms(answer, batch) for size, batch in inputs.items()}}
        del answer
        gc.collect()  # ends a session's threads
    return timed


def _latency_ms(answer: Answer, images: NDArray[np.uint8]) -> float:
    for _ in range(_WARM_UPS):
        answer(images)
    seconds: list[float] = []
    while len(seconds) < _MIN_REPEATS or (len(seconds) < _REPEATS and sum(seconds) < _REPEATS_END_S):
        start = time.perf_counter()
        answer(images)
        seconds.append(time.perf_counter() - start)
    return round(1000 * statistics.median(seconds), 3)


def _cpu() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.machine()


def table(report: Mapping[str, Any]) -> str:
    """What `export.json` says, for the terminal."""
    made = Table(box=box.SIMPLE_HEAD)
    made.add_column("file")
    heads = ("MB", "top-1 %", "as PyTorch %", "logits differ by", *(f"ms, batch {size}" for size in LATENCY_BATCHES))
    for head in heads:
        made.add_column(head, justify="right")
    rows = {"(PyTorch, eager)": report["pytorch"], **report["files"]}
    for name, row in rows.items():
        latency = row.get("latency_ms", {})
        made.add_row(
            name,
            f"{row['bytes'] / 1e6:,.2f}" if "bytes" in row else "",
            f"{row['top1']:.2f}" if "top1" in row else "",
            f"{row['top1_agreement']:.2f}" if "top1_agreement" in row else "",
            f"{row['largest_logit_difference']:.1e}" if "largest_logit_difference" in row else "",
            *(f"{latency[str(size)]:,.2f}" if latency else "" for size in LATENCY_BATCHES),
        )
    calibration = report["calibration"]
    lines = [f"compared on {report['validation']['images']:,} images of {report['validation']['data']}"]
    if calibration:
        lines.append(f"int8 calibrated on {calibration['images']:,} images of {calibration['data']}")
    lines.append(f"latency: medians, {report['asked']['threads']} threads of {report['cpu']}")
    return "\n".join([rendered(made), "", *lines])
