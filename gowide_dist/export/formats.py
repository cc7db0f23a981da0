"""The formats of exported files: what each is made of, what it needs, and in which runtimes it is tried."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from gowide_dist.data.preprocessing import Quantisation
from gowide_dist.errors import UserError
from gowide_dist.export.process import missing_packages
from gowide_dist.schema import nearest


class Runtime(NamedTuple):
    """A program that runs a file: `backend.OPEN`'s name of it, and the packages it needs, by their names in pip."""

    name: str
    packages: tuple[str, ...]


class Format(NamedTuple):
    """A format. files: the first is the one that programs open; fixed: its batch is (1 unless --batch says more)."""

    files: tuple[str, ...]
    source: str | None = None  # the file that a process of its own makes it of; None: this process writes it
    packages: tuple[str, ...] = ()  # that the conversion needs, by their names in pip
    runtimes: tuple[Runtime, ...] = ()
    fixed: bool = False


_TORCH, _LITERT = Runtime("torch", ("torch",)), Runtime("litert", ("ai-edge-litert",))
_OF_ONNX = Runtime("onnxruntime", ("onnxruntime",)), Runtime("opencv", ("opencv-python",))
_OPENVINO = Runtime("openvino", ("openvino",))
SAFETENSORS, PT2, FIXED_PT2, TIMM = "safetensors", "pt2", "pt2-fixed", "timm"
FORMATS = {  # each after those that it is made of
    SAFETENSORS: Format(("model.safetensors",)),
    TIMM: Format(("timm/config.json", "timm/model.safetensors"), None, ("timm",), (Runtime("timm", ("timm",)),)),
    PT2: Format(("model.pt2",), runtimes=(_TORCH,)),
    FIXED_PT2: Format(("fixed.pt2",), fixed=True),  # on the way to others
    "onnx": Format(("model.onnx",), PT2, ("torch", "onnx", "onnxscript"), _OF_ONNX),
    "onnx-int8": Format(("model.int8.onnx",), "onnx", ("onnx", "onnxruntime"), _OF_ONNX),
    "openvino": Format(("model.xml", "model.bin"), "onnx", ("openvino",), (_OPENVINO,)),
    "openvino-int8": Format(("model.int8.xml", "model.int8.bin"), "onnx-int8", ("openvino",), (_OPENVINO,)),
    "litert": Format(("model.tflite",), FIXED_PT2, ("litert-torch",), (_LITERT,), fixed=True),
    "litert-int8": Format(
        ("model.int8.tflite",), "litert", ("ai-edge-quantizer", "ai-edge-litert"), (_LITERT,), fixed=True
    ),
    "executorch": Format(("model.pte",), FIXED_PT2, ("executorch",), (Runtime("executorch", ("executorch",)),), True),
}
OFFERED = [name for name in FORMATS if name != FIXED_PT2]
DEFAULT = (SAFETENSORS, PT2, "onnx", "onnx-int8")
INSTALL = {  # families, whose packages another Python may have, and how to get these
    "timm": "pip install -c constraints.txt -e '.[timm]'",
    "onnx": "pip install -c constraints.txt -e '.[export]'",
    "openvino": "pip install -c constraints.txt -e '.[openvino]'",
    "litert": "install them in an environment of their own, and name its Python by --converter litert=PYTHON",
    "executorch": "pip install -c constraints.txt -e '.[executorch]'",
}


def is_int8(name: str) -> bool:
    """Whether a format's weights and activations have 8 bits."""
    return name.endswith("-int8")


def with_sources(names: Sequence[str]) -> list[str]:
    """The formats and all that these are made of, each after its source."""
    needed = set(names)
    for name in reversed(FORMATS):
        if name in needed and (source := FORMATS[name].source):
            needed.add(source)
    return [name for name in FORMATS if name in needed]


def _has(names: Collection[str], family: str) -> bool:
    return any(name.partition("-")[0] == family for name in names)


