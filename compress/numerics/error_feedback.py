"""Rounding to a grid that is given, each error made up for by the weights still to come."""

from __future__ import annotations

import torch


def round_with_feedback(
    weight: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor, highest: int, damping: float = 0.01
) -> torch.Tensor:
    """Integers [groups, outputs, inputs] within +-``highest`` for ``weight`` of that shape.

    ``scales`` is [groups, outputs], ``hessian`` [groups, inputs, inputs] the sum of x x^T over what the group is given.
    Inputs are rounded in turn, and each error e_j is spread over those that follow, W_k -= e_j U_jk / U_jj with U the
    upper Cholesky factor of the damped Hessian's inverse (GPTQ, Frantar et al. 2023, section 3.3).
    """
    inputs = weight.shape[-1]
    diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1)
    added = (damping * diagonal.mean(dim=-1)).clamp(min=torch.finfo(torch.float32).tiny)
    damped = hessian.double() + torch.diag_embed(added.double()[:, None].expand(-1, inputs))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    left, steps = weight.double().clone(), scales.double()
    found = torch.empty(weight.shape, dtype=torch.int8)
    for place in range(inputs):
        column = left[..., place]
        whole = (column / steps).round().clamp(-highest, highest)
        found[..., place] = whole.to(torch.int8)
        error = (column - whole * steps) / upper[:, place, place, None]
        left[..., place + 1 :] -= error[..., None] * upper[:, None, place, place + 1 :]
    return found
