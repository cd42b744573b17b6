"""Layers of one input: rounded together where they may be, and told apart where one of them cannot be."""

from __future__ import annotations

import pytest
import torch

from compress.numerics.gptq import GptqSettings, quantize_gptq
from compress.stages.blockwise.layers import Layer
from compress.stages.gptq.settings import Quantization
from compress.stages.gptq.solver import solve_layers
from compress.utils.errors import StageError


def layer(name: str, bits: int, group_size: int = 32) -> Layer:
    return Layer(name, 0, 64, bits, group_size)


def test_each_layer_of_an_input_comes_out_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 64, generator=generator)
    hessian = inputs.T @ inputs / 256
    layers = [layer("a", 4), layer("b", 4), layer("c", 3), layer("d", 3, 64), layer("e", 3, 64), layer("f", 3, 64)]
    weights = [torch.randn(rows, 64, generator=generator) for rows in (32, 64, 32, 96, 32, 32)]
    calls: list[int] = []

    def counted(weight: torch.Tensor, given: torch.Tensor, settings: GptqSettings) -> object:
        calls.append(len(weight))
        return quantize_gptq(weight, given, settings)

    monkeypatch.setattr("compress.stages.gptq.solver.quantize_gptq", counted)
    monkeypatch.setattr("compress.stages.gptq.solver._STACKED_ROWS", 128)
    found = solve_layers(Quantization(), layers, weights, hessian)
    assert calls == [96, 32, 128, 32]
    for solved, given, weight in zip(found, layers, weights, strict=True):
        assert given.bits is not None
        expected = quantize_gptq(weight, hessian, GptqSettings(given.bits, given.group_size))
        assert solved.layer.name == given.name and solved.weight.bits == given.bits
        assert torch.equal(solved.weight.integers, expected.quantized.integers)
        assert solved.layer.error == pytest.approx(expected.error, rel=1e-5)


def test_the_layer_that_cannot_be_rounded_is_named_alone() -> None:
    weights = [torch.ones(32, 64), torch.full((32, 64), torch.nan), torch.ones(32, 64)]
    with pytest.raises(
        StageError, match="The layer k cannot be quantized: the weight holds values that are not finite"
    ):
        solve_layers(Quantization(), [layer("q", 4), layer("k", 4), layer("v", 4)], weights, torch.eye(64))
