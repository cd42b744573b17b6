"""Scales that learn, against autograd's finite differences and the plain formula."""

from __future__ import annotations

import pytest
import torch

from compress.numerics import fake_quantization
from compress.numerics.fake_quantization import dequantize, stored_as
from compress.numerics.integer_grid import QuantizedWeight


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


def test_large_matrices_are_done_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_stored_values_are_the_files_and_the_gradient_passes() -> None:
    values = torch.tensor([0.1, 1 / 3, 1e-3], requires_grad=True)
    stored = stored_as(values, torch.float16)
    assert torch.equal(stored, torch.tensor([0.1, 1 / 3, 1e-3]).half().float())
    assert not torch.equal(stored, values)
    (stored * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.equal(values.grad, torch.tensor([1.0, 2.0, 3.0]))
