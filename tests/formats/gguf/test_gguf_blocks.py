"""Tests of GGUF blocks of 32 weights: packed bytes are compared with llama.cpp's own Python package (gguf)."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from gguf_samples import write_tensors

from compress.formats.gguf.blocks import block_type, check_blocks, pack_blocks, row_bytes
from compress.formats.gguf.model import read_gguf
from compress.numerics.integer_grid import QuantizedWeight
from compress.utils.errors import ModelError


def weight(bits: int, group_size: int, symmetric: bool, columns: int = 192, rows: int = 6) -> QuantizedWeight:
    """Return random integers of the full range [rows, columns] with scales that float16 represents exactly."""
    generator = torch.Generator().manual_seed(100 * bits + group_size)
    groups = -(-columns // group_size)
    zeros = torch.full((rows, groups), 1 << (bits - 1))
    if not symmetric:
        zeros = torch.randint(0, 1 << bits, (rows, groups), generator=generator)
    return QuantizedWeight(integers=torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8),
        scales=(torch.rand(rows, groups, generator=generator) * 0.01 + 1e-4).half().float(),
        zero_points=zeros.to(torch.uint8), bits=bits, group_size=group_size)  # fmt: skip


def unpack(packed: np.ndarray, kind: str) -> np.ndarray:
    return dequantize(packed, GGMLQuantizationType[kind])


@pytest.mark.parametrize("group_size", [32, 64, 128, 192])
@pytest.mark.parametrize(("bits", "kind"), [(3, "Q4_0"), (4, "Q4_0"), (5, "Q5_0"), (6, "Q8_0"), (8, "Q8_0")])
def test_symmetric_weights_round_trip_exactly(bits: int, kind: str, group_size: int) -> None:
    quantized = weight(bits, group_size, symmetric=True)
    assert block_type(bits, True, "layer") == kind
    packed = pack_blocks(quantized, kind)
    assert packed.shape == (6, row_bytes(kind, 192)) and packed.dtype == np.uint8
    assert np.array_equal(unpack(packed, kind), quantized.dequantize().numpy())


@pytest.mark.parametrize(("bits", "kind"), [(2, "Q4_1"), (3, "Q4_1"), (4, "Q4_1"), (5, "Q5_1")])
def test_only_minima_of_asymmetric_weights_are_rounded_to_float16(bits: int, kind: str) -> None:
    quantized = weight(bits, 64, symmetric=False)
    assert block_type(bits, False, "layer") == kind
    restored = unpack(pack_blocks(quantized, kind), kind)
    groups = np.arange(192) // 64
    scales, zeros = quantized.scales.numpy()[:, groups], quantized.zero_points.numpy()[:, groups]
    minima = (-zeros.astype(np.float32) * scales).astype(np.float16).astype(np.float32)
    assert np.array_equal(restored, quantized.integers.numpy().astype(np.float32) * scales + minima)
    assert np.abs(restored - quantized.dequantize().numpy()).max() > 0


def test_weights_that_gguf_cannot_store_are_refused() -> None:
    with pytest.raises(ModelError, match="8 bits with zero points") as caught:
        block_type(8, False, "model.layers.0.mlp.up_proj")
    assert caught.value.where == "model.layers.0.mlp.up_proj"
    with pytest.raises(ModelError, match="48 wide"):
        check_blocks(48, 16, "layer")
    with pytest.raises(ModelError, match="Groups of 16") as caught:
        check_blocks(64, 16, "layer")
    assert "group_size: 32" in str(caught.value)
    with pytest.raises(ValueError, match="no zero points"):
        pack_blocks(weight(4, 32, symmetric=False), "Q4_0")


def test_header_matches_the_specification_and_gguf_reader(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_tensors(path)

    header = read_gguf(path)

    norm, up = header.tensors
    assert (norm.name, norm.dtype, norm.shape, norm.bytes) == ("blk.0.attn_norm.weight", "F32", (64,), 64 * 4)
    assert (up.dtype, up.shape) == ("Q8_0", (3, 64))
    assert up.bytes == 3 * 64 // 32 * 34  # a block of 32 weights: an fp16 scale and 32 int8
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["tokenizer.ggml.tokens"] == 3
    reference = GGUFReader(path).tensors
    assert [tensor.start for tensor in header.tensors] == [tensor.data_offset for tensor in reference]
    assert path.read_bytes()[norm.start : norm.start + norm.bytes] == reference[0].data.tobytes()


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.gguf")
    header = read_gguf(tmp_path / "x.gguf")
    needed = header.tensors[-1].start + header.tensors[-1].bytes
    whole = (tmp_path / "x.gguf").read_bytes()
    for length in (4, 7, 20, 60, header.tensors[0].start - 40, header.tensors[0].start, needed - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=f"truncated: it has {length} bytes"):
            read_gguf(tmp_path / "cut.gguf")


def test_files_that_are_not_gguf_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="letters GGUF"):
        read_gguf(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(16))
    with pytest.raises(ModelError, match="version is 1"):
        read_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 77))
    with pytest.raises(ModelError, match="cannot be read"):
        read_gguf(path)
