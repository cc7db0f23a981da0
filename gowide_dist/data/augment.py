"""Augmentation of decoded images, in place: TrivialAugment, RandAugment, colour jitter, random erasing.

Every operation gives the pixels of torchvision.transforms.v2 on uint8 tensors, to within one level: with the nearest
pixel where an image is sheared, shifted or turned, and black outside of it. The draws are keyed by (epoch key, sample)
as those of `decode`, and independent of them. numba compiles a kernel when it is first used (policies 7 s, the others
1 s), and caches it on disk.

Shapes: images uint8 [B, R, R, 3], `indices` their samples in the file, int64 [B]. `image` is one of the images;
`original` (uint8 [R, R, 3]) and `table` (uint8 [3, 256], the new level of each channel and level) are working memory.
"""

import math
from typing import NamedTuple, TypeAlias

import numba
import numpy as np

from gowide_dist.data.decode import draw, uniform, uniform_int
from gowide_dist.data.kernels import kernel


class Policy(NamedTuple):
    """num_ops random operations. wide: of TrivialAugment's ranges, else of RandAugment's.

    magnitude: of MAGNITUDES, from 0 to 30, or DRAWN for each operation. Müller and Hutter 2021
    (arXiv 2103.10158): one operation of drawn magnitude; Cubuk et al. 2019 (arXiv 1909.13719).
    """

    wide: bool
    num_ops: int
    magnitude: int


class ColorJitter(NamedTuple):
    """torchvision's ColorJitter: factors drawn from 1 - x to 1 + x (hue: -x to x), applied in a drawn order."""

    brightness: float
    contrast: float
    saturation: float
    hue: float


class RandomErasing(NamedTuple):
    """torchvision's RandomErasing (Zhong et al. 2017, arXiv 1708.04896), of a box of a drawn area and ratio.

    scale: area of the box over the image's; ratio: height over width. fill: level of each channel. torchvision erases
    after normalisation, with 0, which is the mean of the data set before it.
    """

    probability: float
    min_scale: float
    max_scale: float
    min_ratio: float
    max_ratio: float
    fill: tuple[int, int, int]


Augmentation: TypeAlias = Policy | ColorJitter | RandomErasing

