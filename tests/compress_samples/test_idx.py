"""IDX files are read as their format's page describes them, byte by byte."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from compress.utils.errors import SampleError
from compress_samples.idx import read_idx

# Two images of 1 x 3, as http://yann.lecun.com/exdb/mnist lays them out.
IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255])


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_values_in_their_shape(tmp_path: Path, pack: object) -> None:
    path = tmp_path / "images"
    path.write_bytes(pack(IMAGES))  # type: ignore[operator]
    assert read_idx(path, 3).tolist() == [[[1, 2, 3]], [[4, 5, 255]]]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (IMAGES[:-1], "has 5 bytes of values"),
        (IMAGES + b"x", "has 7 bytes"),
        (b"\x00\x00\x0d" + IMAGES[3:], "begins with 00 00 0d 03"),
        (IMAGES[:6], "bytes of values"),
        (gzip.compress(IMAGES, mtime=0)[:-9], "is damaged"),
    ],
)
def test_what_is_no_whole_idx_file_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(SampleError, match=said):
        read_idx(path, 3)
