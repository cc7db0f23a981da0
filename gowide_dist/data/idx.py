"""The idx files of MNIST and Fashion-MNIST (http://yann.lecun.com/exdb/mnist): big-endian sizes, then bytes."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gowide_dist.errors import DataError


def read_idx(path: Path, num_dims: int) -> NDArray[np.uint8]:
    """Read an idx file of bytes, `path` itself or `path`.gz.

    Raises DataError if neither exists, if it is not an idx file of num_dims dimensions, or if it is truncated.
    """
    gzipped = path.with_name(path.name + ".gz")
    try:
        if path.exists():
            content = path.read_bytes()
        else:
            path = gzipped
            content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path.with_suffix('')}: not found, gzipped (.gz) or not") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); get the file again") from None

    header = struct.Struct(f">HBB{num_dims}I")
    if len(content) < header.size:
        raise DataError(f"{path}: {len(content)} bytes, too short for an idx file; get the file again")
    zeros, element_type, dims, *shape = header.unpack_from(content)
    if (zeros, element_type, dims) != (0, 0x08, num_dims):  # 0x08: unsigned bytes
        raise DataError(f"{path}: not an idx file of bytes with {num_dims} dimensions (magic {content[:4].hex()})")
    values = np.frombuffer(content, np.uint8, offset=header.size)
    if values.size != math.prod(shape) or not values.size:
        raise DataError(f"{path}: {values.size:,} values instead of {math.prod(shape):,}; get the file again")
    return values.reshape(shape)
