"""The idx files of MNIST and Fashion-MNIST (http://yann.lecun.com/exdb/mnist): big-endian sizes, then bytes."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gowide_dist.errors import DataError


def read_idx(path: Path, num_dims: int) -> NDArray[np.uint8]:
    """Read an idx file of bytes, `path` itself or `path`.gz.

    Raises DataError if neither exists, if it is not an idx file of num_dims dimensions, or if it is truncated.
    """
    path = path if path.exists() else path.with_name(path.name + ".gz")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise DataError(f"{path.with_suffix('')}: not found, gzipped (.gz) or not") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); get the file again") from None

    start = 4 + 4 * num_dims
    if len(content) < start:
        raise DataError(f"{path}: {len(content)} bytes, too short for an idx file; get the file again")
    if content[:4] != bytes([0, 0, 8, num_dims]):  # 8: unsigned bytes
        raise DataError(f"{path}: not an idx file of bytes with {num_dims} dimensions (magic {content[:4].hex()})")
    shape = np.frombuffer(content, ">u4", num_dims, 4).tolist()
    values = np.frombuffer(content, np.uint8, offset=start)
    if values.size != math.prod(shape) or not values.size:
        raise DataError(f"{path}: {values.size:,} values instead of {math.prod(shape):,}; get the file again")
    return values.reshape(shape)
