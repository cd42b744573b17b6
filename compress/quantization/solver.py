"""One layer at a time: rounded as the recipe says, packed as the file wants it, with an error that names the layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.errors import StageError
from compress.models.gptq_layout import pack_layer
from compress.numerics.gptq import GptqSettings, quantize_gptq, round_to_nearest
from compress.numerics.quantized_weight import QuantizedWeight
from compress.quantization.config import Quantization
from compress.quantization.layers import Layer


@dataclass(frozen=True)
class Solved:
    """A layer's integers, and what was found of it."""

    weight: QuantizedWeight
    layer: Layer

    def packed(self, stored_less_one: bool) -> dict[str, torch.Tensor]:
        """Its tensors in the GPTQ layout, by full name."""
        parts = pack_layer(self.weight, stored_less_one)
        return {f"{self.layer.name}.{part}": tensor for part, tensor in parts.items()}


def settings_for(config: Quantization, bits: int, group_size: int) -> GptqSettings:
    """What the solver is told."""
    return GptqSettings(
        bits=bits,
        group_size=group_size,
        symmetric=config.sym,
        act_order=config.act_order,
        damping=config.damp_percent,
        scale_search=config.method == "gptq",
        refinement_sweeps=config.refinement_sweeps,
    )


def solve_layer(config: Quantization, layer: Layer, weight: torch.Tensor, hessian: torch.Tensor | None) -> Solved:
    """Round ``weight`` [rows, columns] under ``hessian`` [columns, columns], or to nearest where there is none.

    Raises `StageError` that names the layer.
    """
    assert layer.bits is not None and layer.group_size is not None
    settings = settings_for(config, layer.bits, layer.group_size)
    try:
        if hessian is None:
            rounded = round_to_nearest(weight, settings)
            error = (weight - rounded.dequantize()).square().sum() / weight.square().sum().clamp(min=1e-30)
            return Solved(rounded, layer.solved(float(error)))
        solution = quantize_gptq(weight, hessian, settings)
    except ValueError as error:
        raise StageError(
            f"The layer {layer.name} cannot be quantized: {error}.",
            mend="give more calibration text (samples), raise damp_percent, or name the layer in `keep`",
        ) from error
    return Solved(solution.quantized, layer.solved(solution.error, solution.damping, solution.dead_columns))
