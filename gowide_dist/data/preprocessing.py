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

    from gowide_dist.data.images import Pixels

METADATA = "gowide_dist"  # key in the metadata of a file of weights, the only one


class Preprocessing(BaseModel):
    """How images are prepared for a network, and the names of the classes of its logits.

    An image is resized so that its shorter side has `resize_px`, cut to the `resolution` px in its middle, and
    normalised: (pixel / 255 - mean) / std.
    """

    model_config = ConfigDict(frozen=True)

    classes: tuple[str, ...]
    resolution: int
    resize_px: int
    mean: Channels
    std: Channels

    @classmethod
    def of(cls, data: Data, info: DatasetInfo, normalise: Normalise) -> Preprocessing:
        """Of a network that is trained on a recipe's data."""
        return cls(
            classes=info.classes,
            resolution=data.resolution,
            resize_px=round(data.resolution / (data.center_crop or 1.0)),
            mean=normalise.mean or info.mean,
            std=normalise.std or info.std,
        )

    def __call__(self, *images: Any) -> Tensor:
        """A network's input, float32 [B, 3, R, R], of images that `pixels` takes."""
        import torch

        mean, std = (torch.tensor(channels) * 255 for channels in (self.mean, self.std))
        pixels = torch.stack([torch.from_numpy(self.pixels(image)) for image in images])
        return ((pixels - mean) / std).permute(0, 3, 1, 2)

    def pixels(self, image: Any) -> Pixels:
        """The part of an image that the network sees, uint8 [R, R, 3], as torchvision's Resize and CenterCrop give it.

        image: a path, an image of Pillow's, or RGB pixels, uint8 [H, W, 3]. Raises DataError if it cannot be decoded.
        """
        import numpy as np
        from PIL import Image

        if isinstance(image, str | Path):
            image = _read(Path(image))
        if not isinstance(image, Image.Image):
            image = Image.fromarray(image)
        shorter = min(image.size)
        size = [self.resize_px * side // shorter for side in image.size]
        image = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        left, top = (round((side - self.resolution) / 2) for side in size)
        return np.array(image.crop((left, top, left + self.resolution, top + self.resolution)))


def _read(path: Path) -> Pixels:
    """The upright RGB pixels of an image file, uint8 [H, W, 3]. Raises DataError if it cannot be decoded."""
    from PIL import UnidentifiedImageError

    from gowide_dist.data.images import read_rgb

    try:
        return read_rgb(path.read_bytes()).pixels
    except UnidentifiedImageError:
        reason = "not an image in a format that Pillow knows"
    except Exception as error:  # on damaged files Pillow and its plugins may raise anything
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
    raise DataError(f"{path}: {reason}; remove or mend it")


def read_preprocessing(weights: Path) -> Preprocessing | None:
    """What the metadata of a .safetensors file says; None if they say nothing. Raises RunError if they are damaged."""
    try:
        with safe_open(weights, framework="numpy") as file:
            text = (file.metadata() or {}).get(METADATA)
        return None if text is None else Preprocessing.model_validate_json(text)
    except (OSError, SafetensorError, ValidationError) as error:
        raise RunError(f"{weights}: cannot be read, or its metadata are damaged") from error
