import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from compress.models.safetensors_file import read_header
from compress.utils.errors import ModelError


def write(path: Path, header: object, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_header_gives_places_and_values_of_hand_made_bytes(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry("BF16", [2], 8, 12),
        "a": entry("F32", [1, 2], 0, 8),
    }
    bfloat = struct.pack("<HH", 0x3F80, 0xC000)  # 1.0 and -2.0 are the upper halves of their fp32 patterns
    path = write(tmp_path / "x.safetensors", header, struct.pack("<ff", 0.5, 3.0) + bfloat)

    first, second = read_header(path)

    text_bytes = len(json.dumps(header))
    assert (first.name, first.dtype, first.shape, first.start, first.bytes) == (
        "a",
        "float32",
        (1, 2),
        8 + text_bytes,
        8,
    )
    assert (second.name, second.dtype, second.elements, second.start, second.bytes) == (
        "b",
        "bfloat16",
        2,
        16 + text_bytes,
        4,
    )
    assert first.values().tolist() == [[0.5, 3.0]]
    assert second.values().astype(float).tolist() == [1.0, -2.0]


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8, np.int64, np.bool_, ml_dtypes.float8_e5m2])
def test_values_agree_with_the_reference_writer(tmp_path: Path, dtype: type) -> None:
    values = np.arange(-6, 6).reshape(3, 4).astype(dtype)
    save_file({"w": values}, tmp_path / "x.safetensors")
    (tensor,) = read_header(tmp_path / "x.safetensors")
    read = tensor.values()
    assert read.dtype == values.dtype
    assert read.tobytes() == values.tobytes()


def test_empty_tensor_can_be_read(tmp_path: Path) -> None:
    (tensor,) = read_header(write(tmp_path / "x.safetensors", {"e": entry("F32", [0, 4], 0, 0)}, b""))
    assert tensor.values().shape == (0, 4)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.safetensors", {"a": entry("F32", [2], 0, 8)}, bytes(8)).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=f"of {length} bytes is truncated or broken"):
            read_header(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ([1], b"", "invalid type: sequence"),
        ({"a": entry("F32", [3], 0, 8)}, bytes(8), "invalid shape, data type, or offset"),
        ({"a": entry("X9", [2], 0, 8)}, bytes(8), "unknown variant `X9`"),
        ({"a": {"dtype": "F32"}}, bytes(8), "missing field `shape`"),
        ({"a": entry("F32", [1], 4, 8)}, bytes(8), "invalid offset for tensor `a`"),
        (
            {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)},
            bytes(4),
            "invalid offset for tensor",
        ),
        ({"a": entry("F32", [1], 0, 4)}, bytes(6), "not fully covered"),
        ({"a": entry("F32", [-1], 0, 4)}, bytes(4), "integer `-1`"),
    ],
)
def test_broken_headers_are_refused(tmp_path: Path, header: object, data: bytes, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        read_header(write(tmp_path / "x.safetensors", header, data))


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 4) + b"{no}")
    with pytest.raises(ModelError, match="invalid JSON"):
        read_header(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="header too large"):
        read_header(tmp_path / "x.safetensors")
