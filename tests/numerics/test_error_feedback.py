"""Tests of rounding with error feedback."""

from __future__ import annotations

import itertools

import torch

from compress.formats.onnx.int8.bias_correction import round_with_feedback


def loss(weight: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return the sum over outputs of e H e^T with e = W - q s."""
    error = weight.double() - integers.double() * scales.double()[..., None]
    return torch.einsum("goi,gij,goj->", error, hessian.double(), error)


def problem(inputs: int, outputs: int, groups: int, shared: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weights, 4-bit scales and X^T X of inputs with a ``shared`` component, like that of pixels."""
    torch.manual_seed(inputs)
    weight = torch.randn(groups, outputs, inputs)
    values = torch.randn(groups, inputs, 400) + shared * torch.randn(groups, 1, 400)
    return weight, weight.abs().amax(dim=-1) / 7, values @ values.transpose(1, 2)


def test_uncorrelated_inputs_give_round_to_nearest() -> None:
    weight, scales, _ = problem(9, 5, 3, 0)
    actual = round_with_feedback(weight, scales, torch.eye(9).expand(3, 9, 9) * 40, 7)
    assert torch.equal(actual, (weight / scales[..., None]).round().to(torch.int8))


def test_errors_cancel_for_correlated_inputs() -> None:
    weight, scales, hessian = problem(9, 6, 4, 6.0)
    nearest = (weight / scales[..., None]).round()
    actual = round_with_feedback(weight, scales, hessian, 7)
    assert loss(weight, actual, scales, hessian) < 0.3 * loss(weight, nearest, scales, hessian)
    assert int(actual.abs().max()) <= 7


def test_rounding_is_close_to_the_best_neighbour() -> None:
    weight, scales, hessian = problem(8, 1, 1, 4.0)
    below = (weight / scales[..., None]).floor()
    tried = [below + torch.tensor(step, dtype=torch.float32) for step in itertools.product((0, 1), repeat=8)]
    best = min(float(loss(weight, integers.clamp(-7, 7), scales, hessian)) for integers in tried)
    nearest = float(loss(weight, (weight / scales[..., None]).round(), scales, hessian))
    actual = float(loss(weight, round_with_feedback(weight, scales, hessian, 7, damping=1e-4), scales, hessian))
    assert actual < best + 0.25 * (nearest - best)


def test_always_zero_input_is_harmless() -> None:
    weight, scales, hessian = problem(9, 6, 4, 6.0)
    hessian[:, 2], hessian[:, :, 2] = 0, 0
    actual = round_with_feedback(weight, scales, hessian, 7)
    assert loss(weight, actual, scales, hessian) < loss(weight, (weight / scales[..., None]).round(), scales, hessian)
