"""Converts an exported network to a format, or runs a file in a runtime: `python backend.py JOB`, JOB being JSON.

A program of its own that imports nothing of this package, so that any Python that has the format's packages can run it.
A file takes images, uint8 [B, H, H, 3], and gives logits, float32 [B, K].

`{"convert": FORMAT, "source": PATH, "target": PATH, ...}` writes a file, while stdin is open. `{"run": RUNTIME,
"file": PATH, ...}` opens one, answers on stdout with a line of JSON, its versions and latency, and from then on with
logits for images: the number of images, int64, goes before their bytes on stdin, and nothing before those of the
logits, [B, K].

On failure the last line on stderr says why.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Forward = Callable[[Any], Any]  # images, uint8 [B, H, H, 3] -> logits, float32 [B, K]
RECTIFIERS = "Relu", "Clip"


def convert_onnx(source: str, target: str, job: dict[str, Any]) -> None:
    """model.pt2 -> model.onnx. opset: None for the exporter's own; batch: None for any number of images.

    names: where to write the names of its tensors by those of the program's nodes.
    """
    import onnx
    import torch

    model = torch.onnx.export(  # type: ignore[union-attr]
        torch.export.load(source),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=None if job["batch"] else {"images": {0: torch.export.Dim("batch", min=1)}},
        opset_version=job["opset"],
        verbose=False,
    ).model_proto
    graph = model.graph
    nodes = {tensor: _entry(node, "pkg.torch.onnx.fx_node") for node in graph.node for tensor in node.output[:1]}
    names = {text.partition(" ")[0].lstrip("%"): tensor for tensor, text in nodes.items()}  # of several the last
    Path(job["names"]).write_text(json.dumps(names))
    for entry in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        entry.ClearField("metadata_props")  # the exporter's notes, many times the size of the graph
    if job["opset"] not in (None, model.opset_import[0].version):
        raise ValueError(f"opset {job['opset']} cannot be written; the exporter gives {model.opset_import[0].version}")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, target)


def convert_onnx_int8(source: str, target: str, job: dict[str, Any]) -> None:
    """model.onnx -> model.int8.onnx: weights quantised per channel, activations by the images of `calibration`, but for
    those whose `ranges`, by nodes of the program, the network was trained with.

    Signed weights and signed activations: with unsigned ones, processors without VNNI add pairs of products in 16 bits
    and saturate (ten points of top-1 on Fashion-MNIST). symmetric: without zero points, which some accelerators want.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        batches = iter(_in_batches(np.load(job["calibration"]), job["batch"] or 64))

        def get_next(self) -> Any:
            images = next(self.batches, None)
            return None if images is None else {"images": images}

    quant_pre_process(source, target, skip_optimization=True, skip_symbolic_shape=True)
    names = json.loads(Path(job["names"]).read_text())
    if missing := [node for node in job["ranges"] if node not in names]:
        raise LookupError(f"ONNX's exporter names no tensor as {', '.join(missing[:3])}, whose ranges are trained")
    limits = {names[node]: tuple(limits) for node, limits in job["ranges"].items()}
    limits |= _before_rectifiers(target, limits)
    overrides = {name: [{"rmin": np.float32(low), "rmax": np.float32(high)}] for name, (low, high) in limits.items()}
    signed, options = QuantType.QInt8, {"ActivationSymmetric": job["symmetric"], "WeightSymmetric": True}
    # logits stay as they are: in 8 bits the best two would often be equal
    options |= {"TensorQuantOverrides": overrides, "OpTypesToExcludeOutputQuantization": ["Gemm"]}
    types = {"activation_type": signed, "weight_type": signed}
    quantize_static(target, target, Reader(), per_channel=True, **types, extra_options=options)
    _limit_weights(target, onnx.load(source))


def _before_rectifiers(path: str, limits: dict[str, Any]) -> dict[str, Any]:
    """The ranges of tensors that only a rectifier reads, which is an operation of its own without zero points: those of
    what it gives, for it cuts off the rest.
    """
    import onnx

    nodes = onnx.load(path).graph.node
    reads = Counter(name for node in nodes for name in node.input)
    pairs = ((node.input[0], node.output[0]) for node in nodes if node.op_type in RECTIFIERS)
    return {before: limits[after] for before, after in pairs if reads[before] == 1 and after in limits}


