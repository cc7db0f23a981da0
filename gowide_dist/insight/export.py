"""A finished network as files that programs without this package load, each compared with PyTorch's logits."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from gowide_dist.bench import cpu_name
from gowide_dist.data.info import check_split
from gowide_dist.data.loader import Batch
from gowide_dist.errors import InternalError, RunError, UserError
from gowide_dist.files import PARTIAL, replacing, sha256, writing_to
from gowide_dist.insight import text
from gowide_dist.insight.latency import latency_ms
from gowide_dist.insight.trained import BATCH_SIZE, Classifier, Images, Trained, predict
from gowide_dist.networks.architecture import ARCHITECTURES, Architecture, MobileArchitecture
from gowide_dist.networks.foreign import Foreign, Settings, Timm, Torchvision
from gowide_dist.networks.normalise import DATASET
from gowide_dist.networks.teacher import fold_batch_norms
from gowide_dist.progress import say

SAFETENSORS, PT2, ONNX, INT8_ONNX = "model.safetensors", "model.pt2", "model.onnx", "model.int8.onnx"
CONFIG, REPORT = "config.json", "export.json"
LOGITS_TOLERANCE = 1e-4  # difference of a float32 file's logits from PyTorch's, relative to the largest if above 1
MAX_INT8_LOSS = 1.0  # points of top-1; with more the user is warned
CALIBRATION_IMAGES = 512
LATENCY_BATCHES = (1, 64)
_DYNAMIC_BATCH = {"images": {0: Dim("batch", min=1)}}
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def export(
    trained: Trained, to: Path, *, int8: bool = True, images: int | None = None, data: Path | None = None
) -> dict[str, Any]:
    """Write `config.json`, `model.safetensors`, `model.pt2`, `model.onnx` and, with int8, `model.int8.onnx`.

    The last three take uint8 images [B, H, H, 3] (RGB, any B) and give logits [B, K]: normalisation is inside. Each is
    timed, and compared with PyTorch on all validation images or on `images` of them, evenly spaced. data: the folder of
    the FFCV files, by default the run's; if these are not there, noise takes the place of validation images, and int8,
    which training images calibrate, is left out. Returns the content of `export.json`, which is written last; at once,
    if the folder holds this export already.

    Raises UserError if packages are missing or the folder holds anything else, InternalError if logits differ by more
    than LOGITS_TOLERANCE; then nothing is written.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"export needs {', '.join(missing)}: pip install -c constraints.txt -e '.[export]'")
    to, model_sha256 = to.absolute(), trained.done.model_sha256
    versions = {name: metadata.version(name) for name in ("gowide_dist", "torch", *_PACKAGES)}
    train, val = _data_files(trained, data)
    if int8 and not train:
        int8 = False
        say(f"note: {INT8_ONNX} is left out: no training images to calibrate it; --data DIR says where they are")
    asked: dict[str, Any] = {"int8": int8, "images": images, "with": versions, "threads": torch.get_num_threads()}
    asked |= {"train": train and str(train), "val": val and str(val)}
    report = _read_json(to / REPORT)
    if (report.get("model_sha256"), report.get("asked")) == (model_sha256, asked):
        paths = {to / name: file["sha256"] for name, file in report["files"].items()}
        if all(path.exists() and sha256(path) == digest for path, digest in paths.items()):
            say(f"{to}: already exported; nothing to do")
            return report
    exported = [_read_json(folder / CONFIG).get("model_sha256") for folder in (to, to / PARTIAL)]  # or interrupted
    if model_sha256 not in exported and to.exists() and (not to.is_dir() or {*to.iterdir()} - {to / PARTIAL}):
        raise RunError(f"{to}: contains files other than an export of these weights; remove it or choose another --to")
    try:
        with writing_to(to, "--to"), replacing(to, REPORT) as folder:
            report = _write(folder, trained, asked, train, val)
            if not int8:
                (to / INT8_ONNX).unlink(missing_ok=True)  # of an earlier export
    finally:
        with contextlib.suppress(OSError):
            to.rmdir()  # empty after a failure
    return report


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one, if the file holds anything else."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(content := json.loads(path.read_text()), dict):
            return content
    return {}


def _data_files(trained: Trained, data: Path | None) -> tuple[Path | None, Path | None]:
    """The FFCV files of training and of validation images in a folder; of the run's own, those that are there."""
    if data:
        train, val = (None, data) if data.suffix == ".beton" else (data / "train.beton", data / "val.beton")
        return (train if train and train.exists() else None), val
    train, val = trained.recipe.data.train, trained.recipe.data.val
    return (train if train.exists() else None), (val if val.exists() else None)


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


