"""Images on their way into a dataset: decoded from any image file to upright RGB, encoded as raw pixels or JPEG."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from gowide_dist.data import jpeg
from gowide_dist.data.beton import JPEG, MAX_SIDE_PX, PAGE_BYTES, RAW, EncodedImage, StoredImage
from gowide_dist.data.memory import available_memory_bytes
from gowide_dist.data.order import draw
from gowide_dist.data.sources import FileImage

Pixels: TypeAlias = NDArray[np.uint8]
Item: TypeAlias = FileImage | StoredImage | Pixels

_VERSION = 1  # of image_key: another one where images are encoded otherwise
_JPEG_MAX_SIDE_PX = 65_500  # of libjpeg
_CHECK_SCALE = 8  # to find damage it is enough to compute one pixel of 64: the coefficients are decoded all the same
_CHECKED_PX = 1 << 24  # images of fewer pixels are decoded without asking how much memory is free
_BYTES_PER_PX = 12  # while an image is decoded, composed and shrunk
_STORAGE_DRAW, _MEASURE_DRAW = 0, 1  # keys
_UPRIGHT = {  # by EXIF's orientation; ImageOps.exif_transpose would rewrite all of EXIF, and fails on unusual tags
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
Image.MAX_IMAGE_PIXELS = None  # `_check_memory` and the limits of a page take the place of Pillow's limit


@dataclass(frozen=True)
class Storage:
    """How images are stored.

    jpg_share: the fraction of them stored as JPEG, of `quality` 1 to 100; the others are stored raw. None keeps upright
    RGB and grey JPEGs and an FFCV file's images as they are, byte for byte, and stores all else as JPEG. max_side_px:
    larger images are shrunk to it. background: the colour under transparent pixels, by its name or as #rrggbb. bits:
    the ones that images of 16 bits use, by default all.
    """

    jpg_share: float | None = 0.0
    quality: int = 90
    max_side_px: int | None = None
    background: str = "white"
    bits: int | None = None

    def is_jpg(self, index: int) -> bool:
        """Whether image number `index` is stored as JPEG."""
        return self.jpg_share is None or _is_chosen(_STORAGE_DRAW, index, self.jpg_share)


DEFAULT = Storage()


def _is_chosen(key: int, index: int, share: float) -> bool:
    """Whether image number `index` is one of a fraction of all."""
    if share in (0, 1):
        return share == 1
    return float(draw(np.array([key], np.uint64), np.array([index], np.uint64))[0]) / 2**64 < share


class Sample(NamedTuple):
    """An encoded image with its label. moments: of channel_moments, NaN where the image is not measured.

    peak: the highest value of an image of 16 bits, else 0. composed: whether it had transparent pixels.
    """

    image: EncodedImage
    label: int
    moments: NDArray[np.float64]
    peak: int = 0
    composed: bool = False


class BadImage(NamedTuple):
    """A file, or a sample of one, that holds no whole image, and the reason."""

    path: Path
    reason: str


class Decoded(NamedTuple):
    """Upright RGB pixels [H, W, 3]; peak and composed as in Sample."""

    pixels: Pixels
    peak: int = 0
    composed: bool = False


def encode_sample(
    source: Item, label: int, index: int, storage: Storage, measured_share: float = 1.0
) -> Sample | BadImage:
    """Encode an image, or pixels [H, W] or [H, W, 3]; `index` decides which become JPEG, and which are measured."""
    path = f"{source}" if isinstance(source, FileImage) else f"sample {index}"
    path = f"{source.path / path}" if isinstance(source, StoredImage) else path
    measured = _is_chosen(_MEASURE_DRAW, index, measured_share)
    try:
        kept = _keep(source, storage, measured)
        image, decoded = kept or _encode(source, index, storage)
        if len(image.data) > PAGE_BYTES:
            sizes = f"{image.width}x{image.height} px take {len(image.data):,} bytes"
            raise ValueError(
                f"{sizes}, more than a page of {PAGE_BYTES:,}; use --write-mode jpg or a smaller --max-side-px"
            )
    except UnidentifiedImageError:
        return BadImage(Path(path), "not an image in a format that Pillow knows")
    except Exception as error:  # on damaged files Pillow and its plugins may raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return BadImage(Path(path), " ".join(reason.replace(path, "").split()) or type(error).__name__)
    moments = channel_moments(decoded.pixels) if measured else np.full((2, 3), np.nan)
    return Sample(image, label, moments, decoded.peak, decoded.composed)


def image_key(source: Item, index: int, storage: Storage, measured_share: float) -> str:
    """A hash of all that encode_sample's result depends on, but for the label."""
    is_jpg, is_measured = storage.is_jpg(index), _is_chosen(_MEASURE_DRAW, index, measured_share)
    item = (source.shape, source.tobytes()) if isinstance(source, np.ndarray) else source
    return hashlib.blake2b(repr((_VERSION, item, storage, is_jpg, is_measured)).encode(), digest_size=16).hexdigest()


