"""Images of an FFCV file into a batch, in one compiled pass: decoding, crop or shift, and flip.

Every random choice is a draw keyed by (epoch key, sample): the same in any batch, process or thread. Pixels are
computed without re-ordered floating point: the same on every processor. numba caches the compiled code on disk: 5 s of
compiling on the first run, well under one later.

Shapes: N samples in the file, B images in a batch, R the resolution. In compiled functions `beton` is a BetonArrays,
`scratch` a Scratch, `index` a sample of the file, `key` a uint64.
"""

import ctypes
import math
from typing import Any, NamedTuple, TypeAlias

import llvmlite.binding
import numba
import numpy as np
from numba import types

from gowide_dist.data import order
from gowide_dist.data.beton import JPEG, Beton
from gowide_dist.data.jpeg import LIBRARY
from gowide_dist.data.kernels import kernel

_MCU_PX = 16  # height of a JPEG's MCU (ITU T.81, A.2) with 4:2:0 chroma, and more than upsampling looks ahead


class BetonArrays(NamedTuple):
    """The arrays of an open Beton that decoding needs, as numba takes them. bytes: uint8 [size]; the others [N]."""

    bytes: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    modes: np.ndarray
    heights: np.ndarray
    widths: np.ndarray

    @classmethod
    def of(cls, beton: Beton) -> "BetonArrays":
        return cls(beton.bytes, beton.offsets, beton.sizes, beton.modes, beton.heights, beton.widths)


class Shift(NamedTuple):
    """For square images of side R: flip half of them left to right, shift each axis by up to `translate` pixels."""

    flip: bool
    translate: int


UNCHANGED = Shift(flip=False, translate=0)


class RandomResizedCrop(NamedTuple):
    """torchvision's RandomResizedCrop and flip. scale: area of the crop over the image's; ratio: width over height."""

    flip: bool
    min_scale: float
    max_scale: float
    min_ratio: float
    max_ratio: float


class CenterCrop(NamedTuple):
    """torchvision's Resize(round(R / ratio)), then CenterCrop(R).

    Equal to within one level of 255 for raw images, since torchvision rounds between rows and columns. The pixels of a
    JPEG differ by about one level on average: FFCV's C library uses the fast inverse DCT, Pillow the exact one.
    """

    ratio: float


Geometry: TypeAlias = Shift | RandomResizedCrop | CenterCrop


class Scratch(NamedTuple):
    """One thread's memory to decode JPEGs: uint8, as large as the file's largest stream and largest image."""

    jpeg: np.ndarray
    pixels: np.ndarray  # read-only but for imdecode, so that numba sees the type of BetonArrays.bytes

    @classmethod
    def of(cls, beton: BetonArrays) -> "Scratch":
        """Scratch for any image of the file. Pages of it that stay untouched take no memory."""
        jpegs = beton.modes == JPEG
        pixels = np.empty((beton.heights * beton.widths)[jpegs].max(initial=0) * 3, np.uint8)
        pixels.setflags(write=False)
        return cls(np.empty(beton.sizes[jpegs].max(initial=0), np.uint8), pixels)


# `imdecode` of FFCV's C library (libffcv.cpp), its 13 arguments widened to 64 bits: input and its size, the image's
# height and width, output, the crop's height, width, x and y, the scale's numerator and denominator, whether to crop,
# whether to flip. Compiled code finds it by name, so that it can be cached: the address differs between processes.
llvmlite.binding.add_symbol("ffcv_imdecode", ctypes.cast(LIBRARY.imdecode, ctypes.c_void_p).value)
_imdecode: Any = types.ExternalFunction("ffcv_imdecode", types.int32(*[types.int64] * 13))

draw = numba.njit(order.draw)


@numba.njit
def uniform(key, position, low, high):
    """A float64 from low to below high."""
    return low + (high - low) * (np.float64(draw(key, np.uint64(position)) >> np.uint64(11)) * 2.0**-53)


@numba.njit
def uniform_int(key, position, low, high):
    """An integer from low to high, both included."""
    return low + np.int64(draw(key, np.uint64(position)) % np.uint64(high - low + 1))


