"""Pixels on their way into a dataset: encoded as they will lie in the file, and summed for the channel statistics."""

from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from gowide_dist.data.beton import RAW, EncodedImage

Pixels: TypeAlias = NDArray[np.uint8]


def encode_raw(image: Pixels) -> EncodedImage:
    """image: [H, W, 3] RGB."""
    return EncodedImage(RAW, image.shape[0], image.shape[1], image.tobytes())


def channel_moments(image: Pixels) -> NDArray[np.float64]:
    """Mean and mean square of each channel, on a scale of 0 to 1: [2, 3] from [H, W, 3]."""
    mean, std = cv2.meanStdDev(image)
    return np.stack([mean[:, 0] / 255, (mean[:, 0] ** 2 + std[:, 0] ** 2) / 255**2])
