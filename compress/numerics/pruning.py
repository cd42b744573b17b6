"""Importance measures for pruning: magnitudes, first-order importance, and the sparsity schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compress.numerics.gptq import backwards, check_solvable, factorize
from compress.numerics.sparsity_pattern import Pattern


def cubic_sparsity(step: int, steps: int, final: float) -> float:
    """Return the sparsity after ``step`` of ``steps``: s_f - s_f (1 - t)^3 (Zhu and Gupta 2017, equation 1)."""
    progress = min(max(step / steps, 0.0), 1.0)
    return final - final * (1 - progress) ** 3


def magnitude_masks(
    weights: Sequence[torch.Tensor], sparsity: float, pattern: Pattern | None = None
) -> list[torch.Tensor]:
    """Return masks (True: keep) that drop floor(sparsity * numel) of the smallest magnitudes of each tensor.

    Ties are broken by position. With a ``pattern`` N:M, only weights that are not among the N largest of their M are
    dropped, until the sparsity is reached.
    """
    if pattern is None:
        return [_keep_largest(weight.detach().abs().flatten(), sparsity).view_as(weight) for weight in weights]
    masks = []
    for weight in weights:
        # Patterns are defined on matrices; convolutions are reshaped.
        matrix = as_matrix(weight.detach())
        mask = largest_of_each(matrix, pattern)
        if sparsity < pattern.sparsity:
            # The N largest of each M get an infinite rank, so that they are never dropped.
            ranked = torch.where(mask, torch.inf, matrix.abs())
            mask = _keep_largest(ranked.flatten(), sparsity).view_as(matrix)
        masks.append(from_matrix(mask, weight.shape))
    return masks


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


_TIMES = (1, 10, 100, 1000)
"""Multiples of the smallest damping that are tried."""


@dataclass
class RegressionSums:
    """Sums over rows of inputs x and targets t: x x^T [in, in], x t^T [in, out] and the squares of t."""

    inputs: torch.Tensor
    cross: torch.Tensor
    squares: float = 0.0

    @classmethod
    def none(cls, inputs: int, outputs: int, device: str | torch.device) -> RegressionSums:
        """Return the sums of no rows."""
        return cls(torch.zeros(inputs, inputs, device=device), torch.zeros(inputs, outputs, device=device))

    def add(self, rows: torch.Tensor, wanted: torch.Tensor) -> None:
        """Add ``rows`` [n, in] with targets ``wanted`` [n, out]."""
        self.inputs.addmm_(rows.T, rows)
        self.cross.addmm_(rows.T, wanted)
        self.squares += float(wanted.double().square().sum())

    def error(self, solution: torch.Tensor) -> float:
        """Return the sum over rows of ||t - M^T x||^2 for M [in, out]."""
        moved = (self.inputs @ solution - 2 * self.cross).double()
        return self.squares + float((solution.double() * moved).sum())


def solve(fitted: RegressionSums, held_out: RegressionSums, damping: float) -> tuple[torch.Tensor, float]:
    """Return M [in, out] that minimises ||t - M^T x||^2 over both row sets, and the relative error on ``held_out``.

    The error belongs to a solution without those rows. It selects the damping, between ``damping`` and a thousand times
    as much, relative to the mean energy of an input (Hoerl and Kennard 1970). An error of 1 or more means that nothing
    was learned. Raises `ValueError` for sums that no damping makes positive definite.
    """
    errors = {}
    # Select the damping on held-out rows.
    for times in _TIMES:
        chosen = damping * times
        errors[chosen] = held_out.error(_solution(fitted.inputs, fitted.cross, chosen)) / held_out.squares
    best = min(errors, key=errors.__getitem__)
    # The final solution uses all rows.
    return _solution(fitted.inputs + held_out.inputs, fitted.cross + held_out.cross, best), errors[best]


def _solution(inputs: torch.Tensor, cross: torch.Tensor, damping: float) -> torch.Tensor:
    factor, _ = factorize(inputs, damping)
    return torch.cholesky_solve(cross, factor)
