"""Blocks of 32 against llama.cpp's own Python package, and one laid out by hand."""

import struct

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from compress.formats.gguf.blocks import block_type, check_blocks, pack_blocks, row_bytes
from compress.numerics.integer_grid import QuantizedWeight
from compress.utils.errors import ModelError


def weight(bits: int, group_size: int, symmetric: bool, columns: int = 192, rows: int = 6) -> QuantizedWeight:
    """Random integers of the whole range, scales that float16 has."""
    generator = torch.Generator().manual_seed(100 * bits + group_size)
    groups = -(-columns // group_size)
    zeros = torch.full((rows, groups), 1 << (bits - 1))
    if not symmetric:
        zeros = torch.randint(0, 1 << bits, (rows, groups), generator=generator)
    return QuantizedWeight(
        integers=torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8),
        scales=(torch.rand(rows, groups, generator=generator) * 0.01 + 1e-4).half().float(),
        zero_points=zeros.to(torch.uint8),
        bits=bits,
        group_size=group_size,
    )


def given_back(packed: np.ndarray, kind: str) -> np.ndarray:
    found: np.ndarray = dequantize(packed, GGMLQuantizationType[kind])
    return found


@pytest.mark.parametrize("group_size", [32, 64, 128, 192])
@pytest.mark.parametrize(
    ("bits", "kind"),
    [(2, "Q4_0"), (3, "Q4_0"), (4, "Q4_0"), (5, "Q5_0"), (6, "Q8_0"), (7, "Q8_0"), (8, "Q8_0")],
)
def test_symmetric_weights_come_back_to_the_bit(bits: int, kind: str, group_size: int) -> None:
    quantized = weight(bits, group_size, symmetric=True)
    assert block_type(bits, True, "layer") == kind
    packed = pack_blocks(quantized, kind)
    assert packed.shape == (6, row_bytes(kind, 192)) and packed.dtype == np.uint8
    assert np.array_equal(given_back(packed, kind), quantized.dequantize().numpy())


@pytest.mark.parametrize(("bits", "kind"), [(2, "Q4_1"), (3, "Q4_1"), (4, "Q4_1"), (5, "Q5_1")])
def test_minima_of_weights_with_zero_points_are_rounded_to_float16_and_nothing_else(bits: int, kind: str) -> None:
    quantized = weight(bits, 64, symmetric=False)
    assert block_type(bits, False, "layer") == kind
    found = given_back(pack_blocks(quantized, kind), kind)
    groups = np.arange(192) // 64
    scales, zeros = quantized.scales.numpy()[:, groups], quantized.zero_points.numpy()[:, groups]
    minima = (-zeros.astype(np.float32) * scales).astype(np.float16).astype(np.float32)
    assert np.array_equal(found, quantized.integers.numpy().astype(np.float32) * scales + minima)
    assert np.abs(found - quantized.dequantize().numpy()).max() > 0


def test_zero_in_the_middle_makes_minima_exact() -> None:
    # -8 * scale is the scale with another exponent.
    quantized = weight(4, 32, symmetric=True)
    assert np.array_equal(given_back(pack_blocks(quantized, "Q4_1"), "Q4_1"), quantized.dequantize().numpy())


def test_a_block_of_four_bits_by_hand() -> None:
    integers = torch.arange(32).remainder(16).to(torch.uint8)[None]
    quantized = QuantizedWeight(integers, torch.tensor([[0.5]]), torch.tensor([[8]], dtype=torch.uint8), 4, 32)
    # Weight 0 and weight 16 are both 0, weight 1 and 17 both 1, and so on: a byte holds the same number twice.
    expected = struct.pack("<e", 0.5) + bytes(16 * number + number for number in range(16))
    assert pack_blocks(quantized, "Q4_0").tobytes() == expected


def test_the_halves_of_a_block_share_bytes() -> None:
    integers = torch.zeros(1, 32, dtype=torch.uint8)
    integers[0, 0], integers[0, 16] = 3, 7
    quantized = QuantizedWeight(integers, torch.tensor([[1.0]]), torch.tensor([[8]], dtype=torch.uint8), 4, 32)
    assert pack_blocks(quantized, "Q4_0")[0, 2] == 7 << 4 | 3


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
