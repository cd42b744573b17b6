"""Reader of IDX files, the format of MNIST-like data sets."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from compress.utils.errors import SampleError

_UNSIGNED_BYTES = 8


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Return the unsigned bytes of an IDX file, gzipped or not, with this number of axes. Raises `SampleError`."""
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise SampleError(f"{path.name} is damaged: {error}") from error
    if content[:4] != bytes([0, 0, _UNSIGNED_BYTES, axes]):
        raise SampleError(
            f"{path.name} begins with {content[:4].hex(' ')}.",
            expected=f"00 00 08 {axes:02x}, an IDX file of unsigned bytes with {axes} axes",
        )
    begin = 4 + 4 * axes
    shape = np.frombuffer(content[4:begin].ljust(4 * axes, b"\xff"), ">u4").tolist()
    if len(content) - begin != math.prod(shape):
        raise SampleError(
            f"{path.name} has {len(content) - begin:,} bytes of values.", expected=f"{' x '.join(map(str, shape))}"
        )
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)
