"""Scales and zero points: against every range of a fine grid, and cases worked by hand."""

from __future__ import annotations

import pytest
import torch
from layer_problems import layer_problem

from compress.numerics.gptq import GptqSettings, round_to_nearest
from compress.numerics.integer_grid import QuantizedWeight, find_grid, round_columns


def weighted_error(weight: torch.Tensor, quantized: QuantizedWeight, importance: torch.Tensor) -> torch.Tensor:
    """The error of each row and group [rows, groups]; groups of equal width."""
    error = (weight - quantized.dequantize()).square() * importance
    return error.reshape(len(weight), -1, quantized.group_size).sum(2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_hardly_a_range_has_a_smaller_error(bits: int, symmetric: bool) -> None:
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


def test_columns_that_matter_more_are_kept_better() -> None:
    weight, _ = layer_problem(64, 64)
    importance = torch.ones(64)
    importance[:8] = 100.0
    flat = round_to_nearest(weight, GptqSettings(3, 64))
    weighted = round_to_nearest(weight, GptqSettings(3, 64), importance)
    loud = [float((weight - actual.dequantize())[:, :8].square().sum()) for actual in (flat, weighted)]
    whole = [float((weight - actual.dequantize()).square().sum()) for actual in (flat, weighted)]
    assert loud[1] < loud[0]
    assert whole[1] > whole[0]


def test_the_longer_side_of_the_range_is_used() -> None:
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


def test_an_asymmetric_range_starts_where_the_weights_do() -> None:
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
def test_a_last_group_is_a_group_of_its_own(symmetric: bool) -> None:
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


def test_many_rows_are_fitted_like_few() -> None:
    # More than one stretch of rows that fits the cache.
    weight, _ = layer_problem(3000, 64)
    whole = round_to_nearest(weight, GptqSettings(4, 64))
    last = round_to_nearest(weight[-7:], GptqSettings(4, 64))
    assert torch.equal(whole.scales[-7:], last.scales)
    assert torch.equal(whole.integers[-7:], last.integers)


def test_scales_too_small_for_float16_become_its_smallest() -> None:
    actual = round_to_nearest(torch.tensor([[1e-9], [-1e-9]]).expand(2, 4), GptqSettings(4, None))
    assert actual.scales.flatten().tolist() == [-(2.0**-24), 2.0**-24]
    assert bool((actual.dequantize() == 0).all())
