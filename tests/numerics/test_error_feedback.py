"""Rounding with error feedback and its refinement."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from layer_problems import layer_problem

from compress.formats.onnx.int8.bias_correction import round_with_feedback
from compress.numerics.gptq import GptqSettings, quantize_gptq, refine_columns, round_to_nearest
from compress.numerics.integer_grid import IntegerGrid, QuantizedWeight


def loss(weight: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Sum over outputs of e H e^T, e = W - q s."""
    error = weight.double() - integers.double() * scales.double()[..., None]
    return torch.einsum("goi,gij,goj->", error, hessian.double(), error)


def problem(inputs: int, outputs: int, groups: int, shared: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, scales for 4-bit integers, and products of inputs that have ``shared`` in common, as pixels have."""
    torch.manual_seed(inputs)
    weight = torch.randn(groups, outputs, inputs)
    values = torch.randn(groups, inputs, 400) + shared * torch.randn(groups, 1, 400)
    return weight, weight.abs().amax(dim=-1) / 7, values @ values.transpose(1, 2)


def test_inputs_that_know_nothing_of_each_other_are_rounded_to_the_nearest() -> None:
    weight, scales, _ = problem(9, 5, 3, 0)
    actual = round_with_feedback(weight, scales, torch.eye(9).expand(3, 9, 9) * 40, 7)
    assert torch.equal(actual, (weight / scales[..., None]).round().to(torch.int8))


def test_errors_cancel_where_inputs_are_alike() -> None:
    weight, scales, hessian = problem(9, 6, 4, 6.0)
    nearest = (weight / scales[..., None]).round()
    actual = round_with_feedback(weight, scales, hessian, 7)
    assert loss(weight, actual, scales, hessian) < 0.3 * loss(weight, nearest, scales, hessian)
    assert int(actual.abs().max()) <= 7


def test_it_comes_near_the_best_of_all_neighbours() -> None:
    weight, scales, hessian = problem(8, 1, 1, 4.0)
    below = (weight / scales[..., None]).floor()
    tried = [below + torch.tensor(step, dtype=torch.float32) for step in itertools.product((0, 1), repeat=8)]
    best = min(float(loss(weight, integers.clamp(-7, 7), scales, hessian)) for integers in tried)
    nearest = float(loss(weight, (weight / scales[..., None]).round(), scales, hessian))
    actual = float(loss(weight, round_with_feedback(weight, scales, hessian, 7, damping=1e-4), scales, hessian))
    assert actual < best + 0.25 * (nearest - best)


def test_an_input_that_is_always_zero_harms_nothing() -> None:
    weight, scales, hessian = problem(9, 6, 4, 6.0)
    hessian[:, 2], hessian[:, :, 2] = 0, 0
    actual = round_with_feedback(weight, scales, hessian, 7)
    assert loss(weight, actual, scales, hessian) < loss(weight, (weight / scales[..., None]).round(), scales, hessian)


def refine(
    weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor, sweeps: int, damping: float = 0.05
) -> QuantizedWeight:
    """Lower tr(E (H + damping * mean diagonal) E^T), E = ``weight`` - Q, by ``sweeps`` passes of `refine_columns`.

    ``weight`` is [out, in], ``hessian`` [in, in].
    """
    grid = IntegerGrid(
        quantized.scales.T.contiguous(),
        quantized.zero_points.T.float().contiguous(),
        quantized.bits,
        quantized.group_size,
    )
    integers = quantized.integers.T.contiguous()
    errors = (weight - quantized.dequantize()).T.contiguous()
    shift = damping * float(hessian.diagonal().mean())
    refine_columns(errors, integers, grid, hessian, shift, sweeps)
    return grid.weight(integers)


def losses(weight: torch.Tensor, restored: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The error of each row in double precision."""
    error = (weight - restored).double()
    return ((error @ hessian.double()) * error).sum(1)


@pytest.mark.parametrize("group_size", [None, 64, 20])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_row_gets_worse_from_sweep_to_sweep(group_size: int | None, symmetric: bool) -> None:
    weight, hessian = layer_problem(24, 150)
    current = round_to_nearest(weight, GptqSettings(3, group_size, symmetric))
    original = losses(weight, current.dequantize(), hessian)
    first = original.clone()
    for _ in range(4):
        current = refine(weight, current, hessian, sweeps=1, damping=0.0)
        after = losses(weight, current.dequantize(), hessian)
        assert bool((after <= original * (1 + 1e-5)).all())
        original = after
    assert float(original.sum()) < 0.7 * float(first.sum())
    assert int(current.integers.max()) <= 7
    assert torch.equal(current.scales.half().float(), current.scales)


@pytest.mark.parametrize("group_size", [None, 8])
def test_where_it_ends_no_single_change_helps(group_size: int | None) -> None:
    weight, hessian = layer_problem(6, 24)
    start = quantize_gptq(weight, hessian, GptqSettings(3, group_size)).quantized
    actual = refine(weight, start, hessian, sweeps=60, damping=0.0)
    restored = actual.dequantize()
    least = losses(weight, restored, hessian)
    scales = actual.scales.repeat_interleave(actual.group_size, 1)
    for column, move in itertools.product(range(24), (-1, 1)):
        moved = restored.clone()
        allowed = (actual.integers[:, column].int() + move).clamp(0, 7) - actual.integers[:, column].int()
        moved[:, column] += allowed * scales[:, column]
        assert bool((losses(weight, moved, hessian) >= least * (1 - 1e-5)).all())
    for group, direction in itertools.product(range(actual.scales.shape[1]), (-torch.inf, torch.inf)):
        first = slice(group * actual.group_size, (group + 1) * actual.group_size)
        neighbour = torch.nextafter(actual.scales[:, group].half(), torch.tensor(direction).half()).float()
        moved = restored.clone()
        moved[:, first] *= (neighbour / actual.scales[:, group])[:, None]
        assert bool((losses(weight, moved, hessian) >= least * (1 - 1e-5)).all())


def test_a_tiny_layer_often_reaches_the_best_of_all() -> None:
    reached = 0
    for seed in range(40):
        weight, hessian = layer_problem(1, 4, seed)
        start = round_to_nearest(weight, GptqSettings(2, None))
        actual = refine(weight, start, hessian, sweeps=10, damping=0.0)
        every = torch.tensor(list(itertools.product(range(4), repeat=4)))
        least = losses(weight, (every - 2) * actual.scales, hessian).min()
        loss = losses(weight, actual.dequantize(), hessian)[0]
        assert float(loss) >= float(least) * (1 - 1e-5)
        reached += float(loss) <= float(least) * (1 + 1e-5)
    assert reached > 20


def test_a_scale_is_refitted_by_the_closed_form() -> None:
    # A range so fine that every weight lies at its end: no integer can move, and the scale alone is left.
    weight, hessian = layer_problem(5, 16)
    weight = weight.abs() + 1
    start = round_to_nearest(weight, GptqSettings(2, None, symmetric=False, scale_search=False))
    start = replace(start, integers=torch.full_like(start.integers, 3))
    actual = refine(weight, start, hessian, sweeps=1, damping=0.0)
    steps = torch.full((16,), 3.0)
    expected = (weight @ hessian @ steps) / (steps @ hessian @ steps)
    moved = actual.integers != 3
    rows = ~moved.any(1)
    assert int(rows.sum()) > 0
    assert actual.scales[rows, 0].tolist() == expected[rows].half().float().tolist()
