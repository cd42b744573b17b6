"""Which parts of a layer's inputs go, so that the others can make up for them: the optimal brain surgeon on groups."""

from __future__ import annotations

import torch

from compress.numerics.gptq import check_solvable, factorize

_ROUNDS = 128
"""More parts than that go several at a time."""


def remove_parts(
    weight: torch.Tensor, hessian: torch.Tensor, size: int, count: int, damping: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` parts of ``size`` neighbouring inputs that stay, ascending, and ``weight`` [out, in] with zeros
    elsewhere.

    Parts go one after the other, each the one whose loss tr(W_S [H^-1]_SS^-1 W_S^T) is least once all others have made
    up for it (Hassibi and Stork 1993; of groups Kurtic et al. 2023, ZipLM, section 3.1). The weights that stay are the
    least squares fit to what the whole layer gives: W_K + W_R H_RK H_KK^-1. ``hessian`` [in, in] is X X^T of the
    inputs, times anything positive; ``damping`` is the share of its mean diagonal that is added there.

    Raises `ValueError` as `check_solvable` does, and for a Hessian that no damping makes positive definite.
    """
    check_solvable(weight, hessian)
    weight = weight * (hessian.diagonal() > 0)  # what never comes in is never missed
    stays = _chosen(weight, hessian, size, count, damping)
    columns = _columns(stays, size)
    gone = torch.ones(len(hessian), dtype=torch.bool, device=weight.device)
    gone[columns] = False
    factor, _ = factorize(hessian[columns][:, columns], damping)
    moved = torch.cholesky_solve(hessian[columns][:, gone] @ weight[:, gone].T, factor)
    fitted = torch.zeros_like(weight)
    fitted[:, columns] = weight[:, columns] + moved.T
    return stays, fitted


def _columns(parts: torch.Tensor, size: int) -> torch.Tensor:
    return (parts[:, None] * size + torch.arange(size, device=parts.device)).flatten()


def _chosen(weight: torch.Tensor, hessian: torch.Tensor, size: int, count: int, damping: float) -> torch.Tensor:
    parts = weight.shape[1] // size
    inverse = torch.cholesky_inverse(factorize(hessian, damping)[0])
    weight = weight.clone()
    left = torch.ones(parts, dtype=torch.bool, device=weight.device)
    each = max(1, -(-(parts - count) // _ROUNDS))
    for going in range(parts - count, 0, -each):
        losses = _losses(weight, inverse, size).masked_fill(~left, torch.inf)
        some = losses.argsort(stable=True)[: min(each, going)]
        columns = _columns(some, size)
        # What goes is solved out of the others, in their place.
        shares = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        weight.addmm_(weight[:, columns], shares, alpha=-1)
        inverse.addmm_(inverse[:, columns], shares, alpha=-1)
        weight[:, columns] = 0
        inverse[columns] = 0
        inverse[:, columns] = 0
        inverse.diagonal()[columns] = 1
        left[some] = False
    return left.nonzero()[:, 0]


def _losses(weight: torch.Tensor, inverse: torch.Tensor, size: int) -> torch.Tensor:
    """What the outputs lose without each part, all others made to fit, [parts]."""
    parts = weight.shape[1] // size
    if size == 1:
        return weight.square().sum(dim=0) / inverse.diagonal()
    blocks = inverse.view(parts, size, parts, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    grouped = weight.view(-1, parts, size).movedim(1, 0)
    losses: torch.Tensor = (torch.linalg.solve(blocks, grouped.mT) * grouped.mT).sum(dim=(1, 2))
    return losses
