"""What to remove: magnitudes, first-order importance, and the schedule along which sparsity rises."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def cubic_sparsity(step: int, steps: int, final: float) -> float:
    """Sparsity after ``step`` of ``steps``: s_f - s_f (1 - t)^3 (Zhu and Gupta 2017, equation 1, from zero)."""
    progress = min(max(step / steps, 0.0), 1.0)
    return final - final * (1 - progress) ** 3


def magnitude_masks(weights: Sequence[torch.Tensor], sparsity: float, scope: str) -> list[torch.Tensor]:
    """Masks (True: keep) that drop the smallest magnitudes.

    ``scope`` is ``layer`` (each tensor loses floor(sparsity * numel) weights) or ``global`` (magnitudes are ranked
    over all tensors). Ties fall in the order of position.
    """
    if scope == "global":
        flat = torch.cat([weight.detach().abs().flatten() for weight in weights])
        keep = _keep_largest(flat, sparsity)
        parts = torch.split(keep, [weight.numel() for weight in weights])
        return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
    return [_keep_largest(weight.detach().abs().flatten(), sparsity).view_as(weight) for weight in weights]


def _keep_largest(magnitudes: torch.Tensor, sparsity: float) -> torch.Tensor:
    dropped = int(sparsity * magnitudes.numel())
    order = torch.argsort(magnitudes, stable=True)
    keep = torch.ones_like(magnitudes, dtype=torch.bool)
    keep[order[:dropped]] = False
    return keep


def taylor_importance(activation: torch.Tensor, gradient: torch.Tensor, group_size: int) -> torch.Tensor:
    """First-order importance of groups of features: sum over the batch of |sum over tokens of a * dL/da|.

    ``activation`` and ``gradient`` are [B, L, F]; returns [F / group_size]. With groups of one head's features it is
    |dL/d xi| of a gate xi at 1 (Michel et al. 2019, equation 2); with single features Molchanov et al. 2019,
    equation 7, before squaring.
    """
    product = (activation * gradient).sum(dim=1)
    return product.view(product.shape[0], -1, group_size).sum(dim=-1).abs().sum(dim=0)


def most_important(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` largest scores, in ascending order; ties fall to the lower index."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values
