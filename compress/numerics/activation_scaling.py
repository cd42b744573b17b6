"""Activation-aware scaling: make the inputs that carry much larger weights before rounding, and undo it before."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.numerics.gptq import GptqSettings, round_to_nearest

_EXPONENTS = 20


def awq_scales(weights: Sequence[torch.Tensor], hessian: torch.Tensor, settings: GptqSettings) -> torch.Tensor:
    """A factor s [in]: W diag(s) is to be rounded, and the inputs divided by s, which the layer before has to do.

    AWQ (Lin et al. 2023, section 3.2): s = m^alpha of the inputs' root mean square m, for the alpha of 0, 0.05 ... 0.95
    with the least tr(E H E^T) after rounding to nearest, summed over the ``weights`` [out, in] that share the input.
    Factors are normalised to a geometric mean of 1; all are 1 when nothing is better. ``hessian`` is [in, in].
    """
    magnitude = hessian.diagonal().clamp(min=0).sqrt()
    live = magnitude > 0
    logs = torch.where(live, magnitude, 1.0).log()
    logs = torch.where(live, logs - logs[live].mean(), 0.0)
    stacked = torch.cat(list(weights))
    best, least = torch.ones_like(magnitude), torch.inf
    for place in range(_EXPONENTS):
        factors = (logs * (place / _EXPONENTS)).exp()
        importance = hessian.diagonal() / factors.square()
        restored = round_to_nearest(stacked * factors, settings, importance).dequantize() / factors
        error = stacked - restored
        loss = float((error @ hessian).mul_(error).sum())
        if loss < least:
            best, least = factors, loss
    return best