def _limit_weights(path: str, unrounded: Any) -> None:
    """Round those weights and biases of a file again whose steps are coarser than the steps of what they give.

    A channel whose input is always zero had no variance in training, and by its batch norm it has huge weights: a step
    of its bias, which is that of the weights times that of the input, would be as coarse. They are cut off instead.
    """
    import onnx
    from onnx.numpy_helper import from_array, to_array

    model = onnx.load(path)
    stored = {each.name: each for each in model.graph.initializer}
    given = {each.name: to_array(each) for each in unrounded.graph.initializer}
    reads = {node.name: [given.get(name) for name in node.input] for node in unrounded.graph.node}
    made_by = {output: node for node in model.graph.node for output in node.output}
    steps_of = {node.input[0]: node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}

    def replace(name: str, values: Any) -> None:
        stored[name].CopyFrom(from_array(values.astype(to_array(stored[name]).dtype), name))

    for node in model.graph.node:
        if node.op_type != "Conv" or len(node.input) < 3 or node.output[0] not in steps_of:
            continue
        read, weight, bias = (made_by[name].input for name in node.input)  # of DequantizeLinear: values, step, zero
        step, weight_steps = (to_array(stored[name]) for name in (read[1], weight[1]))
        allowed = to_array(stored[steps_of[node.output[0]]]) / step
        if (weight_steps > allowed).any():
            kept = np.minimum(weight_steps, allowed)
            _, weights, biases = reads[node.name]
            replace(weight[1], kept)
            replace(weight[0], np.clip(np.rint(weights / kept.reshape(-1, 1, 1, 1)), -127, 127))
            replace(bias[1], step * kept)
            replace(bias[0], np.rint(biases / (step * kept)))
    onnx.save(model, path)


def _entry(node: Any, key: str) -> str:
    """What an ONNX node's metadata say under a key."""
    return next((entry.value for entry in node.metadata_props if entry.key == key), "")


def convert_openvino(source: str, target: str, job: dict[str, Any]) -> None:
    """model.onnx, or model.int8.onnx, -> an .xml and the .bin beside it."""
    import openvino

    openvino.save_model(openvino.convert_model(source), target, compress_to_fp16=False)


def convert_litert(source: str, target: str, job: dict[str, Any]) -> None:
    """A program of a fixed batch -> model.tflite."""
    import litert_torch
    import torch

    program = torch.export.load(source).module()
    images = torch.zeros(job["batch"], *job["image"], dtype=torch.uint8)
    litert_torch.convert(program, (images,)).export(target)


