"""How a graph is quantized statically."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compress.numerics.activation_range import RangeMethod

Types = Literal["u8s8", "u8u8", "s8s8"]
"""Of activations and weights."""
Format = Literal["qoperator", "qdq"]
Rounding = Literal["nearest", "feedback"]
"""Of the weights of convolutions."""
ReduceRange = bool | Literal["saturating"]
"""7-bit weights everywhere, nowhere, or a coarser grid for those columns of weights that may saturate alone."""
Equalization = Literal["none", "activations", "weights"]
"""Of channels, across layers."""


@dataclass(frozen=True)
class StaticSettings:
    """What `quantize_static` is told.

    ``smooth`` is SmoothQuant's alpha, or None for none of it.
    """

    method: RangeMethod = "minmax"
    percentile: float = 99.99
    per_channel: bool = True
    types: Types = "u8s8"
    reduce_range: ReduceRange = False
    smooth: float | None = None
    bias_correction: bool = True
    format: Format = "qoperator"
    rounding: Rounding = "nearest"
    equalization: Equalization = "none"
