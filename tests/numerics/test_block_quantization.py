"""Blockwise rounding: its error bound, its best range by brute force, and nibbles packed as ONNX packs them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import numpy_helper

from compress.numerics import block_quantization
from compress.numerics.block_quantization import pack_nibbles, quantize_blocks

ROWS, COLUMNS, BLOCK = 6, 64, 16


def weight(seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_t(3, (ROWS, COLUMNS)).astype(np.float32)


def blocks_of(array: np.ndarray) -> np.ndarray:
    return array.reshape(ROWS, COLUMNS // BLOCK, BLOCK).astype(np.float64)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_unclipped_weight_is_off_by_at_most_half_a_scale(bits: int):
    quantized = quantize_blocks(weight(), bits, BLOCK)
    error = np.abs(blocks_of(quantized.dequantize()) - blocks_of(weight()))
    scales, zeros = quantized.scales[..., None].astype(np.float64), quantized.zero_points[..., None].astype(np.float64)
    inside = (blocks_of(weight()) >= (-zeros - 0.5) * scales) & (
        blocks_of(weight()) <= (2**bits - 1 - zeros + 0.5) * scales
    )
    assert inside.mean() > 0.8
    assert (error[inside] <= (scales / 2 * 1.0001).repeat(BLOCK, -1)[inside]).all()
    # What lies outside is held at the end of the range.
    outside = blocks_of(quantized.integers)[~inside]
    assert np.isin(outside, (0, 2**bits - 1)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_stay_within_their_bits(bits: int):
    quantized = quantize_blocks(weight(), bits, BLOCK)
    assert quantized.integers.dtype == np.uint8 and quantized.zero_points.dtype == np.uint8
    assert quantized.integers.max() == 2**bits - 1 and quantized.zero_points.max() <= 2**bits - 1
    assert quantized.integers.shape == (ROWS, COLUMNS)
    assert quantized.scales.shape == quantized.zero_points.shape == (ROWS, COLUMNS // BLOCK)


def test_a_part_at_a_time_is_the_same_as_all_at_once(monkeypatch: pytest.MonkeyPatch):
    whole = quantize_blocks(weight(), 4, BLOCK)
    monkeypatch.setattr(block_quantization, "_AT_ONCE", 2 * BLOCK)
    parts = quantize_blocks(weight(), 4, BLOCK)
    for name in ("integers", "scales", "zero_points"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


def test_weights_on_the_grid_come_back_exactly():
    generator = np.random.default_rng(0)
    integers = generator.integers(0, 16, (ROWS, COLUMNS // BLOCK, BLOCK))
    integers[..., 0], integers[..., 1] = 0, 15
    exact = ((integers - 6) * np.float32(0.25)).astype(np.float32).reshape(ROWS, COLUMNS)
    quantized = quantize_blocks(exact, 4, BLOCK)
    assert (quantized.dequantize() == exact).all()
    assert (quantized.scales == 0.25).all() and (quantized.zero_points == 6).all()
    assert (quantized.integers == integers.reshape(ROWS, COLUMNS)).all()


def test_a_block_of_zeros_stays_zero_and_zero_is_always_exact():
    mixed = weight()
    mixed[0, :BLOCK] = 0
    mixed[1, ::3] = 0
    restored = quantize_blocks(mixed, 4, BLOCK).dequantize()
    assert (restored[0, :BLOCK] == 0).all() and (restored[1, ::3] == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_block_of_one_sign_spans_from_zero(sign: int):
    given = sign * (np.abs(weight()) + 5)
    quantized = quantize_blocks(given, 8, BLOCK)
    assert (quantized.zero_points == (0 if sign > 0 else 255)).all()
    np.testing.assert_allclose(quantized.dequantize(), given, atol=np.abs(given).max() / 255)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_range_of_the_grid_has_a_smaller_error(bits: int):
    restored = blocks_of(quantize_blocks(weight(), bits, BLOCK).dequantize())
    actual = ((restored - blocks_of(weight())) ** 2).sum(axis=-1)
    levels, least = 2**bits - 1, np.full_like(actual, np.inf)
    for row in range(ROWS):
        for index in range(COLUMNS // BLOCK):
            block = blocks_of(weight())[row, index]
            for share in np.linspace(0.75, 1.0, 11):
                low, high = min(block.min(), 0) * share, max(block.max(), 0) * share
                scale = (high - low) / levels
                zero = round(-low / scale)
                integers = np.clip(np.round(block / scale) + zero, 0, levels)
                least[row, index] = min(least[row, index], (((integers - zero) * scale - block) ** 2).sum())
    np.testing.assert_allclose(actual, least, rtol=1e-3)
    full_range = quantize_blocks(weight(), bits, BLOCK).scales == np.float32(
        (np.maximum(blocks_of(weight()).max(-1), 0) - np.minimum(blocks_of(weight()).min(-1), 0)) / levels
    )
    # At four bits clipping must have paid somewhere, or this test has shown nothing.
    assert bits == 8 or not full_range.all()


def test_columns_must_be_whole_blocks():
    with pytest.raises(ValueError, match="20 columns are not a multiple of the block size 16"):
        quantize_blocks(np.ones((2, 20), np.float32), 4, 16)


@pytest.mark.parametrize("columns", [8, 7, 1])
def test_nibbles_are_packed_as_onnx_packs_them(columns: int):
    integers = np.random.default_rng(0).integers(0, 16, (1, columns)).astype(np.uint8)
    tensor = numpy_helper.from_array(integers.astype(ml_dtypes.uint4))
    assert pack_nibbles(integers).tobytes() == tensor.raw_data


def test_each_row_is_packed_by_itself():
    packed = pack_nibbles(np.array([[1, 2, 3], [15, 0, 7]], np.uint8))
    assert packed.tolist() == [[0x21, 0x03], [0x0F, 0x07]]