DRAWN = -1
MAGNITUDES = 31
OPERATIONS = (  # in torchvision's order; the first ten but Identity are signed
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
(
    _IDENTITY, _SHEAR_X, _SHEAR_Y, _TRANSLATE_X, _TRANSLATE_Y, _ROTATE, _BRIGHTNESS, _COLOR, _CONTRAST,
    _SHARPNESS, _POSTERIZE, _SOLARIZE, _AUTO_CONTRAST, _EQUALIZE,
) = range(len(OPERATIONS))  # fmt: skip
_POLICY_DRAW, _JITTER_DRAW, _ERASE_DRAW = range(64, 67)  # keys of their own; decode takes the draws 0 to 40
# torchvision computes in float32, and so does this: a number of Python's would make float64 of it.
_ZERO, _HALF, _ONE, _SIX, _WHITE = (np.float32(value) for value in (0, 0.5, 1, 6, 255))
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # of grey, as torchvision has it


@numba.njit
def _level(value):
    """The level, uint8, of a float32: cut to an integer as in torchvision."""
    return np.uint8(min(max(value, _ZERO), _WHITE))


@numba.njit
def _grey(red, green, blue):
    return np.floor(np.float32(red) * _RED + np.float32(green) * _GREEN + np.float32(blue) * _BLUE)


@numba.njit
def _map_levels(image, table):
    for row in range(image.shape[0]):
        line = image[row].reshape(-1)
        for x in range(np.uint64(image.shape[1])):
            for channel in range(np.uint64(3)):
                line[np.uint64(3) * x + channel] = table[channel, line[np.uint64(3) * x + channel]]


@numba.njit
def _transform(image, original, matrix):
    """Pixel (x, y), counted from the center, becomes the pixel at (a x + b y + c, d x + e y + f), or black.

    matrix: a, b, c, d, e, f, float64. Rounded step by step as by torchvision's affine_grid and grid_sample, so that
    points between two pixels fall to the same one.
    """
    size = image.shape[0]
    original[:] = image
    pixels = original.reshape(-1)
    half = np.float32(0.5 * size)
    a, b, c, d, e, f = [np.float32(value) / half for value in matrix]
    sources, size_32 = np.empty(size, np.int32), np.int32(size)
    middle, one, two, three = np.float32(0.5 * (size - 1)), np.uint64(1), np.uint64(2), np.uint64(3)
    for row in range(size):
        line = image[row].reshape(-1)
        y = np.float32(row) - middle
        for column in range(size):  # alone in a loop, so that it is compiled to vectors
            x = np.float32(column) - middle
            from_x = np.int32(np.rint((a * x + b * y + c + _ONE) * half - _HALF))
            from_y = np.int32(np.rint((d * x + e * y + f + _ONE) * half - _HALF))
            is_inside = (from_x >= 0) & (from_x < size_32) & (from_y >= 0) & (from_y < size_32)
            sources[column] = (from_y * size_32 + from_x) * np.int32(3) if is_inside else np.int32(-1)
        target = np.uint64(0)
        for source_32 in sources:
            source = np.uint64(max(source_32, 0))
            is_inside = source_32 >= 0
            line[target] = pixels[source] if is_inside else 0
            line[target + one] = pixels[source + one] if is_inside else 0
            line[target + two] = pixels[source + two] if is_inside else 0
            target += three


@numba.njit
def _brighten(image, factor, table):
    for level in range(256):
        table[:, level] = _level(np.float32(level) * np.float32(factor))
    _map_levels(image, table)


@numba.njit
def _change_contrast(image, factor, table):
    total = 0.0
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            total += _grey(image[row, column, 0], image[row, column, 1], image[row, column, 2])
    mean = np.float32(total / (image.shape[0] * image.shape[1])) * np.float32(1 - factor)
    for level in range(256):
        table[:, level] = _level(np.float32(level) * np.float32(factor) + mean)
    _map_levels(image, table)


@numba.njit
def _saturate(image, factor):
    of_color, of_grey = np.float32(factor), np.float32(1 - factor)
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            pixel = image[row, column]
            grey = _grey(pixel[0], pixel[1], pixel[2]) * of_grey
            for channel in range(3):
                pixel[channel] = _level(np.float32(pixel[channel]) * of_color + grey)


@numba.njit
def _turn_hue(image, turn):
    """turn: part of a whole turn. By way of HSV, on a scale of 0 to 1."""
    scale, most = np.float32(1 / 255), np.float32(255.999)
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            pixel = image[row, column]
            red, green, blue = np.float32(pixel[0]) * scale, np.float32(pixel[1]) * scale, np.float32(pixel[2]) * scale
            value = max(red, green, blue)
            chroma = value - min(red, green, blue)
            if chroma == _ZERO:
                pixel[:] = np.uint8(value * most)
                continue
            if value == red:
                hue = (green - blue) / chroma
            elif value == green:
                hue = np.float32(2) + (blue - red) / chroma
            else:
                hue = np.float32(4) + (red - green) / chroma
            hue += np.float32(6 * turn)
            for channel in range(3):
                # Distance on the wheel from where the channel begins to rise: it rises to 1, and falls from 3 to 4.
                # Channels are two apart. From -4 to 12, as the hue is turned by at most half a wheel.
                distance = hue + np.float32(2 + 4 * channel % 6)
                distance -= _SIX if distance >= _SIX else _ZERO
                distance += _SIX if distance < _ZERO else _ZERO
                distance -= _SIX if distance >= _SIX else _ZERO
                height = min(max(min(distance, np.float32(4) - distance), _ZERO), _ONE)
                pixel[channel] = np.uint8((value - chroma + chroma * height) * most)


@numba.njit
def _sharpen(image, original, factor):
    """Blend with the image blurred by 3x3 weights of 1/13, 5/13 in the middle; the border stays."""
    original[:] = image
    size, of_blurred = image.shape[0], np.float32(1 - factor)
    for row in range(1, size - 1):
        above, line, below = original[row - 1].reshape(-1), original[row].reshape(-1), original[row + 1].reshape(-1)
        out = image[row].reshape(-1)
        for x in range(np.uint64(3), np.uint64(3 * size - 3)):
            left, right = x - np.uint64(3), x + np.uint64(3)
            total = np.int32(above[left]) + above[x] + above[right] + line[left] + line[right]
            total += np.int32(below[left]) + below[x] + below[right] + 5 * np.int32(line[x])
            blurred = (2 * total + 13) // 26
            out[x] = _level(np.float32(line[x]) + np.float32(blurred - line[x]) * of_blurred)


@numba.njit
def _stretch_contrast(image, table):
    for channel in range(3):
        lowest, highest = image[:, :, channel].min(), image[:, :, channel].max()
        scale = np.float32(highest - lowest) * np.float32(1 / 255) if highest > lowest else _ONE
        base = np.float32(lowest) if highest > lowest else _ZERO
        for level in range(256):
            table[channel, level] = _level((np.float32(level) - base) / scale)
    _map_levels(image, table)


@numba.njit
def _equalize(image, table):
    """Pillow's equalisation: a channel that has one level, or too few pixels, stays."""
    counts = np.zeros((3, 256), np.int64)
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            for channel in range(3):
                counts[channel, image[row, column, channel]] += 1
    for channel in range(3):
        step = (image.shape[0] * image.shape[1] - counts[channel, image[:, :, channel].max()]) // 255
        below = step // 2
        for level in range(256):
            table[channel, level] = min(below // step, 255) if step else level
            below += counts[channel, level]
    _map_levels(image, table)


@numba.njit
def _apply(image, operation, magnitude, original, table):
    """One of OPERATIONS. magnitude: in the terms of torchvision's _AutoAugmentBase; 0 where there is none."""
    half = 0.5 * image.shape[0]
    if operation == _SHEAR_X:
        _transform(image, original, (1.0, magnitude, magnitude * half, 0.0, 1.0, 0.0))
    elif operation == _SHEAR_Y:
        _transform(image, original, (1.0, 0.0, 0.0, magnitude, 1.0, magnitude * half))
    elif operation == _TRANSLATE_X:
        _transform(image, original, (1.0, 0.0, -float(int(magnitude)), 0.0, 1.0, 0.0))
    elif operation == _TRANSLATE_Y:
        _transform(image, original, (1.0, 0.0, 0.0, 0.0, 1.0, -float(int(magnitude))))
    elif operation == _ROTATE:
        sin, cos = math.sin(math.radians(magnitude)), math.cos(math.radians(magnitude))
        _transform(image, original, (cos, -sin, 0.0, sin, cos, 0.0))
    elif operation == _BRIGHTNESS:
        _brighten(image, 1 + magnitude, table)
    elif operation == _COLOR:
        _saturate(image, 1 + magnitude)
    elif operation == _CONTRAST:
        _change_contrast(image, 1 + magnitude, table)
    elif operation == _SHARPNESS:
        _sharpen(image, original, 1 + magnitude)
    elif operation == _POSTERIZE:
        for level in range(256):
            table[:, level] = level >> (8 - int(magnitude)) << (8 - int(magnitude))
        _map_levels(image, table)
    elif operation == _SOLARIZE:
        for level in range(256):
            table[:, level] = 255 - level if level >= np.float32(255 * magnitude) else level
        _map_levels(image, table)
    elif operation == _AUTO_CONTRAST:
        _stretch_contrast(image, table)
    elif operation == _EQUALIZE:
        _equalize(image, table)


@numba.njit
def _linspace(first, last, index):
    """Value `index` of torch.linspace(first, last, MAGNITUDES) in float32, as float64. Rounded as there, which decides
    on whole pixels of a translation and on levels of a solarisation: once after the step, once after multiply and add.
    """
    step = np.float64((np.float32(last) - np.float32(first)) / np.float32(MAGNITUDES - 1))
    if index < MAGNITUDES // 2:
        return np.float64(np.float32(np.float32(first) + step * index))
    return np.float64(np.float32(np.float32(last) - step * (MAGNITUDES - 1 - index)))


@numba.njit
def _choose(key, attempt, policy, size):
    """A drawn operation and its magnitude, for an image of side `size`, as torchvision's two policies draw them."""
    if policy.wide:
        shear, translate, rotate, change, bits = 0.99, 32.0, 135.0, 0.99, 6.0
    else:
        shear, translate, rotate, change, bits = 0.3, 150.0 / 331.0 * size, 30.0, 0.9, 4.0
    operation = uniform_int(key, 3 * attempt, 0, _EQUALIZE)
    index = policy.magnitude if policy.magnitude != DRAWN else uniform_int(key, 3 * attempt + 1, 0, MAGNITUDES - 1)
    if operation == _POSTERIZE:
        return operation, np.rint(8 - index * bits / (MAGNITUDES - 1))
    if operation == _SOLARIZE:
        return operation, _linspace(1.0, 0.0, index)
    if operation >= _AUTO_CONTRAST:
        return operation, 0.0
    greatest = (0.0, shear, shear, translate, translate, rotate, change, change, change, change)[operation]
    sign = 2 * uniform_int(key, 3 * attempt + 2, 0, 1) - 1
    return operation, sign * _linspace(0.0, greatest, index)


@kernel
def _by_policy(images, indices, key, policy):
    original, table = np.empty_like(images[0]), np.empty((3, 256), np.uint8)
    for b, index in enumerate(indices):
        image_key = draw(draw(key, np.uint64(index)), np.uint64(_POLICY_DRAW))
        for i in range(policy.num_ops):
            operation, magnitude = _choose(image_key, i, policy, images.shape[1])
            _apply(images[b], operation, magnitude, original, table)


@kernel
def _jitter(images, indices, key, jitter):
    table, order = np.empty((3, 256), np.uint8), np.empty(4, np.int64)
    for b, index in enumerate(indices):
        image_key = draw(draw(key, np.uint64(index)), np.uint64(_JITTER_DRAW))
        order[:] = 0, 1, 2, 3
        for i in range(3):
            j = uniform_int(image_key, 4 + i, i, 3)
            order[i], order[j] = order[j], order[i]
        for which in order:
            extent = jitter[which]
            if extent == 0:
                continue
            if which == 3:
                _turn_hue(images[b], uniform(image_key, which, -extent, extent))
                continue
            factor = uniform(image_key, which, max(1 - extent, 0.0), 1 + extent)
            if which == 0:
                _brighten(images[b], factor, table)
            elif which == 1:
                _change_contrast(images[b], factor, table)
            else:
                _saturate(images[b], factor)


@kernel
def _erase(images, indices, key, erasing):
    size = images.shape[1]
    for b, index in enumerate(indices):
        image_key = draw(draw(key, np.uint64(index)), np.uint64(_ERASE_DRAW))
        attempts = 10 if uniform(image_key, 0, 0.0, 1.0) < erasing.probability else 0
        for i in range(attempts):
            area = size * size * uniform(image_key, 4 * i + 1, erasing.min_scale, erasing.max_scale)
            ratio = math.exp(uniform(image_key, 4 * i + 2, math.log(erasing.min_ratio), math.log(erasing.max_ratio)))
            height, width = np.int64(np.rint(math.sqrt(area * ratio))), np.int64(np.rint(math.sqrt(area / ratio)))
            if height < size and width < size:
                top = uniform_int(image_key, 4 * i + 3, 0, size - height)
                left = uniform_int(image_key, 4 * i + 4, 0, size - width)
                for channel in range(3):
                    images[b, top : top + height, left : left + width, channel] = erasing.fill[channel]
                break


_KERNELS = {Policy: _by_policy, ColorJitter: _jitter, RandomErasing: _erase}


def augment(images: np.ndarray, indices: np.ndarray, key: np.uint64, augmentation: Augmentation) -> None:
    """Augment images (uint8 [B, R, R, 3]), samples `indices` (int64 [B]) of a file, in place. key: of the epoch."""
    _KERNELS[type(augmentation)](images, indices, key, augmentation)
