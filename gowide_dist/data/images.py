"""Images on their way into a dataset: decoded from any image file to upright RGB, encoded as raw pixels or JPEG."""

import io
from pathlib import Path
from typing import NamedTuple, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from gowide_dist.data.beton import JPEG, MAX_SIDE_PX, PAGE_BYTES, RAW, EncodedImage, StoredImage
from gowide_dist.data.order import draw

Pixels: TypeAlias = NDArray[np.uint8]

_JPEG_MAX_SIDE_PX = 65_500  # of libjpeg
_UPRIGHT = {  # by EXIF's orientation; ImageOps.exif_transpose would rewrite all of EXIF, and fails on unusual tags
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class Sample(NamedTuple):
    """An encoded image with its label. moments: of channel_moments."""

    image: EncodedImage
    label: int
    moments: NDArray[np.float64]


class BadImage(NamedTuple):
    """A file, or a sample of one, that holds no whole image, and the reason."""

    path: Path
    reason: str


def encode_sample(
    source: Path | StoredImage | Pixels, label: int, index: int, jpg_share: float | None, quality: int = 90,
    max_side_px: int | None = None,
) -> Sample | BadImage:  # fmt: skip
    """Encode a file, or pixels [H, W] or [H, W, 3], as `encode.Options` says; `index` decides which become JPEG."""
    path = Path(f"sample {index}")
    image: EncodedImage | None = None
    try:
        if isinstance(source, np.ndarray):
            pixels = source if source.ndim == 3 else np.repeat(source[:, :, None], 3, axis=2)
        elif isinstance(source, Path):
            path = source
            if source.exists() and not source.is_file():  # a pipe would be waited for, for ever
                return BadImage(path, "not a regular file")
            pixels = read_rgb(source.read_bytes())
        else:
            path = source.path / path
            image = source.read()
            pixels = decode_stored(image)
    except UnidentifiedImageError:
        return BadImage(path, "not an image in a format that Pillow knows")
    except Exception as error:  # on damaged files Pillow and its plugins may raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return BadImage(path, " ".join(reason.replace(f"{path}", "").split()) or type(error).__name__)
    if jpg_share is not None:
        pixels = _shrink(pixels, max_side_px)
        as_jpg = float(draw(np.zeros(1, np.uint64), np.array([index], np.uint64))[0]) / 2**64 < jpg_share
        height, width = pixels.shape[:2]
        longest = max(height, width)
        if longest > (_JPEG_MAX_SIDE_PX if as_jpg else MAX_SIDE_PX):
            return BadImage(path, f"{longest:,} px wide or high: too large; use --max-side-px")
        image = encode_jpg(pixels, quality) if as_jpg else EncodedImage(RAW, height, width, pixels.tobytes())
    assert image is not None, "only the images of an FFCV file can stay as they are"
    if len(image.data) > PAGE_BYTES:
        sizes = f"{image.width}x{image.height} px take {len(image.data):,} bytes, more than a page of {PAGE_BYTES:,}"
        return BadImage(path, f"{sizes}; use --write-mode jpg or a smaller --max-side-px")
    return Sample(image, label, channel_moments(pixels))


def read_rgb(content: bytes) -> Pixels:
    """Decode an image file of any format that Pillow knows to upright RGB: uint8 [H, W, 3].

    Rotated as its EXIF says; CMYK, grey, palette and 16-bit images are converted; transparency is ignored, as in
    torchvision. Raises ValueError if its pixel values have no known scale, and any error of Pillow's if it is damaged.
    """
    if not content:
        raise ValueError("empty file")
    with Image.open(io.BytesIO(content)) as file:
        turned = _UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation, 1))
        image: Image.Image = file if turned is None else file.transpose(turned)
        if image.mode == "F" or (image.mode == "I" and file.format == "TIFF"):
            raise ValueError("floating-point or 32-bit pixels, whose white level is unknown; convert to 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits a channel, which convert() would clip at 255 instead of scaling
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        return np.asarray(image.convert("RGB"))


def decode_stored(image: EncodedImage) -> Pixels:
    """The RGB pixels [H, W, 3] of an image in an FFCV file, by Pillow. Raises OSError or ValueError if damaged."""
    if image.mode == JPEG:
        with Image.open(io.BytesIO(image.data)) as file:
            pixels = np.asarray(file.convert("RGB"))
    else:
        pixels = np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)
    if pixels.shape[:2] != (image.height, image.width):
        raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]} px instead of {image.width}x{image.height}")
    return pixels


def encode_jpg(pixels: Pixels, quality: int) -> EncodedImage:
    """pixels: [H, W, 3] RGB. quality: 1 to 100, of libjpeg."""
    encoded, stream = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert encoded
    return EncodedImage(JPEG, pixels.shape[0], pixels.shape[1], stream.tobytes())


def channel_moments(pixels: Pixels) -> NDArray[np.float64]:
    """Mean and mean square of each channel, on a scale of 0 to 1: [2, 3] from [H, W, 3]."""
    mean, std = cv2.meanStdDev(pixels)
    return np.stack([mean[:, 0] / 255, (mean[:, 0] ** 2 + std[:, 0] ** 2) / 255**2])


def _shrink(pixels: Pixels, max_side_px: int | None) -> Pixels:
    height, width = pixels.shape[:2]
    if max_side_px is None or max(height, width) <= max_side_px:
        return pixels
    scale = max_side_px / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
