"""Layers rounded as the recipe says, those of one input together, and packed as the file wants them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from compress.models.gptq_layout import pack_layer
from compress.numerics.gptq import GptqSettings, quantize_gptq, round_to_nearest
from compress.numerics.integer_grid import QuantizedWeight
from compress.stages.blockwise.layers import Layer
from compress.stages.gptq.settings import Quantization
from compress.utils.errors import StageError

_STACKED_ROWS = 4096
"""Layers of one input are rounded as one up to that many rows: more rows a call gain no more, and cost memory."""


@dataclass(frozen=True)
class Solved:
    """A layer's integers, and what was found of it."""

    weight: QuantizedWeight
    layer: Layer

    def packed(self, stored_less_one: bool) -> dict[str, torch.Tensor]:
        """Return the layer's tensors in the GPTQ layout, by full name."""
        parts = pack_layer(self.weight.cpu(), stored_less_one)
        return {f"{self.layer.name}.{part}": tensor for part, tensor in parts.items()}


def settings_for(config: Quantization, bits: int, group_size: int) -> GptqSettings:
    """Return the settings of the numerical solver."""
    return GptqSettings(
        bits=bits,
        group_size=group_size,
        symmetric=config.sym,
        act_order=config.act_order,
        damping=config.damp_percent,
        scale_search=config.method == "gptq",
    )


def solve_layers(
    config: Quantization, layers: Sequence[Layer], weights: Sequence[torch.Tensor], hessian: torch.Tensor | None
) -> list[Solved]:
    """Round ``weights`` [rows, columns] under the ``hessian`` [columns, columns] of the input that all of them share.

    Without one they are rounded to nearest. Raises `StageError` that names the layer.
    """
    solutions: list[Solved] = []
    for stack_indices in _stacks(layers, weights):
        some, stack = layers[stack_indices], weights[stack_indices]
        try:
            solutions += _solve(config, some, stack, hessian)
        except ValueError as error:
            if len(some) > 1:
                # Which of them it is, they tell one by one.
                for layer, weight in zip(some, stack, strict=True):
                    solutions += solve_layers(config, [layer], [weight], hessian)
                continue
            raise StageError(
                f"The layer {some[0].name} cannot be quantized: {error}.",
                hint="give more calibration text (samples), raise damp_percent, or name the layer in `keep`",
            ) from error
    return solutions


def _stacks(layers: Sequence[Layer], weights: Sequence[torch.Tensor]) -> Iterator[slice]:
    """Neighbours with the same grid, up to `_STACKED_ROWS` together."""
    start = 0
    for stop in range(1, len(layers) + 1):
        whole = stop == len(layers)
        if (
            whole
            or (layers[stop].bits, layers[stop].group_size) != (layers[start].bits, layers[start].group_size)
            or sum(len(weight) for weight in weights[start : stop + 1]) > _STACKED_ROWS
        ):
            yield slice(start, stop)
            start = stop


def _solve(
    config: Quantization, layers: Sequence[Layer], weights: Sequence[torch.Tensor], hessian: torch.Tensor | None
) -> list[Solved]:
    """``layers`` that have one grid."""
    bits, group_size = layers[0].bits, layers[0].group_size
    assert bits is not None and group_size is not None
    settings = settings_for(config, bits, group_size)
    if hessian is None:
        solutions = []
        for layer, weight in zip(layers, weights, strict=True):
            rounded = round_to_nearest(weight, settings)
            error = (weight - rounded.dequantize()).square().sum() / weight.square().sum().clamp(min=1e-30)
            solutions.append(Solved(rounded, layer.solved(float(error))))
        return solutions
    solution = quantize_gptq(torch.cat(list(weights)) if len(weights) > 1 else weights[0], hessian, settings)
    parts = zip(solution.split([len(weight) for weight in weights]), layers, strict=True)
    return [Solved(part.quantized, layer.solved(part.error, part.damping, part.dead_columns)) for part, layer in parts]