@dataclass(frozen=True)
class Request:
    """What a user wants exported."""

    formats: tuple[str, ...] = DEFAULT
    opset: int | None = None  # of ONNX; None: the exporter's own
    batch: int | None = None  # images that the files take at once; None: any number, or 1 where a format has no such
    symmetric: bool = False  # int8 without zero points
    images: int | None = None  # to compare on; None: all of the validation images
    converters: Mapping[str, Path] = field(default_factory=dict)  # families' Pythons, where it is not this one

    def __post_init__(self) -> None:
        formats = set(with_sources(self.formats))
        if self.opset and "onnx" not in formats:
            raise UserError("--opset: is of ONNX files, and --format asks for none; add onnx, or leave --opset out")
        if self.symmetric and "onnx-int8" not in formats:
            raise UserError("--symmetric: is of onnx-int8 and openvino-int8; add one to --format, or leave it out")
        if self.batch and formats <= {SAFETENSORS, TIMM}:
            raise UserError("--batch: weights take any number of images; add a format of programs, or leave it out")
        for family in self.converters:
            if not _has(self.formats, family):
                raise UserError(f"--converter {family}: --format asks for no {family}; add it, or leave this out")

    def of(self, quantisation: Quantisation | None) -> Request:
        """The same for a network that is trained to be rounded in one way. Raises UserError if another is asked for."""
        if quantisation is None:
            return self
        if self.symmetric and not quantisation.symmetric:
            raise UserError(
                "--symmetric: it is trained with zero points; leave it out, or train `quantised: symmetric`"
            )
        return replace(self, symmetric=quantisation.symmetric and "onnx-int8" in with_sources(self.formats))

    def without(self, names: Collection[str]) -> Request:
        """The same but for some formats, and for options that are of these alone."""
        formats = tuple(name for name in self.formats if name not in names)
        kept = {*with_sources(formats)}
        return replace(
            self,
            formats=formats,
            opset=self.opset if "onnx" in kept else None,
            batch=None if kept <= {SAFETENSORS, TIMM} else self.batch,
            symmetric=self.symmetric and "onnx-int8" in kept,
            converters={family: path for family, path in self.converters.items() if _has(formats, family)},
        )

    def python(self, name: str) -> Path:
        """The Python that has the packages of a format, its converter's and its runtime's."""
        return self.converters.get(name.partition("-")[0], Path(sys.executable))

    def batch_of(self, name: str) -> int | None:
        """The images that a format's file takes at once; None: any number."""
        return self.batch or (1 if FORMATS[name].fixed else None)


def check_packages(request: Request) -> None:
    """Raises UserError if a Python lacks the packages that convert to a format."""
    for name in with_sources(request.formats):
        python = request.python(name)
        if missing := missing_packages(python, FORMATS[name].packages):
            family = name.partition("-")[0]
            own = f"{python} -m pip install {' '.join(missing)}"
            how = own if family in request.converters else INSTALL[family]
            raise UserError(f"--format {name} needs {', '.join(missing)}: {how}")


def parse_formats(text: str | None) -> tuple[str, ...]:
    """Formats in a list with commas, each once; the weights are always one of them."""
    if text is None:
        return DEFAULT
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in OFFERED:
            raise UserError(f"--format: no '{name}', {nearest(name, OFFERED)}")
    return tuple(name for name in OFFERED if name in {SAFETENSORS, *names})


def parse_converters(pairs: Sequence[str]) -> dict[str, Path]:
    """`FORMAT=PYTHON` each."""
    converters = {}
    for pair in pairs:
        family, _, path = pair.partition("=")
        if family not in INSTALL or not path:
            raise UserError(
                f"--converter {pair}: should be FORMAT=PYTHON, as litert=~/litert/bin/python, with one of "
                f"{', '.join(INSTALL)}"
            )
        converters[family] = Path(path).expanduser().absolute()
        if not converters[family].is_file():
            raise UserError(f"--converter {pair}: there is no file {path}; give the python of an environment")
    return converters
