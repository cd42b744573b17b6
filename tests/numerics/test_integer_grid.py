"""Tests of integer grids, grouped scales and fake quantization."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import layer_problem
from onnx import TensorProto, helper, numpy_helper

from compress.numerics import block_quantization, fake_quantization
from compress.numerics.block_quantization import pack_nibbles, quantize_blocks
from compress.numerics.fake_quantization import (
    best_row_scales,
    dequantize,
    on_grid,
    row_scales,
    stored_as,
    unsigned_grid,
)
from compress.numerics.gptq import GptqSettings, round_to_nearest
from compress.numerics.integer_grid import QuantizedWeight, find_grid, round_columns


def weighted_error(weight: torch.Tensor, quantized: QuantizedWeight, importance: torch.Tensor) -> torch.Tensor:
    """Return the error of each row and group, [rows, groups]; groups have equal width."""
    error = (weight - quantized.dequantize()).square() * importance
    return error.reshape(len(weight), -1, quantized.group_size).sum(2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_range_search_is_close_to_a_fine_grid_search(bits: int, symmetric: bool) -> None:
    weight, hessian = layer_problem(16, 128)
    importance = hessian.diagonal()
    actual = round_to_nearest(weight, GptqSettings(bits, 32, symmetric), importance)
    errors = weighted_error(weight, actual, importance)
    bare = round_to_nearest(weight, GptqSettings(bits, 32, symmetric, scale_search=False), importance)
    least = torch.full_like(errors, torch.inf)
    levels = (1 << bits) - 1
    groups = weight.reshape(16, 4, 32)
    zero = actual.zero_points[..., None].float()
    for share in torch.linspace(0.2, 1.1, 400):
        scale = bare.scales[..., None] * share
        integers = ((groups / scale).round() + zero).clamp(0, levels)
        error = ((integers - zero) * scale - groups).square() * importance.reshape(4, 32)
        least = torch.minimum(least, error.sum(2))
    # The search tries a few ranges, and refits them; the fine grid tries them all, and at many bits finds scales on
    # which the few weights that matter most happen to lie.
    assert float(errors.sum()) < (1.03 if bits <= 4 else 2) * float(least.sum())
    assert float(errors.sum()) < 0.9 * float(weighted_error(weight, bare, importance).sum())


def test_symmetric_scale_uses_the_longer_side_of_the_range() -> None:
    # -8 to 7 quarters: every point of the four-bit range; its mirror image needs a coarser scale.
    weight = torch.arange(-8, 8).float()[None] / 4
    settings = GptqSettings(4, None, scale_search=False)
    exact = round_to_nearest(weight, settings)
    assert exact.scales.tolist() == [[0.25]]
    assert exact.integers.tolist() == [list(range(16))]
    assert torch.equal(exact.dequantize(), weight)
    mirrored = round_to_nearest(-weight, settings)
    assert mirrored.scales.item() == pytest.approx(2 / 7, rel=1e-3)
    searched = round_to_nearest(-weight, GptqSettings(4, None))
    assert searched.scales.item() == -0.25
    assert torch.equal(searched.dequantize(), -weight)
    assert mirrored.symmetric and searched.symmetric


def test_asymmetric_range_starts_at_the_smallest_weight() -> None:
    weight = torch.tensor([[0.0, 0.5, 1.0, 1.5], [-1.0, -0.5, 0.0, 0.5], [-1.5, -1.0, -0.5, 0.0]])
    actual = round_to_nearest(weight, GptqSettings(2, None, symmetric=False))
    assert actual.scales.flatten().tolist() == [0.5, 0.5, 0.5]
    assert actual.zero_points.flatten().tolist() == [0, 2, 3]
    assert torch.equal(actual.dequantize(), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_always_on_the_grid(symmetric: bool) -> None:
    weight, _ = layer_problem(8, 64)
    weight[:, ::3] = 0
    weight[2] = 0
    weight[3] = weight[3].abs() + 1
    weight[3, 5] = 0
    restored = round_to_nearest(weight, GptqSettings(3, 16, symmetric)).dequantize()
    assert bool((restored[weight == 0] == 0).all())
    assert bool((restored[2] == 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_partial_last_group_has_its_own_scale(symmetric: bool) -> None:
    weight, _ = layer_problem(8, 80)
    actual = round_to_nearest(weight, GptqSettings(4, 32, symmetric))
    tail = round_to_nearest(weight[:, 64:], GptqSettings(4, 16, symmetric))
    assert actual.scales.shape == (8, 3)
    assert torch.equal(actual.scales[:, 2:], tail.scales)
    assert torch.equal(actual.integers[:, 64:], tail.integers)


def test_rounding_is_to_the_nearest_point() -> None:
    weight, _ = layer_problem(8, 64)
    grid = find_grid(weight.T.contiguous(), 3, 16, False, None, True)
    integers = round_columns(weight.T.contiguous(), grid)
    points = torch.arange(8).float()
    for column, row in ((column, row) for column in range(64) for row in range(8)):
        group = column // 16
        distances = ((points - grid.zero_points[group, row]) * grid.scales[group, row] - weight[row, column]).abs()
        assert float(distances[int(integers[column, row])]) <= float(distances.min()) * (1 + 1e-5)


def test_chunked_rows_are_fitted_like_unchunked() -> None:
    # More rows than one cache-sized chunk.
    weight, _ = layer_problem(3000, 64)
    whole = round_to_nearest(weight, GptqSettings(4, 64))
    last = round_to_nearest(weight[-7:], GptqSettings(4, 64))
    assert torch.equal(whole.scales[-7:], last.scales)
    assert torch.equal(whole.integers[-7:], last.integers)


def test_scales_too_small_for_float16_become_its_smallest() -> None:
    actual = round_to_nearest(torch.tensor([[1e-9], [-1e-9]]).expand(2, 4), GptqSettings(4, None))
    assert actual.scales.flatten().tolist() == [-(2.0**-24), 2.0**-24]
    assert bool((actual.dequantize() == 0).all())


def random_weight(rows: int, columns: int, group_size: int, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    integers = torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 16, (rows, groups), generator=generator).to(torch.uint8)
    scales = (torch.rand(rows, groups, generator=generator) + 0.5).half().float()
    return QuantizedWeight(integers, scales, zeros, bits=4, group_size=group_size)


def centred(weight: QuantizedWeight) -> torch.Tensor:
    zeros = weight.zero_points.repeat_interleave(weight.group_size, 1)[:, : weight.integers.shape[1]]
    return (weight.integers.to(torch.int16) - zeros.to(torch.int16)).to(torch.int8)


@pytest.mark.parametrize(("columns", "group_size"), [(12, 4), (10, 4), (6, 6), (5, 8)])
def test_the_values_are_those_of_the_quantized_weight(columns: int, group_size: int) -> None:
    weight = random_weight(3, columns, group_size)
    actual = dequantize(centred(weight), weight.scales, group_size, torch.float32)
    assert torch.equal(actual, weight.dequantize())


@pytest.mark.parametrize(("columns", "group_size"), [(12, 4), (10, 4), (5, 8)])
def test_gradients_of_scales_agree_with_finite_differences(columns: int, group_size: int) -> None:
    weight = random_weight(3, columns, group_size)
    scales = weight.scales.double().requires_grad_(True)
    integers = centred(weight)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return dequantize(integers, values, group_size, torch.float64).sin().square().sum()

    assert torch.autograd.gradcheck(loss, (scales,))


def test_chunked_large_matrices_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(7, 10, 4)
    results = []
    for elements in (1 << 22, 25):
        monkeypatch.setattr(fake_quantization, "_PIECE_ELEMENTS", elements)
        scales = weight.scales.clone().requires_grad_(True)
        actual = dequantize(centred(weight), scales, 4, torch.float32)
        (actual * torch.arange(70.0).view(7, 10)).sum().backward()
        results.append((actual.detach(), scales.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_bfloat16_weights_are_the_nearest_to_the_exact_ones() -> None:
    weight = random_weight(3, 12, 4)
    actual = dequantize(centred(weight), weight.scales, 4, torch.bfloat16)
    assert torch.equal(actual, weight.dequantize().bfloat16())


def test_stored_values_are_float16_with_straight_through_gradient() -> None:
    values = torch.tensor([0.1, 1 / 3, 1e-3], requires_grad=True)
    stored = stored_as(values, torch.float16)
    assert torch.equal(stored, torch.tensor([0.1, 1 / 3, 1e-3]).half().float())
    assert not torch.equal(stored, values)
    (stored * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.equal(values.grad, torch.tensor([1.0, 2.0, 3.0]))


def quantize_linear() -> onnxruntime.InferenceSession:
    """Return `QuantizeLinear` of ONNX Runtime on the CPU, as uint8."""
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [None]),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
        helper.make_tensor_value_info("zero", TensorProto.UINT8, []),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.UINT8, [None])
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])], "g", inputs, [output]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


SESSION = quantize_linear()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(2**-20, 2**10, width=32), st.integers(0, 255))
def test_integers_equal_onnx_runtime(seed: int, scale: float, zero: int) -> None:
    generator = np.random.default_rng(seed)
    step = np.float32(scale)
    # Includes halves of a step, where rounding rules differ.
    values = np.concatenate([generator.normal(0, 90, 200), generator.integers(-400, 400, 200) + 0.5]).astype(np.float32)
    values = values * step
    (expected,) = SESSION.run(None, {"x": values, "scale": np.array(step), "zero": np.array(zero, np.uint8)})
    actual = on_grid(torch.from_numpy(values), torch.tensor(step), zero, 0, 255) + zero
    np.testing.assert_array_equal(actual.numpy(), expected.astype(np.float32))


def test_gradients_equal_those_of_lsq() -> None:
    # Esser et al. 2020, equation 3: dv/ds = -v/s + round(v/s) within, -Qn below and Qp above; dv/dx = 1 within, else 0.
    values = torch.tensor([-3.0, 0.3, 0.9, 5.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    item = torch.zeros(4)
    for index in range(4):
        actual = on_grid(values, scale, 0, -4, 7) * scale
        (item[index],) = torch.autograd.grad(actual[index], scale)
    (on_grid(values, scale, 0, -4, 7) * scale).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 1, 1, 0]))
    torch.testing.assert_close(item, torch.tensor([-4.0, -0.6 + 1, -1.8 + 2, 7]))


def test_row_scales_map_the_largest_weight_to_the_grid_end() -> None:
    weight = torch.tensor([[1.0, -127.0], [0.5, 0.25], [0.0, 0.0]])
    scales = row_scales(weight, 127)
    torch.testing.assert_close(scales[:2], torch.tensor([1.0, 0.5 / 127]))
    assert scales[2] > 0, "a row of zeros has a scale that can be divided by"


def test_best_row_scales_beat_every_fraction_of_the_maximum() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 64) * torch.tensor([1, 3, 0.1, 1, 1, 1])[:, None]

    def error(scale: torch.Tensor) -> torch.Tensor:
        q = (weight / scale[:, None]).round().clamp(-8, 7)
        return (q * scale[:, None] - weight).square().sum(dim=1)

    actual = error(best_row_scales(weight, 7))
    for share in np.linspace(0.3, 1, 25):
        assert bool((actual <= error(row_scales(weight, 7) * float(share)) * 1.01).all())
    assert bool((actual < error(row_scales(weight, 7)) * 0.9).any())


def test_activation_grid_contains_zero_and_both_ends() -> None:
    scale, zero = unsigned_grid(-1.0, 3.0)
    assert scale == 4 / 255 and zero == round(255 / 4)
    assert unsigned_grid(0.5, 2.0) == (2 / 255, 0)
    assert unsigned_grid(-2.0, -1.0) == (2 / 255, 255)
    assert unsigned_grid(0.0, 0.0) == (1.0, 0)
    with pytest.raises(ValueError, match="inf"):
        unsigned_grid(0.0, float("inf"))


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
    # Values outside are clamped to the end of the range.
    outside = blocks_of(quantized.integers)[~inside]
    assert np.isin(outside, (0, 2**bits - 1)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_stay_within_their_bits(bits: int):
    quantized = quantize_blocks(weight(), bits, BLOCK)
    assert quantized.integers.dtype == np.uint8 and quantized.zero_points.dtype == np.uint8
    assert quantized.integers.max() == 2**bits - 1 and quantized.zero_points.max() <= 2**bits - 1
    assert quantized.integers.shape == (ROWS, COLUMNS)
    assert quantized.scales.shape == quantized.zero_points.shape == (ROWS, COLUMNS // BLOCK)


def test_chunked_result_equals_unchunked(monkeypatch: pytest.MonkeyPatch):
    whole = quantize_blocks(weight(), 4, BLOCK)
    monkeypatch.setattr(block_quantization, "_AT_ONCE", 2 * BLOCK)
    parts = quantize_blocks(weight(), 4, BLOCK)
    for name in ("integers", "scales", "zero_points"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


def test_weights_on_the_grid_are_reproduced_exactly():
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
    # At four bits clipping must have helped somewhere, or this test proves nothing.
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
