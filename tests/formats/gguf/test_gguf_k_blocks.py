"""Integers of two and three bits in blocks of 256: kept as they are, with scales as near as few bits come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from mergeable import ROWS, save_mergeable_llama, train_tokenizer
from quantized import quantize_tiny_llama
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaForCausalLM

from compress.formats.gguf.blocks import k_type, pack_k_blocks, row_bytes
from compress.formats.gguf.export import Types, compare_gguf, write_gguf
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.numerics.integer_grid import QuantizedWeight
from compress.sources.gguf_conversion import convert_gguf

BOUNDS = {"Q3_K": 0.02, "Q2_K": 0.08}


def weight(bits: int, symmetric: bool, group_size: int = 64, equal: bool = False) -> QuantizedWeight:
    """Random integers of the whole range; scales of both signs, the largest of a row three times the least."""
    rows, columns = 6, 512
    generator = torch.Generator().manual_seed(10 * bits + symmetric)
    shape = rows, columns // group_size
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    sizes = torch.ones(shape) if equal else 1 + 2 * torch.rand(shape, generator=generator)
    zeros = torch.full(shape, 1 << (bits - 1))
    if not symmetric:
        zeros = torch.randint(0, 1 << bits, shape, generator=generator)
    integers = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    scales = (0.01 * sizes * (signs if not equal else 1)).half().float()
    return QuantizedWeight(integers, scales, zeros.to(torch.uint8), bits, group_size)


def given_back(made: QuantizedWeight, kind: str) -> np.ndarray:
    packed = pack_k_blocks(made, kind)
    assert packed.dtype == np.uint8 and packed.shape == (6, row_bytes(kind, 512))
    values: np.ndarray = dequantize(packed, GGMLQuantizationType[kind])
    return values


@pytest.mark.parametrize("group_size", [32, 64, 512])
@pytest.mark.parametrize(("bits", "symmetric", "kind"), [(3, True, "Q3_K"), (2, True, "Q2_K"), (2, False, "Q2_K")])
def test_integers_stay_and_scales_are_rounded(bits: int, symmetric: bool, kind: str, group_size: int) -> None:
    quantized = weight(bits, symmetric, group_size)
    assert k_type(bits, symmetric, 512) == kind
    unpacked, expected = given_back(quantized, kind), quantized.dequantize().numpy()
    assert np.linalg.norm(unpacked - expected) < BOUNDS[kind] * np.linalg.norm(expected)
    # Within the sixteen that share a scale, what is given back is a line over the integers: no integer moved.
    for part, integers in zip(unpacked.reshape(-1, 16), quantized.integers.numpy().reshape(-1, 16), strict=True):
        slope, offset = np.polyfit(integers.astype(float), part, 1)
        assert np.abs(slope * integers + offset - part).max() < 1e-6
        assert kind == "Q2_K" or abs(offset + slope * 4) < 1e-6


@pytest.mark.parametrize(("bits", "kind"), [(3, "Q3_K"), (2, "Q2_K")])
def test_scales_that_are_equal_lose_nothing_but_the_step_s_own_rounding(bits: int, kind: str) -> None:
    quantized = weight(bits, True, equal=True)
    expected = quantized.dequantize().numpy()
    assert np.abs(given_back(quantized, kind) - expected).max() < 2.0**-10 * np.abs(expected).max()


def test_no_finer_step_is_found_by_trying_a_thousand() -> None:
    quantized = weight(3, True)
    unpacked, expected = given_back(quantized, "Q3_K")[:, :256], quantized.dequantize().numpy()[:, :256]
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
    zeros = weight(3, True)
    zeros.scales[:] = 0
    assert not given_back(zeros, "Q3_K").any()


@pytest.mark.parametrize(("bits", "kind", "number"), [(3, "Q3_K", 11), (2, "Q2_K", 10)])
def test_llama_cpp_computes_what_the_blocks_stand_for(tmp_path: Path, bits: int, kind: str, number: int) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    source = save_mergeable_llama(tmp_path / "source", num_key_value_heads=2, **sizes)
    quantized = quantize_tiny_llama(source, tmp_path / "quantized", bits, 64)
    train_tokenizer().save_pretrained(quantized.folder)
    write_gguf(quantized, tmp_path / "tiny.gguf", Types("f32", k_quants=True))
    reader = GGUFReader(tmp_path / "tiny.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.1.attn_q.weight"] == kind
    assert kinds["token_embd.weight"] == "Q4_0" and reader.fields["general.file_type"].parts[-1][0] == number
    differences = compare_gguf(tmp_path / "tiny.gguf", quantized, Types("f32", k_quants=True))
    assert all(difference.largest <= difference.allowed for difference in differences) and any(
        difference.rounded for difference in differences
    )
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
