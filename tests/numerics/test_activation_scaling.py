"""Activation-aware factors: the best exponent by trying all, and what scaling can do that a plain grid cannot."""

from __future__ import annotations

import pytest
import torch
from layer_problems import layer_problem

from compress.numerics.activation_scaling import awq_scales
from compress.numerics.gptq import GptqSettings, round_to_nearest

SETTINGS = GptqSettings(3, 32)


def loss(weights: list[torch.Tensor], factors: torch.Tensor, hessian: torch.Tensor) -> float:
    total = 0.0
    for weight in weights:
        importance = hessian.diagonal() / factors.square()
        error = weight - round_to_nearest(weight * factors, SETTINGS, importance).dequantize() / factors
        total += float(torch.trace(error.double() @ hessian.double() @ error.double().T))
    return total


def test_no_exponent_is_better() -> None:
    weight, hessian = layer_problem(48, 96)
    weights = list(weight.split([32, 16]))
    found = awq_scales(weights, hessian, SETTINGS)
    magnitude = hessian.diagonal().sqrt()
    losses = []
    for place in range(20):
        factors = magnitude ** (place / 20)
        losses.append(loss(weights, factors / factors.log().mean().exp(), hessian))
    assert loss(weights, found, hessian) == pytest.approx(min(losses), rel=1e-3)
    assert min(losses) < 0.98 * losses[0]
    # A power of the magnitude, whatever the exponent, with a geometric mean of 1.
    slopes = found.log() / (magnitude.log() - magnitude.log().mean())
    assert float(slopes.std()) < 1e-3
    assert float(found.log().mean()) == pytest.approx(0, abs=1e-5)


def test_inputs_alike_are_left_alone() -> None:
    weight, _ = layer_problem(16, 64)
    assert awq_scales([weight], 0.5 * torch.eye(64), SETTINGS).tolist() == [1.0] * 64


def test_an_input_that_is_always_zero_keeps_a_factor_of_one() -> None:
    weight, hessian = layer_problem(16, 64)
    hessian[7] = hessian[:, 7] = 0
    found = awq_scales([weight], hessian, SETTINGS)
    assert float(found[7]) == 1.0
    assert bool(torch.isfinite(found).all())
    assert float(found.max()) > 1.05
