"""The record of a stored tensor: its values out of bytes and out of its file, and what cannot be read."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from compress.models.stored_tensor import infer_role, numpy_dtype, stored
from compress.utils.errors import ModelError


def test_values_come_out_of_the_file_and_out_of_its_content(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    content = b"head" + values.tobytes() + b"tail"
    (tmp_path / "file").write_bytes(content)
    tensor = stored("a.weight", "float16", (2, 3), tmp_path / "file", (4, values.nbytes))
    for actual in (tensor.values(), tensor.values(content)):
        assert actual.dtype == np.float16 and not actual.flags.writeable
        np.testing.assert_array_equal(actual, values)
    assert tensor.data().tobytes() == values.tobytes() and tensor.module == "a"
    assert (tensor.parameters, tensor.elements, tensor.bytes, tensor.origin) == (6, 6, 12, "a.weight")


def test_an_empty_tensor_needs_no_byte_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert stored("e", "float32", (0, 4), tmp_path / "file", (0, 0)).values().shape == (0, 4)


def test_only_weights_have_parameters() -> None:
    tensor = stored("a.scale", "float32", (2, 3), Path(), (0, 24), infer_role("float32", (2, 3), scales=True))
    assert (tensor.role, tensor.parameters) == ("quantization", 0)
    assert infer_role("float32", ()) == infer_role("int64", (3,)) == "constant"
    assert infer_role("int8", (3,)) == infer_role("bfloat16", (3,)) == "weight"


def test_what_numpy_has_no_type_for_is_not_read() -> None:
    assert numpy_dtype("bfloat16") == np.dtype(ml_dtypes.bfloat16)
    for name in ("float4_e2m1fn", "int4", "nf4", "string"):
        tensor = stored("a", name, (2,), Path(), (0, 2))
        assert not tensor.readable
        with pytest.raises(ModelError, match=f"'a' has the type {name}, which cannot be read"):
            tensor.values(b"12")
    halves = stored("a", "int4", (4,), Path(), (0, 2), packed=True, decode=lambda data: data.repeat(2))
    assert not halves.readable and halves.values(b"12").shape == (4,)
