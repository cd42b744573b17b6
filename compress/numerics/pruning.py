"""Importance measures for pruning: magnitudes, first-order importance, and the sparsity schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.numerics.sparse_pattern import Pattern


def cubic_sparsity(step: int, steps: int, final: float) -> float:
    """Return the sparsity after ``step`` of ``steps``: s_f - s_f (1 - t)^3 (Zhu and Gupta 2017, equation 1)."""
    progress = min(max(step / steps, 0.0), 1.0)
    return final - final * (1 - progress) ** 3


def magnitude_masks(
    weights: Sequence[torch.Tensor], sparsity: float, scope: str, pattern: Pattern | None = None
) -> list[torch.Tensor]:
    """Return masks (True: keep) that drop the smallest magnitudes.

    Ties are broken by position.

    Args:
        weights: Tensors to prune.
        sparsity: Share of weights to drop.
        scope: ``layer`` (each tensor loses floor(sparsity * numel) weights) or ``global`` (magnitudes are ranked over
            all tensors).
        pattern: With blocks, whole blocks of the least squared norm are dropped. With N:M, only weights that are not
            among the N largest of their M are dropped, until the sparsity is reached.
    """
    # Patterns are defined on matrices; convolutions are reshaped.
    if pattern is not None:
        masks = _pattern_masks([as_matrix(weight.detach()) for weight in weights], sparsity, scope, pattern)
        return [from_matrix(mask, weight.shape) for mask, weight in zip(masks, weights, strict=True)]
    # Rank all magnitudes together, then split the mask again.
    if scope == "global":
        flat = torch.cat([weight.detach().abs().flatten() for weight in weights])
        keep = _keep_largest(flat, sparsity)
        parts = torch.split(keep, [weight.numel() for weight in weights])
        return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
    return [_keep_largest(weight.detach().abs().flatten(), sparsity).view_as(weight) for weight in weights]


def _pattern_masks(
    matrices: Sequence[torch.Tensor], sparsity: float, scope: str, pattern: Pattern
) -> list[torch.Tensor]:
    # Blocks are ranked by their norms like single weights.
    if pattern.blocks:
        norms = [_block_norms(matrix, pattern) for matrix in matrices]
        return [_spread(mask, pattern) for mask in magnitude_masks(norms, sparsity, scope)]
    largest = [largest_of_each(matrix, pattern) for matrix in matrices]
    if pattern.sparsity is not None and sparsity >= pattern.sparsity:
        return largest
    # The N largest of each M get an infinite rank, so that they are never dropped.
    ranked = [torch.where(mask, torch.inf, matrix.abs()) for mask, matrix in zip(largest, matrices, strict=True)]
    return magnitude_masks(ranked, sparsity, scope)


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """Reshape a weight [out, in, ...] to [out, ... * in], with the inputs of a kernel position consecutive."""
    return weight.movedim(1, -1).reshape(len(weight), -1)


def from_matrix(matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Invert `as_matrix` for a weight of ``shape``."""
    return matrix.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def largest_of_each(matrix: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Return True for the N largest of each M consecutive entries; the first of equals."""
    grouped = matrix.abs().view(len(matrix), -1, pattern.second)
    order = torch.argsort(grouped, dim=-1, descending=True, stable=True)[..., : pattern.first]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, order, True).view_as(matrix)


def _block_norms(matrix: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Return squared norms of the blocks, [out / rows, in / columns]."""
    rows, columns = pattern.first, pattern.second
    return matrix.square().view(len(matrix) // rows, rows, -1, columns).sum(dim=(1, 3))


def _spread(mask: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    return mask.repeat_interleave(pattern.first, 0).repeat_interleave(pattern.second, 1)


def _keep_largest(magnitudes: torch.Tensor, sparsity: float) -> torch.Tensor:
    dropped = int(sparsity * magnitudes.numel())
    # A stable order drops ties by position.
    order = torch.argsort(magnitudes, stable=True)
    keep = torch.ones_like(magnitudes, dtype=torch.bool)
    keep[order[:dropped]] = False
    return keep


def taylor_importance(activation: torch.Tensor, gradient: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the first-order importance of feature groups: sum over the batch of |sum over tokens of a * dL/da|.

    ``activation`` and ``gradient`` are [B, L, F]; the result is [F / group_size]. With groups of one head's features it
    is |dL/d xi| of a gate xi at 1 (Michel et al. 2019, equation 2); with single features it is Molchanov et al. 2019,
    equation 7, before squaring.
    """
    # Sum over tokens before taking magnitudes: a head acts on all of them.
    product = (activation * gradient).sum(dim=1)
    return product.view(product.shape[0], -1, group_size).sum(dim=-1).abs().sum(dim=0)


def channel_products(activation: torch.Tensor, gradient: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the sum of a * dL/da over all positions of each example's channels, [B, C]; ``axis`` holds channels.

    It is dL/d xi of a gate xi at 1 on each channel; the gates of several layers on one channel add up.
    """
    product = (activation * gradient).movedim(axis, 1)
    return product.flatten(2).sum(dim=2) if product.ndim > 2 else product


def most_important(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the ``count`` largest scores in ascending order; ties go to the lower index."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values


def weight_gates(weight: torch.Tensor, gradient: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the sum of w * dL/dw over all weights of each index on ``axis``.

    If the axis holds a layer's inputs, it is dL/d xi of a gate xi at 1 on each of them, as `channel_products` computes
    it from activations. With accumulated gradients it covers everything they were accumulated over (Fang et al. 2023,
    Diff-Pruning, do so over timesteps).
    """
    return (weight * gradient).movedim(axis, 0).flatten(1).sum(1)


def relevant_timesteps(losses: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return a mask of the timesteps whose loss [T] exceeds ``threshold`` times the largest (Fang et al. 2023)."""
    return losses > threshold * losses.max()