def _keep(source: Item, storage: Storage, measured: bool) -> tuple[EncodedImage, Decoded] | None:
    """An image as it is, if it may be stored so. It is decoded for its damage to be found, in full if `measured`."""
    if storage.jpg_share is not None or isinstance(source, np.ndarray):
        return None
    if isinstance(source, StoredImage):
        image = source.read()
        return image, Decoded(decode_stored(image))
    content = source.read()
    if not jpeg.is_jpeg(content):
        return None
    frame = jpeg.read_frame(content)
    longest = max(frame.height, frame.width)
    if not (frame.plain and frame.components in (1, 3) and len(content) <= PAGE_BYTES):
        return None
    if longest > min(storage.max_side_px or _JPEG_MAX_SIDE_PX, _JPEG_MAX_SIDE_PX):
        return None
    if frame.has_exif and _turned(content):
        return None
    pixels = jpeg.decode(content, frame, scale=1 if measured else _CHECK_SCALE)
    return EncodedImage(JPEG, frame.height, frame.width, content), Decoded(pixels)


def _turned(content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as file:
        return file.getexif().get(ExifTags.Base.Orientation, 1) in _UPRIGHT


def _encode(source: Item, index: int, storage: Storage) -> tuple[EncodedImage, Decoded]:
    if isinstance(source, np.ndarray):
        decoded = Decoded(source if source.ndim == 3 else np.repeat(source[:, :, None], 3, axis=2))
    elif isinstance(source, StoredImage):
        decoded = Decoded(decode_stored(source.read()))
    else:
        decoded = read_rgb(source.read(), storage)
    pixels = _shrink(decoded.pixels, storage.max_side_px)
    height, width = pixels.shape[:2]
    as_jpg = storage.is_jpg(index)
    if max(height, width) > (_JPEG_MAX_SIDE_PX if as_jpg else MAX_SIDE_PX):
        raise ValueError(f"{max(height, width):,} px wide or high: too large; use --max-side-px")
    image = encode_jpg(pixels, storage.quality) if as_jpg else EncodedImage(RAW, height, width, pixels.tobytes())
    return image, decoded._replace(pixels=pixels)


def read_rgb(content: bytes, storage: Storage = Storage()) -> Decoded:
    """Decode an image file of any format that Pillow knows to upright RGB.

    Rotated as its EXIF says; CMYK, grey, palette and 16-bit images are converted, transparent ones composed on
    `storage.background`. Raises ValueError if its pixel values have no known scale, if it is larger than memory allows,
    or a JPEG is damaged, and any error of Pillow's if another file is.
    """
    if not content:
        raise ValueError("empty file")
    with Image.open(io.BytesIO(content)) as file:
        _check_memory(*file.size)
        is_16_bit = _is_16_bit(file)  # of a PNG, EXIF is known once it is loaded, and this is forgotten then
        turned = _UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation, 1))
        image: Image.Image = file
        peak = 0
        if jpeg.is_jpeg(content):
            frame = jpeg.read_frame(content)
            if frame.components != 4:
                image = Image.fromarray(jpeg.decode(content, frame))
            else:  # Pillow knows which of them are inverted
                jpeg.decode(content, frame, _CHECK_SCALE)
        elif is_16_bit:
            image, peak = _read_16_bit(content, storage.bits or 16)
        elif file.mode == "F" or file.mode.startswith("I"):
            raise ValueError("floating-point or 32-bit pixels, whose white level is unknown; convert to 8 or 16 bits")
        image = image if turned is None else image.transpose(turned)
        image, composed = composed_on(image, storage.background)
        return Decoded(np.asarray(image), peak, composed)


def composed_on(image: Image.Image, background: str) -> tuple[Image.Image, bool]:
    """An image in RGB, on `background` where it is transparent, and whether it is anywhere."""
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    image = image.convert("RGBA")
    is_transparent = image.getchannel("A").getextrema() != (255, 255)
    ground = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(ground, image).convert("RGB"), is_transparent


def _is_16_bit(file: ImageFile.ImageFile) -> bool:
    """Whether an image has 16 bits a channel; of coloured ones Pillow would read the upper 8."""
    if file.mode.startswith("I"):
        return file.format != "TIFF" or file.mode.startswith("I;16")
    return file.format in ("PNG", "TIFF") and any(";16" in f"{tile[3]}" for tile in file.tile)


def _read_16_bit(content: bytes, bits: int) -> tuple[Image.Image, int]:
    """An image of 16 bits a channel, of which `bits` are used, as one of 8, with its highest value."""
    with Image.open(io.BytesIO(content)) as file:
        file.load()  # OpenCV passes over some damage
        values = np.asarray(file).astype(np.int64) if file.mode.startswith("I") else None
    if values is None:  # coloured, or with transparency
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None or pixels.dtype != np.uint16:
            raise ValueError("16 bits a channel in a form that OpenCV does not read; convert to 8 bits")
        values = np.asarray(pixels, np.int64)
        values = np.dstack([values[..., 2::-1], values[..., 3:] >> (16 - bits)])
    levels = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels), int(values[..., :3].max())


def _check_memory(width: int, height: int) -> None:
    if width * height > _CHECKED_PX and width * height * _BYTES_PER_PX > (free := available_memory_bytes()):
        size = f"{width:,} x {height:,} px take {width * height * _BYTES_PER_PX / 2**30:.1f} GiB to decode"
        raise ValueError(f"{size}, {free / 2**30:.1f} are free; use fewer --workers, or shrink it")


def decode_stored(image: EncodedImage) -> Pixels:
    """The RGB pixels [H, W, 3] of an image in an FFCV file. Raises OSError or ValueError if it is damaged."""
    if image.mode == JPEG:
        pixels = jpeg.decode(image.data, jpeg.read_frame(image.data))
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
