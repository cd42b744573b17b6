"""Blocks of 32 against llama.cpp's own Python package, and one laid out by hand."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from gguf_samples import write_tensors
from mergeable import ROWS, save_mergeable_llama, train_tokenizer
from quantized import quantize_tiny_llama
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaForCausalLM

from compress.formats.gguf.blocks import block_type, check_blocks, k_type, pack_blocks, pack_k_blocks, row_bytes
from compress.formats.gguf.export import GgufTypes, compare_gguf, write_gguf
from compress.formats.gguf.model import read_gguf
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.numerics.integer_grid import QuantizedWeight
from compress.sources.conversions import convert_gguf
from compress.utils.errors import ModelError


def weight(bits: int, group_size: int, symmetric: bool, columns: int = 192, rows: int = 6) -> QuantizedWeight:
    """Random integers of the whole range, scales that float16 has."""
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
def test_symmetric_weights_come_back_to_the_bit(bits: int, kind: str, group_size: int) -> None:
    quantized = weight(bits, group_size, symmetric=True)
    assert block_type(bits, True, "layer") == kind
    packed = pack_blocks(quantized, kind)
    assert packed.shape == (6, row_bytes(kind, 192)) and packed.dtype == np.uint8
    assert np.array_equal(unpack(packed, kind), quantized.dequantize().numpy())


@pytest.mark.parametrize(("bits", "kind"), [(2, "Q4_1"), (3, "Q4_1"), (4, "Q4_1"), (5, "Q5_1")])
def test_minima_of_weights_with_zero_points_are_rounded_to_float16_and_nothing_else(bits: int, kind: str) -> None:
    quantized = weight(bits, 64, symmetric=False)
    assert block_type(bits, False, "layer") == kind
    restored = unpack(pack_blocks(quantized, kind), kind)
    groups = np.arange(192) // 64
    scales, zeros = quantized.scales.numpy()[:, groups], quantized.zero_points.numpy()[:, groups]
    minima = (-zeros.astype(np.float32) * scales).astype(np.float16).astype(np.float32)
    assert np.array_equal(restored, quantized.integers.numpy().astype(np.float32) * scales + minima)
    assert np.abs(restored - quantized.dequantize().numpy()).max() > 0


def test_what_gguf_cannot_hold_is_named() -> None:
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


BOUNDS = {"Q3_K": 0.02, "Q2_K": 0.08}


def k_weight(bits: int, symmetric: bool, group_size: int = 64) -> QuantizedWeight:
    """Random integers of the whole range; scales of both signs, the largest of a row three times the least."""
    rows, columns = 6, 512
    generator = torch.Generator().manual_seed(10 * bits + symmetric)
    shape = rows, columns // group_size
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    sizes = 1 + 2 * torch.rand(shape, generator=generator)
    zeros = torch.full(shape, 1 << (bits - 1))
    if not symmetric:
        zeros = torch.randint(0, 1 << bits, shape, generator=generator)
    integers = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    scales = (0.01 * sizes * signs).half().float()
    return QuantizedWeight(integers, scales, zeros.to(torch.uint8), bits, group_size)


def unpack_k(quantized: QuantizedWeight, kind: str) -> np.ndarray:
    packed = pack_k_blocks(quantized, kind)
    assert packed.dtype == np.uint8 and packed.shape == (6, row_bytes(kind, 512))
    return unpack(packed, kind)


@pytest.mark.parametrize("group_size", [32, 64, 512])
@pytest.mark.parametrize(("bits", "symmetric", "kind"), [(3, True, "Q3_K"), (2, True, "Q2_K"), (2, False, "Q2_K")])
def test_integers_stay_and_scales_are_rounded(bits: int, symmetric: bool, kind: str, group_size: int) -> None:
    quantized = k_weight(bits, symmetric, group_size)
    assert k_type(bits, symmetric, 512) == kind
    unpacked, expected = unpack_k(quantized, kind), quantized.dequantize().numpy()
    assert np.linalg.norm(unpacked - expected) < BOUNDS[kind] * np.linalg.norm(expected)
    # Within the sixteen that share a scale, what is given back is a line over the integers: no integer moved.
    for part, integers in zip(unpacked.reshape(-1, 16), quantized.integers.numpy().reshape(-1, 16), strict=True):
        slope, offset = np.polyfit(integers.astype(float), part, 1)
        assert np.abs(slope * integers + offset - part).max() < 1e-6
        assert kind == "Q2_K" or abs(offset + slope * 4) < 1e-6


def test_no_finer_step_is_found_by_trying_a_thousand() -> None:
    quantized = k_weight(3, True)
    unpacked, expected = unpack_k(quantized, "Q3_K")[:, :256], quantized.dequantize().numpy()[:, :256]
    centred = quantized.integers.numpy()[:, :256].astype(float) - 4
    scales = quantized.scales.numpy()[:, :4].repeat(64, 1)
    for row in range(6):
        largest = np.abs(scales[row]).max()
        errors = []
        for step in np.concatenate([np.linspace(largest / 40, largest / 15, 500) * sign for sign in (1, -1)]):
            steps = np.clip(np.rint(scales[row] / step), -32, 31) * step
            errors.append(np.linalg.norm(steps * centred[row] - expected[row]))
        assert np.linalg.norm(unpacked[row] - expected[row]) < 1.05 * min(errors)


def test_what_has_no_such_block_has_none() -> None:
    assert [k_type(3, True, 576), k_type(3, False, 512), k_type(4, True, 512)] == [None] * 3
    zeros = k_weight(3, True)
    zeros.scales[:] = 0
    assert not unpack_k(zeros, "Q3_K").any()


@pytest.mark.parametrize(("bits", "kind", "number"), [(3, "Q3_K", 11), (2, "Q2_K", 10)])
def test_llama_cpp_computes_what_the_blocks_stand_for(tmp_path: Path, bits: int, kind: str, number: int) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    source = save_mergeable_llama(tmp_path / "source", num_key_value_heads=2, **sizes)
    quantized = quantize_tiny_llama(source, tmp_path / "quantized", bits, 64)
    train_tokenizer().save_pretrained(quantized.folder)
    write_gguf(quantized, tmp_path / "tiny.gguf", GgufTypes("f32", k_quants=True))
    reader = GGUFReader(tmp_path / "tiny.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.1.attn_q.weight"] == kind
    assert kinds["token_embd.weight"] == "Q4_0" and reader.fields["general.file_type"].parts[-1][0] == number
    differences = compare_gguf(tmp_path / "tiny.gguf", quantized, GgufTypes("f32", k_quants=True))
    assert all(difference.largest <= difference.allowed for difference in differences)
    assert any(difference.rounded for difference in differences)
    module = LlamaForCausalLM(AutoConfig.from_pretrained(source.folder)).float().eval()
    weights = load_file(convert_gguf(tmp_path / "tiny.gguf", tmp_path / "cache") / "model.safetensors")
    module.load_state_dict(weights, strict=False)
    ids = np.random.default_rng(0).integers(3, ROWS, (1, 40))
    with torch.no_grad():
        expected_logits = module(input_ids=torch.from_numpy(ids)).logits.numpy()
    session = get_runtime("llama-cpp").open(tmp_path / "tiny.gguf", TARGETS["llama-cpp"], 1)
    logits = session.predict({"input_ids": ids})["logits"]
    # llama.cpp rounds what it multiplies with them to 8 bits.
    assert np.corrcoef(logits.ravel(), expected_logits.ravel())[0, 1] > 0.995


def test_header_agrees_with_the_format_and_the_reference_reader(tmp_path: Path) -> None:
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


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.gguf")
    header = read_gguf(tmp_path / "x.gguf")
    needed = header.tensors[-1].start + header.tensors[-1].bytes
    whole = (tmp_path / "x.gguf").read_bytes()
    for length in (4, 7, 20, 60, header.tensors[0].start - 40, header.tensors[0].start, needed - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=f"truncated: it has {length} bytes"):
            read_gguf(tmp_path / "cut.gguf")


def test_other_files_are_refused(tmp_path: Path) -> None:
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