@numba.njit
def _decode_jpeg(beton, index, num_rows, scratch):
    """Decode at least the top num_rows rows of a JPEG into scratch.pixels: uint8, rows of `width` RGB pixels.

    A crop rarely needs the rows below it, but imdecode has no way to stop there. So it decodes a copy of the stream
    whose frame header claims fewer rows. The status is ignored: libjpeg warns of the data that then remain, and every
    image was decoded once when it was encoded.
    """
    stream, size, width = scratch.jpeg, beton.sizes[index], beton.widths[index]
    stream[:size] = beton.bytes[beton.offsets[index] :][:size]
    # Whole MCU rows, and one more, from which chroma upsampling takes the neighbours of the last row.
    height = min(beton.heights[index], (num_rows + _MCU_PX) // _MCU_PX * _MCU_PX + _MCU_PX)
    # ITU T.81, B.1.1.4: SOI (2 bytes) is followed by marker segments: 0xFF, the marker's code, and a length of 2 bytes
    # that counts itself but not the marker. B.2.2: in the frame header, which is SOF0 (baseline), SOF1 (extended) or
    # SOF2 (progressive), P (precision, 1 byte) and Y (number of lines, 2 bytes, big-endian) follow: Y is bytes 5 and 6.
    marker = 2
    while marker + 9 < size:
        if 0xC0 <= stream[marker + 1] <= 0xC2:
            stream[marker + 5], stream[marker + 6] = height >> 8, height & 0xFF
            break
        marker += 2 + (np.int64(stream[marker + 2]) << 8) + stream[marker + 3]
    _imdecode(stream.ctypes.data, size, height, width, scratch.pixels.ctypes.data, height, width, 0, 0, 1, 1, 0, 0)


@numba.njit
def _rgb(beton, index, num_rows, scratch):
    """At least the top num_rows rows of an image, decoded if it is a JPEG: uint8, flat, read-only."""
    if beton.modes[index] == JPEG:
        _decode_jpeg(beton, index, num_rows, scratch)
        return scratch.pixels
    return beton.bytes[beton.offsets[index] :][: beton.sizes[index]]


@kernel
def decode_whole(beton, indices, scratch):
    """Decode JPEGs `indices` (int64 [B]) and drop the pixels: the limit of a loader that decodes whole images."""
    for index in indices:
        _decode_jpeg(beton, index, beton.heights[index], scratch)


@kernel
def decode_shifted(beton, indices, key, shift, images, scratch):
    """Fill images (uint8 [B, R, R, 3]) with samples `indices` (int64 [B]), flipped and shifted as `shift` says.

    Uncovered pixels are black, as in torchvision's RandomCrop(R, padding=translate). key: of the epoch.
    """
    side = images.shape[1]
    for b, index in enumerate(indices):
        source = _rgb(beton, index, side, scratch)[: side * side * 3].reshape(side, side, 3)
        sample_key = draw(key, np.uint64(index))
        step = -1 if shift.flip and uniform_int(sample_key, 0, 0, 1) == 1 else 1
        down = uniform_int(sample_key, 1, -shift.translate, shift.translate)
        right = uniform_int(sample_key, 2, -shift.translate, shift.translate)
        if down or right:
            images[b] = 0
        images[b, max(down, 0) : side + min(down, 0), max(right, 0) : side + min(right, 0)] = source[:, ::step][
            max(-down, 0) : side - max(down, 0), max(-right, 0) : side - max(right, 0)
        ]


@numba.njit
def _random_box(key, height, width, crop):
    """Top, left, height, width of a crop in pixels, int64, drawn as in torchvision's RandomResizedCrop.get_params.

    height, width: of the image. key: of the sample in this epoch; attempt i takes the draws 4i + 1 to 4i + 4.
    """
    for attempt in range(10):
        area = height * width * uniform(key, 4 * attempt + 1, crop.min_scale, crop.max_scale)
        ratio = math.exp(uniform(key, 4 * attempt + 2, math.log(crop.min_ratio), math.log(crop.max_ratio)))
        w, h = np.int64(np.rint(math.sqrt(area * ratio))), np.int64(np.rint(math.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            top = uniform_int(key, 4 * attempt + 3, 0, height - h)
            return top, uniform_int(key, 4 * attempt + 4, 0, width - w), h, w
    w, h = width, height
    if width / height < crop.min_ratio:
        h = np.int64(np.rint(w / crop.min_ratio))
    elif width / height > crop.max_ratio:
        w = np.int64(np.rint(h * crop.max_ratio))
    return (height - h) // 2, (width - w) // 2, h, w


@numba.njit
def _center_span(side, short_side, resolution, ratio):
    """Start and length, in source pixels (float64), of what Resize and CenterCrop keep along one side."""
    resized_short = np.rint(resolution / ratio)
    resized = math.floor(resized_short * side / short_side)
    return np.rint((resized - resolution) / 2) * side / resized, resolution * side / resized


@numba.njit
def _taps(start, length, size, low, high):
    """Weights of an antialiased bilinear resize of source [start, start + length) to `size` pixels, along one side.

    The triangle filter of Pillow and torchvision. low, high: the range of usable source pixels. Returns the first
    source pixel of each output (int64 [size]), the weights (float32 [size, T], zeros at the end), and `most` <= T, the
    largest number of source pixels of an output.
    """
    scale = length / size
    reach = max(scale, 1.0)
    first = np.empty(size, np.int64)
    weights = np.zeros((size, np.int64(math.ceil(reach)) * 2 + 1), np.float32)
    most = 0
    for i in range(size):
        center = start + (i + 0.5) * scale
        begin = max(np.int64(center - reach + 0.5), low)
        count = min(np.int64(center + reach + 0.5), high) - begin
        total = 0.0
        for k in range(count):
            total += max(0.0, 1.0 - abs(begin + k + 0.5 - center) / reach)
        for k in range(count):
            weights[i, k] = max(0.0, 1.0 - abs(begin + k + 0.5 - center) / reach) / total
        first[i] = begin
        most = max(most, count)
    return first, weights, most


@numba.njit
def _resize(pixels, width, rows, columns, flipped, image):
    """Sum weighted source rows, then columns, into image (uint8 [R, R, 3]). rows, columns: of _taps.

    pixels: uint8, flat, rows of `width` RGB pixels. The indices are unsigned, which spares numba's check for negative
    ones: twice as fast.
    """
    size = image.shape[0]
    row_first, row_weights, row_most = rows
    column_first, column_weights, column_most = columns
    left = column_first[0]
    num_values = min(column_first[size - 1] + column_most, width) * 3 - left * 3
    row = np.zeros(num_values + column_most * 3, np.float32)
    offsets = ((column_first - left) * 3).astype(np.uint64)
    weights = column_weights.reshape(-1)
    weights_step = np.uint64(column_weights.shape[1])
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    for y in range(size):
        for k in range(row_most):
            weight = row_weights[y, k]
            values = pixels[((row_first[y] + k) * width + left) * 3 :][:num_values]
            if k == 0:
                for x in range(num_values):
                    row[x] = weight * values[x]
            elif weight:
                for x in range(num_values):
                    row[x] += weight * values[x]
        line = image[y].reshape(-1)
        out = np.uint64((size - 1) * 3 if flipped else 0)
        out_step = np.uint64(-3 if flipped else 3)
        w = np.uint64(0)
        for x in range(size):
            offset = offsets[x]
            red = green = blue = np.float32(0.5)  # rounds to the nearest level when cut to an integer
            for k in range(np.uint64(column_most)):
                weight = weights[w + k]
                red += weight * row[offset]
                green += weight * row[offset + one]
                blue += weight * row[offset + two]
                offset += three
            w += weights_step
            line[out] = np.int32(red)
            line[out + one] = np.int32(green)
            line[out + two] = np.int32(blue)
            out += out_step


@numba.njit
def _resize_crop(beton, index, box, inside, flipped, image, scratch):
    """Resize a box (top, left, height, width: float64, pixels) of sample `index` to image (uint8 [R, R, 3]).

    inside: use no pixel outside the box, as a crop before a resize does; else neighbours blend in, as after one.
    """
    top, left, height, width = box
    num_rows, num_columns = beton.heights[index], beton.widths[index]
    size = image.shape[0]
    low, high = (np.int64(top), np.int64(top + height)) if inside else (0, num_rows)
    rows = _taps(top, height, size, low, high)
    low, high = (np.int64(left), np.int64(left + width)) if inside else (0, num_columns)
    columns = _taps(left, width, size, low, high)
    pixels = _rgb(beton, index, rows[0][size - 1] + rows[2], scratch)
    _resize(pixels, num_columns, rows, columns, flipped, image)


@kernel
def decode_random_crops(beton, indices, key, crop, images, scratch):
    """Fill images (uint8 [B, R, R, 3]) with a random crop of samples `indices` (int64 [B]), half of them flipped."""
    for b, index in enumerate(indices):
        sample_key = draw(key, np.uint64(index))
        top, left, height, width = _random_box(sample_key, beton.heights[index], beton.widths[index], crop)
        flipped = crop.flip and uniform_int(sample_key, 0, 0, 1) == 1
        box = np.float64(top), np.float64(left), np.float64(height), np.float64(width)
        _resize_crop(beton, index, box, True, flipped, images[b], scratch)


@kernel
def decode_center_crops(beton, indices, key, crop, images, scratch):
    """Fill images (uint8 [B, R, R, 3]) with the center of samples `indices` (int64 [B]). key: unused."""
    for b, index in enumerate(indices):
        sides = beton.heights[index], beton.widths[index]
        top, height = _center_span(sides[0], min(sides), images.shape[1], crop.ratio)
        left, width = _center_span(sides[1], min(sides), images.shape[1], crop.ratio)
        _resize_crop(beton, index, (top, left, height, width), False, False, images[b], scratch)


_KERNELS = {Shift: decode_shifted, RandomResizedCrop: decode_random_crops, CenterCrop: decode_center_crops}


def fill(
    beton: BetonArrays, indices: np.ndarray, key: np.uint64, geometry: Geometry, images: np.ndarray, scratch: Scratch
) -> None:
    """Fill images (uint8 [B, R, R, 3]) with samples `indices` (int64 [B]) as `geometry` says. key: of the epoch."""
    _KERNELS[type(geometry)](beton, indices, key, geometry, images, scratch)
