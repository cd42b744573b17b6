"""Structured removal of groups of a layer's inputs with compensation: the optimal brain surgeon on groups."""

from __future__ import annotations

import torch

from compress.numerics.gptq import check_solvable, factorize

_ROUNDS = 128
"""Maximum number of removal rounds; with more parts to remove, several are removed per round."""


def remove_parts(
    weight: torch.Tensor, hessian: torch.Tensor, size: int, count: int, damping: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove groups of a layer's inputs and refit the others.

    Parts are removed one by one, each time the one whose loss tr(W_S [H^-1]_SS^-1 W_S^T) is least after all others
    have compensated it (Hassibi and Stork 1993; for groups Kurtic et al. 2023, ZipLM, section 3.1). The remaining
    weights are the least squares fit to the full layer: W_K + W_R H_RK H_KK^-1.

    Args:
        weight: Weight [out, in].
        hessian: X X^T of the inputs [in, in], times any positive factor.
        size: Consecutive inputs of a part.
        count: Number of parts to keep.
        damping: Share of the mean diagonal that is added to the diagonal.

    Returns:
        The kept parts in ascending order, and the weight [out, in] with zeros elsewhere.

    Raises:
        ValueError: As `check_solvable`, and for a Hessian that no damping makes positive definite.
    """
    check_solvable(weight, hessian)
    weight = weight * (hessian.diagonal() > 0)  # what never comes in is never missed
    kept_parts = _chosen(weight, hessian, size, count, damping)
    columns = _columns(kept_parts, size)
    removed = torch.ones(len(hessian), dtype=torch.bool, device=weight.device)
    removed[columns] = False
    # Least squares fit of the kept inputs to the outputs of all inputs.
    factor, _ = factorize(hessian[columns][:, columns], damping)
    compensation = torch.cholesky_solve(hessian[columns][:, removed] @ weight[:, removed].T, factor)
    fitted = torch.zeros_like(weight)
    fitted[:, columns] = weight[:, columns] + compensation.T
    return kept_parts, fitted


def _columns(parts: torch.Tensor, size: int) -> torch.Tensor:
    return (parts[:, None] * size + torch.arange(size, device=parts.device)).flatten()


def _chosen(weight: torch.Tensor, hessian: torch.Tensor, size: int, count: int, damping: float) -> torch.Tensor:
    """Return the parts to keep, in ascending order.

    Args:
        weight: Weight [out, in].
        hessian: Hessian [in, in].
        size: Consecutive inputs of a part.
        count: Number of parts to keep.
        damping: Share of the mean diagonal that is added to the diagonal.
    """
    parts = weight.shape[1] // size
    # The inverse Hessian is updated as parts are removed.
    inverse = torch.cholesky_inverse(factorize(hessian, damping)[0])
    weight = weight.clone()
    remaining = torch.ones(parts, dtype=torch.bool, device=weight.device)
    per_round = max(1, -(-(parts - count) // _ROUNDS))
    for to_remove in range(parts - count, 0, -per_round):
        losses = _losses(weight, inverse, size).masked_fill(~remaining, torch.inf)
        removed = losses.argsort(stable=True)[: min(per_round, to_remove)]
        columns = _columns(removed, size)
        # What goes is solved out of the others, in their place.
        shares = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        weight.addmm_(weight[:, columns], shares, alpha=-1)
        inverse.addmm_(inverse[:, columns], shares, alpha=-1)
        weight[:, columns] = 0
        inverse[columns] = 0
        inverse[:, columns] = 0
        # Keeps blocks of removed parts invertible; their losses are masked.
        inverse.diagonal()[columns] = 1
        remaining[removed] = False
    return remaining.nonzero()[:, 0]


def _losses(weight: torch.Tensor, inverse: torch.Tensor, size: int) -> torch.Tensor:
    """Return the loss of each part after all others compensate it, [parts]."""
    parts = weight.shape[1] // size
    if size == 1:
        return weight.square().sum(dim=0) / inverse.diagonal()
    # Diagonal blocks of the inverse, one per part.
    blocks = inverse.view(parts, size, parts, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    grouped = weight.view(-1, parts, size).movedim(1, 0)
    losses: torch.Tensor = (torch.linalg.solve(blocks, grouped.mT) * grouped.mT).sum(dim=(1, 2))
    return losses
