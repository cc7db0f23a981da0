"""Images out of an FFCV file into a batch, in one compiled pass.

Every random choice is a draw keyed by (epoch key, sample index): the same whatever the batch, process or thread.
"""

import numba
import numpy as np

from gowide_dist.data import order

_draw = numba.njit(order.draw)


@numba.njit
def _uniform_int(key, position, low, high):
    """A whole number from low to high, both included. The bias of the modulo is below (high - low) / 2**64."""
    return low + np.int64(_draw(key, np.uint64(position)) % np.uint64(high - low + 1))


@numba.njit(nogil=True, error_model="numpy", cache=True)
def decode_translated(file, offsets, indices, key, flip, translate, images):
    """Copy raw square images, flipped left to right half of the time and shifted by up to `translate` pixels each way.

    What the shift uncovers is black, as with torchvision's RandomCrop(padding=translate). file: uint8 bytes; offsets:
    int64 [N]; indices: int64 [B]; key: uint64, of the epoch; images: uint8 [B, H, W, 3], filled.
    """
    height, width = images.shape[1], images.shape[2]
    for b in range(len(indices)):
        source = offsets[indices[b]]
        sample_key = _draw(key, np.uint64(indices[b]))
        flipped = flip and _uniform_int(sample_key, 0, 0, 1) == 1
        down = _uniform_int(sample_key, 1, -translate, translate)
        right = _uniform_int(sample_key, 2, -translate, translate)
        first = width - 1 + right if flipped else -right  # column of the source that lands at x = 0
        step = -1 if flipped else 1
        left_px, right_px = max(right, 0), width + min(right, 0)
        for y in range(height):
            row = source + (y - down) * width * 3
            filled = 0 <= y - down < height
            for x in range(width):
                if filled and left_px <= x < right_px:
                    pixel = row + (first + step * x) * 3
                    for channel in range(3):
                        images[b, y, x, channel] = file[pixel + channel]
                else:
                    for channel in range(3):
                        images[b, y, x, channel] = 0
