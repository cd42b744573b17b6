"""Which weights of a layer become zero given its inputs: Wanda, and SparseGPT, where those that stay make up for it."""

from __future__ import annotations

import torch

from compress.numerics.gptq import backwards, check_solvable, factorize
from compress.numerics.pruning import largest_of_each
from compress.numerics.sparse_pattern import Pattern

_BLOCK = 128
"""Columns among which SparseGPT chooses at a time, as in its authors' code."""


def wanda(weight: torch.Tensor, hessian: torch.Tensor, sparsity: float, pattern: Pattern | None = None) -> torch.Tensor:
    """Wanda (Sun et al. 2023, section 3): ``weight`` [out, in] with zeros where |W_ij| * ||X_j||_2 is least in row i.

    ``hessian`` [in, in] is X X^T of the layer's inputs, times anything positive; only its diagonal counts. Each row
    loses floor(sparsity * in) weights, those of equal scores in the order of position; with a ``pattern`` N:M all but
    the N largest scores of each M. Raises `ValueError` as `check_solvable` does.
    """
    check_solvable(weight, hessian)
    scores = weight.abs() * hessian.diagonal().sqrt()
    if pattern is not None:
        return weight * largest_of_each(scores, pattern)
    dropped = scores.argsort(dim=1, stable=True)[:, : int(sparsity * weight.shape[1])]
    return weight.scatter(1, dropped, 0.0)


def sparsegpt(
    weight: torch.Tensor, hessian: torch.Tensor, sparsity: float, pattern: Pattern | None = None, damping: float = 0.01
) -> torch.Tensor:
    """SparseGPT (Frantar and Alistarh 2023, section 3, algorithm 1): zeros one column at a time, the rest made to fit.

    Among the columns of a block those weights go for which w^2 / [H^-1]_jj is least, once what went before has been
    made up for; with a ``pattern`` N:M all but N of every M of a row, chosen as their first column is reached. Columns
    whose input was always zero lose their weights.

    Errors and pivots are those of the Cholesky factor of H itself, as in `compress.numerics.gptq`: the authors' weight
    at its turn is w_j + sum of e_i L_ij / L_jj over what is done, and their [H^-1]_jj is 1 / L_jj^2.
    Raises `ValueError` as `check_solvable` does, and for a Hessian that no damping makes positive definite.
    """
    check_solvable(weight, hessian)
    width = len(hessian)
    live = hessian.diagonal() > 0
    factor, _ = factorize(hessian, damping, backwards(hessian))
    pivots = factor.diagonal().clone()
    coupling = factor.div_(pivots)
    columns = (weight * live).T.flip(0)  # The factor is walked from its last column to its first.
    errors = torch.zeros_like(columns)
    step = _BLOCK if pattern is None else max(_BLOCK // pattern.second, 1) * pattern.second
    for end in range(width, 0, -step):
        start = max(end - step, 0)
        original, within = columns[start:end], coupling[start:end, start:end]
        moved = coupling[end:, start:end].T @ errors[end:]
        gone = torch.zeros_like(moved, dtype=torch.bool)
        if pattern is None:
            gone = _least(_updated(original, moved, within) * pivots[start:end, None], sparsity)
        done = torch.zeros_like(moved)
        for place in reversed(range(end - start)):
            if pattern is not None and (end - start - 1 - place) % pattern.second == 0:
                some = slice(place + 1 - pattern.second, place + 1)
                further = torch.addmm(moved[some], within[place + 1 :, some].T, done[place + 1 :])
                scores = _updated(original[some], further, within[some, some]) * pivots[start:end][some, None]
                gone[some] = ~largest_of_each(scores.flip(0).T.contiguous(), pattern).T.flip(0)
            target = original[place] + torch.addmv(moved[place], done[place + 1 :].T, within[place + 1 :, place])
            done[place] = original[place] - target.masked_fill(gone[place], 0.0)
        errors[start:end] = done
    return (columns - errors).flip(0).T.contiguous()


def _updated(original: torch.Tensor, moved: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
    """What the authors' columns [columns, rows] are before any of them is looked at.

    ``moved``: what the errors outside add to each of them; those that stay as they are then have errors too, and move
    one another by ``within``, the factor's triangle over its pivots.
    """
    further: torch.Tensor = torch.linalg.solve_triangular(within.T, moved, upper=True, unitriangular=True)
    return original + further


def _least(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """True for the share of smallest squares of a block [columns, rows]; of equals the first."""
    flat = scores.square().flatten()
    gone = torch.zeros_like(flat, dtype=torch.bool)
    gone[flat.argsort(stable=True)[: int(sparsity * flat.numel())]] = True
    return gone.view_as(scores)
