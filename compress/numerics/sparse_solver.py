"""Sparsification of a layer given its inputs: Wanda, and SparseGPT, which refits the remaining weights."""

from __future__ import annotations

import torch

from compress.numerics.gptq import backwards, check_solvable, factorize
from compress.numerics.pruning import largest_of_each
from compress.numerics.sparse_pattern import Pattern

_BLOCK = 128
"""Number of columns among which SparseGPT selects at a time, as in its authors' code."""


def wanda(weight: torch.Tensor, hessian: torch.Tensor, sparsity: float, pattern: Pattern | None = None) -> torch.Tensor:
    """Return ``weight`` [out, in] with zeros where |W_ij| * ||X_j||_2 is least in row i.

    Wanda (Sun et al. 2023, section 3). Each row loses floor(sparsity * in) weights, with ties broken by position.

    Args:
        weight: Weight [out, in].
        hessian: X X^T of the layer's inputs [in, in], times any positive factor; only its diagonal is used.
        sparsity: Share of weights to remove.
        pattern: With N:M, all but the N largest scores of each M are removed.

    Raises:
        ValueError: As `check_solvable`.
    """
    check_solvable(weight, hessian)
    # The diagonal of X X^T holds the squared norms of the inputs.
    scores = weight.abs() * hessian.diagonal().sqrt()
    if pattern is not None:
        return weight * largest_of_each(scores, pattern)
    dropped = scores.argsort(dim=1, stable=True)[:, : int(sparsity * weight.shape[1])]
    return weight.scatter(1, dropped, 0.0)


def sparsegpt(
    weight: torch.Tensor, hessian: torch.Tensor, sparsity: float, pattern: Pattern | None = None, damping: float = 0.01
) -> torch.Tensor:
    """Sparsify ``weight`` by SparseGPT (Frantar and Alistarh 2023, section 3, algorithm 1), one column at a time.

    Among the columns of a block, the weights with the least w^2 / [H^-1]_jj are removed, after earlier errors have been
    compensated. With a ``pattern`` N:M, all but N of every M of a row are removed, selected when their first column is
    reached. Columns whose input was always zero lose their weights.

    Errors and pivots come from the Cholesky factor of H itself, as in `compress.numerics.gptq`: the authors' weight at
    its turn is w_j + sum of e_i L_ij / L_jj over processed columns, and their [H^-1]_jj is 1 / L_jj^2.

    Args:
        weight: Weight [out, in].
        hessian: X X^T of the layer's inputs [in, in], times any positive factor.
        sparsity: Share of weights to remove.
        pattern: N:M pattern, or None.
        damping: Share of the mean diagonal that is added to the diagonal.

    Raises:
        ValueError: As `check_solvable`, and for a Hessian that no damping makes positive definite.
    """
    check_solvable(weight, hessian)
    width = len(hessian)
    live = hessian.diagonal() > 0
    factor, _ = factorize(hessian, damping, backwards(hessian))
    # The factor is scaled to a unit triangle; its diagonal weights the scores.
    pivots = factor.diagonal().clone()
    coupling = factor.div_(pivots)
    columns = (weight * live).T.flip(0)  # The factor is walked from its last column to its first.
    errors = torch.zeros_like(columns)
    # A block must contain whole groups of the pattern.
    step = _BLOCK if pattern is None else max(_BLOCK // pattern.second, 1) * pattern.second
    for end in range(width, 0, -step):
        start = max(end - step, 0)
        original, within = columns[start:end], coupling[start:end, start:end]
        # Contribution of the errors of all processed blocks.
        moved = coupling[end:, start:end].T @ errors[end:]
        removed = torch.zeros_like(moved, dtype=torch.bool)
        # Unstructured: select the weights of the whole block at once.
        if pattern is None:
            removed = _least(_updated(original, moved, within) * pivots[start:end, None], sparsity)
        block_errors = torch.zeros_like(moved)
        for column in reversed(range(end - start)):
            if pattern is not None and (end - start - 1 - column) % pattern.second == 0:
                group = slice(column + 1 - pattern.second, column + 1)
                group_moved = torch.addmm(moved[group], within[column + 1 :, group].T, block_errors[column + 1 :])
                scores = _updated(original[group], group_moved, within[group, group]) * pivots[start:end][group, None]
                removed[group] = ~largest_of_each(scores.flip(0).T.contiguous(), pattern).T.flip(0)
            # Compensate earlier errors, remove the selected weights, and record the new error.
            target = original[column] + torch.addmv(
                moved[column], block_errors[column + 1 :].T, within[column + 1 :, column]
            )
            block_errors[column] = original[column] - target.masked_fill(removed[column], 0.0)
        errors[start:end] = block_errors
    return (columns - errors).flip(0).T.contiguous()


def _updated(original: torch.Tensor, moved: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
    """Return the authors' updated columns [columns, rows] before any of them is processed.

    ``moved`` is the effect of errors outside the block. Columns that stay unchanged from now on have errors too, which
    move one another by ``within``, the factor's triangle divided by its pivots.
    """
    propagated: torch.Tensor = torch.linalg.solve_triangular(within.T, moved, upper=True, unitriangular=True)
    return original + propagated


def _least(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Return True for the share of smallest squares in a block [columns, rows]; the first of equals."""
    flat = scores.square().flatten()
    removed = torch.zeros_like(flat, dtype=torch.bool)
    removed[flat.argsort(stable=True)[: int(sparsity * flat.numel())]] = True
    return removed.view_as(scores)