def _write(
    folder: Path, trained: Trained, asked: Mapping[str, Any], train: Path | None, val: Path | None
) -> dict[str, Any]:
    data = trained.recipe.data
    names = [SAFETENSORS, PT2, ONNX, *([INT8_ONNX] if asked["int8"] else [])]
    images = trained.validation_images(val, asked["images"]) if val else _Noise(data.resolution)  # raises before work
    with contextlib.closing(images) as validation:
        say(f"writing {', '.join(names)}")
        (folder / CONFIG).write_text(json.dumps(config(trained), indent=2) + "\n")
        shutil.copyfile(trained.run.stage(trained.instance.key).model, folder / SAFETENSORS)
        network = trained.network()
        program = _program(Classifier(fold_batch_norms(network), trained.preprocessing).eval(), data.resolution)
        torch.export.save(program, folder / PT2)
        _write_onnx(program, folder / ONNX)
        calibration = _write_int8(folder, trained, train) if asked["int8"] and train else None
        classifier = Classifier(network, trained.preprocessing).eval()
        figures, num_images = _measure(classifier, [folder / name for name in names[1:]], validation, data.resolution)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
    report = {
        "model_sha256": trained.done.model_sha256,
        "asked": asked,
        "cpu": cpu_name(),
        "validation": {"data": str(val) if val else "noise", "images": num_images},
        "calibration": calibration,
        "pytorch": figures["pytorch"],
        "files": {name: file | figures.get(name, {}) for name, file in files.items()},
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    if asked["int8"] and val and (loss := figures["pytorch"]["top1"] - figures[INT8_ONNX]["top1"]) > MAX_INT8_LOSS:
        say(f"warning: {INT8_ONNX} loses {loss:.2f} points of top-1")
    return report


def config(trained: Trained) -> dict[str, Any]:
    """What a program needs to use the files: how to prepare images, and the classes of the logits."""
    architecture, preprocessing = trained.instance.architecture, trained.preprocessing
    side, num_classes = preprocessing.resolution, len(preprocessing.classes)
    shape = ["batch", side, side, 3]  # as image files are decoded: no copy for the caller, channels_last inside
    return {
        **trained.done.model_dump(include={"stage", "network", "top1", "top5", "fingerprint", "model_sha256"}),
        "architecture": architecture.model_dump(mode="json", exclude={"normalise"}),
        "torchvision": _in_torchvision(architecture, num_classes),
        **_in_timm(architecture, num_classes),
        "classes": preprocessing.classes,
        "resolution": side,
        "input": {"name": "images", "dtype": "uint8", "layout": "NHWC", "shape": shape, "channels": "RGB"},
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", num_classes]},
        "prepare": {
            "resize_shorter_side_px": preprocessing.resize_px,
            "resize": "bilinear, antialiased",
            "center_crop_px": side,
        },
        "normalise": {"mean": preprocessing.mean, "std": preprocessing.std, "of": "pixels / 255"},
    }


def _in_timm(architecture: Settings, num_classes: int) -> dict[str, Any]:
    """Of a model of timm's: the arguments of timm.create_model."""
    if not isinstance(architecture, Timm):
        return {}
    return {"timm": {"model": architecture.name, "arguments": {"num_classes": num_classes, **architecture.options}}}


def _in_torchvision(architecture: Settings, num_classes: int) -> dict[str, Any] | None:
    """The function of torchvision.models that builds the network, and its arguments, if there is one."""
    if isinstance(architecture, Torchvision):
        return {"model": architecture.name, "arguments": {"num_classes": num_classes, **architecture.options}}
    if isinstance(architecture, MobileArchitecture):
        is_plain = architecture.stem == "imagenet" and architecture.width == 1
        arguments = {"num_classes": num_classes, "width_mult": architecture.channels}
        return {"model": architecture.arch, "arguments": arguments} if is_plain else None
    if not isinstance(architecture, Architecture):
        return None
    width = 64 * architecture.width
    plain = architecture.model_copy(update={"width": 1.0, "zero_init_residual": False, "normalise": DATASET})
    if width == 64 or (width.is_integer() and architecture.block == "bottleneck"):
        for name in ARCHITECTURES:
            if plain == Architecture.model_validate({"arch": name}):
                return {"model": name, "arguments": {"num_classes": num_classes, "width_per_group": int(width)}}
    return None


def _program(classifier: Classifier, resolution: int) -> ExportedProgram:
    """The graph of a classifier for any number of images."""
    example = torch.zeros(2, resolution, resolution, 3, dtype=torch.uint8)  # a batch of 1 would become a constant
    try:
        program = torch.export.export(classifier, (example,), dynamic_shapes=_DYNAMIC_BATCH)
    except Exception as error:
        settings: object = classifier.network.architecture
        if isinstance(settings, Foreign):  # whose code may do what no graph can say
            raise InternalError(f"{settings}: torch.export: {' '.join(str(error).split())[:200]}") from error
        raise
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds paths of this machine
    return program


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    import onnx

    model = torch.onnx.export(  # type: ignore[union-attr]
        program, input_names=["images"], output_names=["logits"], dynamic_shapes=_DYNAMIC_BATCH, verbose=False
    ).model_proto
    graph = model.graph
    for entry in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        entry.ClearField("metadata_props")  # the exporter's notes, many times the size of the graph
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _write_int8(folder: Path, trained: Trained, train: Path) -> dict[str, Any]:
    """Quantise model.onnx to 8 bits; the training images that calibrate the activations' ranges.

    Signed weights and signed activations: with unsigned ones, processors without VNNI add pairs of products in 16 bits
    and saturate (ten points of top-1 on Fashion-MNIST).
    """
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / INT8_ONNX
    quant_pre_process(folder / ONNX, path, skip_optimization=True, skip_symbolic_shape=True)
    with contextlib.closing(trained.training_images(train, CALIBRATION_IMAGES)) as images:
        inputs = ({"images": batch.images.numpy()} for batch in images.batches())
        reader = SimpleNamespace(get_next=lambda: next(inputs, None))
        signed = QuantType.QInt8
        quantize_static(path, path, reader, per_channel=True, activation_type=signed, weight_type=signed)
    return {"data": str(train), "images": min(CALIBRATION_IMAGES, check_split(train).samples)}


@torch.inference_mode()
def _measure(classifier: Classifier, files: list[Path], validation: Images, side: int) -> tuple[dict[str, Any], int]:
    """Figures of PyTorch (`pytorch`) and of each file by name, one after the other; the number of images compared on.

    Raises InternalError if a float32 file's logits differ by more than LOGITS_TOLERANCE allows.
    """
    batches = {n: torch.randint(256, (n, side, side, 3), dtype=torch.uint8) for n in LATENCY_BATCHES}
    expected, labels = predict(classifier, validation, "validating PyTorch")
    allowed = LOGITS_TOLERANCE * max(1.0, float(expected.abs().max()))

    def measure(forward: Callable[[Tensor], Tensor], logits: Tensor) -> dict[str, Any]:
        best = logits.argmax(dim=1)
        return {
            "top1": None if (labels < 0).any() else 100 * float((best == labels).double().mean()),
            "top1_agreement": 100 * float((best == expected.argmax(dim=1)).double().mean()),
            "largest_logit_difference": float((logits - expected).abs().max()),
            "latency_ms": {str(n): round(latency_ms(forward, images), 3) for n, images in batches.items()},
        }

    figures = {"pytorch": measure(classifier, expected)}
    for path in files:
        forward = _open(path)
        figures[path.name] = measure(forward, predict(forward, validation, f"validating {path.name}")[0])
        difference = figures[path.name]["largest_logit_difference"]
        if path.name != INT8_ONNX and not difference <= allowed:  # also if it is NaN
            raise InternalError(
                f"{path.name}: its logits differ by up to {difference:.2g} from PyTorch's on {len(labels):,} "
                f"validation images, {allowed:.2g} is allowed; nothing was written"
            )
        del forward
        gc.collect()  # ends a session's threads, which would spin beside the next file's
    return figures, len(labels)


def _open(path: Path) -> Callable[[Tensor], Tensor]:
    """The file in its runtime on the CPU, with as many threads as PyTorch has."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def table(report: Mapping[str, Any]) -> str:
    """The content of `export.json` for the terminal."""
    columns = {
        "bytes": ("bytes", ","),
        "top-1 %": ("top1", ".2f"),
        "as PyTorch %": ("top1_agreement", ".2f"),
        "logits differ by": ("largest_logit_difference", ".1e"),
        **{f"ms, batch {size}": (str(size), ",.2f") for size in LATENCY_BATCHES},
    }
    rows = []
    for name, figures in {"(PyTorch, eager)": report["pytorch"], **report["files"]}.items():
        row = figures | figures.get("latency_ms", {})
        cells = ("" if row.get(key) is None else format(row[key], form) for key, form in columns.values())
        rows.append([name, *cells])
    validation, cpu = report["validation"], f"{report['cpu']}, threads: {report['asked']['threads']}"
    note = f"compared on {validation['images']:,} images of {validation['data']}; latency: medians, {cpu}"
    return f"{text.table(['file', *columns], rows)}\n\n{note}"