def convert_litert_int8(source: str, target: str, job: dict[str, Any]) -> None:
    """model.tflite -> model.int8.tflite: weights quantised per channel, activations by the images of `calibration`."""
    from ai_edge_quantizer import calibrator, quantizer, recipe_manager
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.utils import qsv_utils

    recipe = recipe_manager.RecipeManager()
    recipe.add_static_config(".*", TFLOperationName.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
    recipe.add_quantization_config(".*", TFLOperationName.OUTPUT, algorithm_key="no_quantize")  # logits are float32
    quantiser = quantizer.Quantizer(source, recipe.get_quantization_recipe())
    [(name, signature)] = _litert(source).get_signature_list().items()
    [images] = signature["inputs"]
    samples = [{images: batch} for batch in _in_batches(np.load(job["calibration"]), job["batch"])]
    # ranges of all images; by default a moving average over single images, which cuts off the rare large values
    ranges = calibrator.Calibrator(source, qsv_update_func=qsv_utils.min_max_update)
    ranges.calibrate({name: samples}, recipe)
    quantiser.quantize(ranges.get_model_qsvs()).export_model(target, overwrite=True)


def convert_executorch(source: str, target: str, job: dict[str, Any]) -> None:
    """A program of a fixed batch -> model.pte, computed by XNNPACK."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = to_edge_transform_and_lower(torch.export.load(source), partitioner=[XnnpackPartitioner()])
    Path(target).write_bytes(program.to_executorch().buffer)


def open_torch(job: dict[str, Any]) -> Forward:
    """A torch.export program, in PyTorch."""
    import torch

    torch.set_num_threads(job["threads"])
    module = torch.export.load(job["file"]).module()

    def forward(images: Any) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return forward


def open_timm(job: dict[str, Any]) -> Forward:
    """The folder of a config.json and weights, as timm builds and normalises it."""
    import timm
    import torch

    torch.set_num_threads(job["threads"])
    network = timm.create_model(f"local-dir:{Path(job['file']).parent}", pretrained=True).eval()
    config: Any = network.pretrained_cfg
    mean, std = (255 * torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))

    def forward(images: Any) -> Any:
        with torch.inference_mode():
            return network((torch.from_numpy(images).permute(0, 3, 1, 2) - mean) / std).numpy()

    return forward


def open_onnxruntime(job: dict[str, Any]) -> Forward:
    """An ONNX file, in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    session = onnxruntime.InferenceSession(job["file"], options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def open_opencv(job: dict[str, Any]) -> Forward:
    """An ONNX file, in OpenCV."""
    import cv2

    cv2.setNumThreads(job["threads"])
    # 5.0 has two engines, of which the new one fails at the first layer of a quantised file
    engine = [cv2.dnn.ENGINE_CLASSIC] if ".int8." in job["file"] and hasattr(cv2.dnn, "ENGINE_CLASSIC") else []
    network = cv2.dnn.readNetFromONNX(job["file"], *engine)

    def forward(images: Any) -> Any:
        network.setInput(images, "images")
        return network.forward("logits").copy()

    return forward


def open_openvino(job: dict[str, Any]) -> Forward:
    """An .xml with its .bin, in OpenVINO, computed in float32 where it is not quantised."""
    import openvino

    hints = {"INFERENCE_NUM_THREADS": job["threads"], "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(job["file"], "CPU", hints)
    request = compiled.create_infer_request()
    return lambda images: request.infer([images])[0].copy()


def open_litert(job: dict[str, Any]) -> Forward:
    """A .tflite, in LiteRT."""
    interpreter = _litert(job["file"], job["threads"])
    [name] = interpreter.get_signature_list()
    runner = interpreter.get_signature_runner(name)
    [images_name], [logits_name] = (interpreter.get_signature_list()[name][part] for part in ("inputs", "outputs"))
    return lambda images: runner(**{images_name: images})[logits_name]


def _litert(path: str, threads: int = 1) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(path, num_threads=threads)


def open_executorch(job: dict[str, Any]) -> Forward:
    """A .pte, in ExecuTorch."""
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(job["file"]).load_method("forward")
    return lambda images: method.execute([torch.from_numpy(images)])[0].numpy().copy()


CONVERT = {
    "onnx": convert_onnx,
    "onnx-int8": convert_onnx_int8,
    "openvino": convert_openvino,
    "openvino-int8": convert_openvino,
    "litert": convert_litert,
    "litert-int8": convert_litert_int8,
    "executorch": convert_executorch,
}
OPEN = {
    "torch": open_torch,
    "timm": open_timm,
    "onnxruntime": open_onnxruntime,
    "opencv": open_opencv,
    "openvino": open_openvino,
    "litert": open_litert,
    "executorch": open_executorch,
}


def _in_batches(images: Any, batch: int) -> list[Any]:
    """Images [N, H, H, 3] in batches of exactly `batch`; a last one that is not full is filled up with its last image.

    Fewer images than that are one batch, if the file takes any number.
    """
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    missing = batch - len(parts[-1])
    if missing:
        parts[-1] = np.concatenate([parts[-1], np.repeat(parts[-1][-1:], missing, axis=0)])
    return parts


def _median_ms(forward: Forward, images: Any) -> float:
    """Median ms of a call after warm-up, over 3 to 50 calls that take about a second together."""
    calls: list[float] = []
    for _ in range(2):
        forward(images)
    while len(calls) < 3 or (sum(calls) < 1 and len(calls) < 50):
        start = time.perf_counter()
        forward(images)
        calls.append(time.perf_counter() - start)
    return 1000 * statistics.median(calls)


def run(job: dict[str, Any], stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Open a file in its runtime, time it, and answer images with logits until stdin ends."""
    forward, height, batch = OPEN[job["run"]](job), job["image"][0], job["batch"]
    noise = np.random.default_rng(0).integers(256, size=(batch or 1, *job["image"]), dtype=np.uint8)
    versions = {name: importlib.metadata.version(name) for name in job["packages"]}
    answer = {"with": versions, "latency_ms": {str(len(noise)): round(_median_ms(forward, noise), 3)}}
    stdout.write(json.dumps(answer).encode() + b"\n")
    stdout.flush()
    while header := stdin.read(8):
        (count,) = struct.unpack("<q", header)
        images = np.frombuffer(stdin.read(count * height * height * 3), np.uint8).reshape(count, *job["image"])
        logits = np.concatenate([forward(part) for part in (_in_batches(images, batch) if batch else [images])])
        stdout.write(np.ascontiguousarray(logits[:count], np.float32).tobytes())
        stdout.flush()


def _end_with_stdin() -> None:
    """End when stdin does: whoever wanted the file was killed."""
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    """Do the job that the command line gives. What libraries print goes to stderr, whatever they print it to."""
    job = json.loads(sys.argv[1])
    stdout = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        if "convert" in job:
            threading.Thread(target=_end_with_stdin, daemon=True).start()
            CONVERT[job["convert"]](job["source"], job["target"], job)
        else:
            run(job, sys.stdin.buffer, stdout)
    except Exception as error:
        import traceback

        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    main()
