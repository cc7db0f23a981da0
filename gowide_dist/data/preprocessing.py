"""What a network takes and gives, so that its weights are of use without the dataset that it was trained on.

Light to import: a login node reads the metadata of weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from gowide_dist.data.info import DatasetInfo
from gowide_dist.errors import DataError, RunError
from gowide_dist.networks.normalise import Channels, Normalise
from gowide_dist.recipe import Data

if TYPE_CHECKING:
    from torch import Tensor

    from gowide_dist.data.images import Decoded, Pixels

METADATA = "gowide_dist"  # key in the metadata of a file of weights, the only one


class Quantisation(BaseModel):
    """How a network that is trained to be rounded to 8 bits is rounded; see `networks.quantised`."""

    model_config = ConfigDict(frozen=True)

    symmetric: bool  # without zero points
    ranges: tuple[tuple[float, float], ...]  # the least and the largest value of each activation, in their order


class Preprocessing(BaseModel):
    """How images are prepared for a network, and the names of the classes of its logits.

    An image is resized so that its shorter side has `resize_px`, cut to the `resolution` px in its middle, and
    normalised: (pixel / 255 - mean) / std. background, bits: as the training images were encoded, see `Storage`.
    quantisation: of the network itself, if it is rounded.
    """

    model_config = ConfigDict(frozen=True)

    classes: tuple[str, ...]
    resolution: int
    resize_px: int
    mean: Channels
    std: Channels
    background: str = "white"
    bits: int | None = None
    quantisation: Quantisation | None = None

    @classmethod
    def of(
        cls, data: Data, info: DatasetInfo, normalise: Normalise, quantisation: Quantisation | None = None
    ) -> Preprocessing:
        """Of a network that is trained on a recipe's data."""
        encoding = {key: info.encoding[key] for key in ("background", "bits") if info.encoding.get(key) is not None}
        return cls.model_validate(
            {
                "classes": info.classes,
                "resolution": data.resolution,
                "resize_px": round(data.resolution / (data.center_crop or 1.0)),
                "mean": normalise.mean or info.mean,
                "std": normalise.std or info.std,
                **encoding,
                "quantisation": quantisation,
            }
        )

    @property
    def metadata(self) -> dict[str, str]:
        """As a file of weights holds it: `read_preprocessing` reads it."""
        return {METADATA: self.model_dump_json(exclude_defaults=True)}

    def __call__(self, *images: Any) -> Tensor:
        """A network's input, float32 [B, 3, R, R], of images that `pixels` takes."""
        import torch

        if not images or isinstance(images[0], list | tuple):
            raise TypeError("images are arguments of their own: preprocessing(*images)")
        mean, std = (torch.tensor(channels) * 255 for channels in (self.mean, self.std))
        pixels = torch.stack([torch.from_numpy(self.pixels(image)) for image in images])
        return ((pixels - mean) / std).permute(0, 3, 1, 2)

    def decode(self, path: Path) -> Decoded:
        """The upright RGB pixels of an image file. Raises DataError if it cannot be decoded."""
        from PIL import UnidentifiedImageError

        from gowide_dist.data.images import Storage, read_rgb

        try:
            return read_rgb(path.read_bytes(), Storage(background=self.background, bits=self.bits))
        except UnidentifiedImageError:
            reason = "not an image in a format that Pillow knows"
        except Exception as error:  # on damaged files Pillow and its plugins may raise anything
            reason = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
        raise DataError(f"{path}: {reason}; remove or mend it")

    def pixels(self, image: Any) -> Pixels:
        """The part of an image that the network sees, uint8 [R, R, 3], as torchvision's Resize and CenterCrop give it.

        image: a path, an image of 8 bits of Pillow's, or RGB pixels, uint8 [H, W, 3]. Raises DataError if it cannot be
        decoded, and TypeError if it is anything else.
        """
        import numpy as np
        from PIL import Image

        from gowide_dist.data.images import composed_on

        if isinstance(image, str | Path):
            image = self.decode(Path(image)).pixels
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image) or image.mode.startswith(("I", "F")):
            kind = getattr(image, "mode", type(image).__name__)
            raise TypeError(f"an image is a path, one of Pillow's of 8 bits, or uint8 [H, W, 3], not {kind}")
        shorter = min(image.size)
        size = [self.resize_px * side // shorter for side in image.size]
        image = composed_on(image, self.background)[0].resize(size, Image.Resampling.BILINEAR)
        left, top = (round((side - self.resolution) / 2) for side in size)
        return np.array(image.crop((left, top, left + self.resolution, top + self.resolution)))


def read_preprocessing(weights: Path) -> Preprocessing | None:
    """What the metadata of a .safetensors file says; None if they say nothing. Raises RunError if they are damaged."""
    try:
        with safe_open(weights, framework="numpy") as file:
            text = (file.metadata() or {}).get(METADATA)
        return None if text is None else Preprocessing.model_validate_json(text)
    except (OSError, SafetensorError, ValidationError) as error:
        raise RunError(f"{weights}: cannot be read, or its metadata are damaged") from error
