"""Tests of GPTQ against the textbook algorithm: column by column with the inverse remaining Hessian, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import layer_problem

from compress.numerics.gptq import GptqSettings, output_error, quantize_gptq, round_to_nearest
from compress.numerics.integer_grid import QuantizedWeight

ROWS, COLUMNS = 12, 150


def textbook(weight: torch.Tensor, hessian: torch.Tensor, grid: QuantizedWeight, order: list[int]) -> torch.Tensor:
    """Return the integers [rows, columns] of OBQ in a fixed order (Frantar et al. 2022, equation 2).

    After each column the remaining weights move by -(error / [H_F^-1]_00) times the first row of H_F^-1.
    """
    remaining = weight.double().clone()
    damped = hessian.double() + 0.05 * hessian.double().diagonal().mean() * torch.eye(len(hessian)).double()
    integers = torch.empty_like(grid.integers)
    for index, column in enumerate(order):
        left = order[index:]
        inverse = torch.linalg.inv(damped[left][:, left])
        group = column // grid.group_size
        scale, zero = grid.scales[:, group].double(), grid.zero_points[:, group].double()
        levels = (1 << grid.bits) - 1
        integer = ((remaining[:, column] / scale).round() + zero).clamp(0, levels)
        integers[:, column] = integer.to(torch.uint8)
        error = remaining[:, column] - (integer - zero) * scale
        remaining[:, left] -= error[:, None] / inverse[0, 0] * inverse[0]
    return integers


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [None, 64, 32])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (2, False), (3, True), (8, False)])
def test_integers_equal_the_textbook_algorithm(
    act_order: bool, group_size: int | None, bits: int, symmetric: bool
) -> None:
    # 150 columns: two whole blocks of the solver and a part, and a last group that is shorter.
    weight, hessian = layer_problem(ROWS, COLUMNS)
    actual = quantize_gptq(weight, hessian, GptqSettings(bits, group_size, symmetric, act_order)).quantized
    order = list(range(COLUMNS))
    if act_order:
        order.sort(key=lambda column: -float(hessian[column, column]))
    assert torch.equal(actual.integers, textbook(weight, hessian, actual, order))
    # Otherwise this test proves nothing: the order and the updates matter.
    assert not torch.equal(actual.integers, textbook(weight, hessian, actual, order[::-1]))
    assert not torch.equal(actual.integers, textbook(weight, torch.eye(COLUMNS), actual, order))


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_uncorrelated_inputs_give_round_to_nearest(group_size: int | None, symmetric: bool) -> None:
    weight, _ = layer_problem(ROWS, COLUMNS)
    options = GptqSettings(4, group_size, symmetric)
    actual = quantize_gptq(weight, 3 * torch.eye(COLUMNS), options).quantized
    nearest = round_to_nearest(weight, options)
    assert torch.equal(actual.integers, nearest.integers)
    assert torch.equal(actual.scales, nearest.scales)
    assert torch.equal(actual.zero_points, nearest.zero_points)


def test_scaling_the_hessian_changes_nothing() -> None:
    weight, hessian = layer_problem(ROWS, COLUMNS)
    small, large = (quantize_gptq(weight, hessian * factor, GptqSettings()) for factor in (2.0**-20, 2.0**12))
    assert torch.equal(small.quantized.integers, large.quantized.integers)
    assert small.error == pytest.approx(large.error)


@pytest.mark.parametrize("act_order", [True, False])
def test_reported_error_is_the_output_error(act_order: bool) -> None:
    weight, hessian = layer_problem(ROWS, COLUMNS)
    options = GptqSettings(3, 64, act_order=act_order)
    solution = quantize_gptq(weight, hessian, options)
    error = (weight - solution.quantized.dequantize()).double()
    whole = torch.trace(weight.double() @ hessian.double() @ weight.double().T)
    expected = float(torch.trace(error @ hessian.double() @ error.T) / whole)
    assert solution.error == pytest.approx(expected, rel=1e-4)
    assert output_error(weight, solution.quantized.dequantize(), hessian) == pytest.approx(expected, rel=1e-4)
    assert solution.damping == 0.05
    assert solution.dead_columns == 0


def test_each_option_lowers_the_error() -> None:
    weight, hessian = layer_problem(64, 256)
    bare = GptqSettings(3, 64, act_order=False, scale_search=False)
    nearest = output_error(weight, round_to_nearest(weight, bare).dequantize(), hessian)
    errors = [
        quantize_gptq(weight, hessian, options).error
        for options in (
            bare,
            replace(bare, scale_search=True),
            replace(bare, scale_search=True, act_order=True),
        )
    ]
    assert len(set(errors)) == len(errors)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.8 * nearest


def test_stacked_layers_are_solved_as_if_alone() -> None:
    weight, hessian = layer_problem(40, 96)
    options = GptqSettings(4, 32)
    together = quantize_gptq(weight, hessian, options).split([24, 16])
    apart = [quantize_gptq(part, hessian, options) for part in weight.split([24, 16])]
    for item, other in zip(together, apart, strict=True):
        assert torch.equal(item.quantized.integers, other.quantized.integers)
        assert torch.equal(item.quantized.scales, other.quantized.scales)
        assert item.error == pytest.approx(other.error, rel=1e-5)
    assert together[0].error != pytest.approx(together[1].error, rel=1e-3)


def test_always_zero_inputs_add_no_error() -> None:
    weight, hessian = layer_problem(ROWS, 40)
    dead = torch.tensor([3, 17, 39])
    hessian[dead] = 0
    hessian[:, dead] = 0
    live = torch.tensor([column for column in range(40) if column not in dead.tolist()])
    options = GptqSettings(4, None)
    solution = quantize_gptq(weight, hessian, options)
    assert solution.dead_columns == 3
    assert (solution.quantized.dequantize()[:, dead] == 0).all()
    alone = quantize_gptq(weight[:, live], hessian[live][:, live], options)
    assert torch.equal(solution.quantized.integers[:, live], alone.quantized.integers)
    assert solution.error == pytest.approx(alone.error, rel=1e-5)
    # They need no extra damping.
    assert quantize_gptq(weight, hessian, replace(options, damping=0.0)).damping == 0.0


def test_damping_rises_until_a_singular_hessian_can_be_factorized() -> None:
    weight, _ = layer_problem(ROWS, 48)
    inputs = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    hessian = inputs.T @ inputs
    solution = quantize_gptq(weight, hessian, GptqSettings(4, None, damping=0.0))
    assert solution.damping in (1e-4, 1e-3, 1e-2)
    assert solution.error < output_error(weight, round_to_nearest(weight, GptqSettings(4, None)).dequantize(), hessian)


def test_unfactorizable_hessian_is_refused() -> None:
    hessian = torch.tensor([[1.0, 100.0], [100.0, 1.0]])
    with pytest.raises(ValueError, match="no damping up to 10 makes the Hessian positive definite"):
        quantize_gptq(torch.ones(2, 2), hessian, GptqSettings(4, None))


@pytest.mark.parametrize("transposed", [False, True])
def test_arguments_are_not_modified(transposed: bool) -> None:
    weight, hessian = layer_problem(32, 96)
    hessian[5] = hessian[:, 5] = 0
    if transposed:
        weight = weight.T.contiguous().T
    original = weight.clone(), hessian.clone()
    quantize_gptq(weight, hessian, GptqSettings(4, 32))
    round_to_nearest(weight, GptqSettings(4, 32))
    assert torch.equal(weight, original[0])
    assert torch.equal(hessian, original[1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 80),
    bits=st.integers(2, 8),
    group_size=st.none() | st.integers(1, 90),
    symmetric=st.booleans(),
    act_order=st.booleans(),
)
def test_output_invariants_hold_for_any_shape(
    rows: int, columns: int, bits: int, group_size: int | None, symmetric: bool, act_order: bool
) -> None:
    weight, hessian = layer_problem(rows, columns)
    options = GptqSettings(bits, group_size, symmetric, act_order)
    solution = quantize_gptq(weight, hessian, options)
    quantized = solution.quantized
    size = group_size or columns
    assert quantized.integers.shape == (rows, columns)
    assert quantized.integers.dtype == quantized.zero_points.dtype == torch.uint8
    assert quantized.scales.shape == quantized.zero_points.shape == (rows, -(-columns // size))
    assert int(quantized.integers.max()) < 1 << bits and int(quantized.zero_points.max()) < 1 << bits
    assert torch.equal(quantized.scales.half().float(), quantized.scales)
    assert bool((quantized.scales != 0).all()) and (symmetric or bool((quantized.scales > 0).all()))
    assert not symmetric or quantized.symmetric
    assert solution.error >= 0
    expected = output_error(weight, quantized.dequantize(), hessian)
    assert solution.error == pytest.approx(expected, rel=1e-2, abs=1e-6)


def test_invalid_inputs_are_refused() -> None:
    weight, hessian = layer_problem(4, 8)
    broken = weight.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(ValueError, match="the weight holds values that are not finite"):
        quantize_gptq(broken, hessian, GptqSettings())
    with pytest.raises(ValueError, match="the weight holds values that are not finite"):
        round_to_nearest(broken, GptqSettings())
    with pytest.raises(ValueError, match="the Hessian holds values that are not finite"):
        quantize_gptq(weight, hessian * float("inf"), GptqSettings())
    with pytest.raises(ValueError, match=r"weight \(4, 8\) needs a square Hessian, found \(4, 4\)"):
        quantize_gptq(weight, hessian[:4, :4], GptqSettings())
    with pytest.raises(ValueError, match="no calibration activation reached this layer"):
        quantize_gptq(weight, torch.zeros(8, 8), GptqSettings())
    with pytest.raises(ValueError, match="negative diagonal"):
        quantize_gptq(weight, -hessian, GptqSettings())
    with pytest.raises(ValueError, match="beyond float16"):
        quantize_gptq(weight * 1e9, hessian, GptqSettings())
