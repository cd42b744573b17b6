"""GPTQ: rounding of a weight's columns one by one, with remaining columns compensating each error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from compress.numerics.integer_grid import IntegerGrid, QuantizedWeight, find_grid, round_columns

_BLOCK = 64


_BAND = 4096
_LARGEST_DAMPING = 10.0


@dataclass(frozen=True)
class GptqSettings:
    """Settings of the grid and the solver.

    ``group_size``: consecutive columns that share a scale, or ``None`` for one scale per row. ``act_order``: round the
    columns with the largest diagonal of the Hessian first; scales are determined before rounding and groups stay
    consecutive, so that inference needs no permutation. ``damping``: share of the mean diagonal that is added to the
    diagonal.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = True
    act_order: bool = True
    damping: float = 0.05
    scale_search: bool = True


@dataclass(frozen=True)
class GptqSolution:
    """Quantized weight with the loss of each row: ``losses`` [out] is diag(E H E^T), E = W - Q.

    ``energies`` [out] is diag(W H W^T). ``damping`` is the share of the mean diagonal that was added in the end.
    ``dead_columns`` is the number of inputs that were always zero, whose weights become zero.
    """

    quantized: QuantizedWeight
    losses: torch.Tensor
    energies: torch.Tensor
    damping: float
    dead_columns: int

    @property
    def error(self) -> float:
        """Return the relative squared error of the outputs, tr(E H E^T) / tr(W H W^T)."""
        return float(self.losses.sum()) / max(float(self.energies.sum()), 1e-30)

    def split(self, rows: Sequence[int]) -> list[GptqSolution]:
        """Return the solutions of several stacked layers with these numbers of rows."""
        losses, energies = (torch.split(part, list(rows)) for part in (self.losses, self.energies))
        return [
            replace(self, quantized=part, losses=layer_losses, energies=layer_energies)
            for part, layer_losses, layer_energies in zip(self.quantized.split(rows), losses, energies, strict=True)
        ]


def quantize_gptq(weight: torch.Tensor, hessian: torch.Tensor, settings: GptqSettings) -> GptqSolution:
    """Quantize ``weight`` [out, in] by GPTQ (Frantar et al. 2022, section 3, algorithm 1) under ``hessian`` [in, in].

    The Hessian is X X^T of the layer's inputs, times any positive factor. Rows are independent, so layers that share
    their input can be stacked (`GptqSolution.split`).

    The Cholesky factor of H itself is used in place of an inverse. With H = L L^T the error is the sum over j of (sum
    over i >= j of e_i L_ij)^2. Going from the last column to the first, column j is therefore best rounded at w_j + sum
    over i > j of e_i L_ij / L_jj. These are GPTQ's own updated weights (Chen et al. 2025 show that it is Babai's
    nearest plane algorithm).

    Raises:
        ValueError: For shapes that do not match, values that are not finite, a Hessian of zeros, and a Hessian that no
            damping makes positive definite.
    """
    check_solvable(weight, hessian)
    # The factorization depends on the inputs only and serves all rows.
    diagonal = hessian.diagonal()
    live, mean = diagonal > 0, mean_energy(hessian)
    # Inputs that are always zero get the mean energy, so that their order is arbitrary.
    alone = torch.where(live, diagonal, mean)
    # Ascending energy: the factor is walked backwards, so the largest is rounded first.
    places = alone.argsort(stable=True) if settings.act_order else backwards(hessian)
    factor, damping = factorize(hessian, settings.damping, places)
    pivots = factor.diagonal().clone()
    # Columns weigh in the search of scales by the geometric mean of H_ii, the cost of an error that nothing
    # compensates, and L_ii^2, that of one that all later columns do; it measured better than either.
    importance = alone.sqrt()
    importance[places] *= pivots
    coupling, shift = factor.div_(pivots), damping * float(mean)
    # Bands of rows bound the memory of the solver.
    bands: list[GptqSolution] = []
    for band in torch.split(weight, _BAND):
        columns = band.T.clone(memory_format=torch.contiguous_format)
        # Weights of inputs that are always zero have no effect.
        columns[~live] = 0
        grid = _find_grid(columns, settings, importance)
        ordered = columns[places]
        del columns
        # Energies are diag(W L L^T W^T) [rows], computed in blocks of the factor, less the share of the damping.
        total = torch.zeros(ordered.shape[1], device=ordered.device)
        for start in range(0, len(ordered), _BLOCK):
            end = min(start + _BLOCK, len(ordered))
            total.addmv_((coupling[start:, start:end].T @ ordered[start:]).square_().T, pivots[start:end] ** 2)
        energies = total.sub_(ordered.square().sum(0), alpha=shift)
        integers, losses = _round_in_turn(ordered, places, coupling, pivots, grid)
        # The columns return to their original order.
        errors, integers = _put_back(ordered, places), _put_back(integers, places)
        del ordered
        losses.sub_(errors.square().sum(0), alpha=shift).clamp_(min=0)
        bands.append(GptqSolution(grid.weight(integers), losses, energies, damping, int((~live).sum())))
    return replace(
        bands[0],
        quantized=_stack([band.quantized for band in bands]),
        losses=torch.cat([band.losses for band in bands]),
        energies=torch.cat([band.energies for band in bands]),
    )


def round_to_nearest(
    weight: torch.Tensor, settings: GptqSettings, importance: torch.Tensor | None = None
) -> QuantizedWeight:
    """Round each weight of [out, in] to the nearest point of the grid that GPTQ would use.

    ``importance`` [in] is the mean square of each input, or the Hessian's diagonal; without it all columns count
    equally. Raises `ValueError` for weights that are not finite.
    """
    if not _finite(weight):
        raise ValueError("the weight holds values that are not finite")
    bands = []
    for band in torch.split(weight, _BAND):
        # Grids are computed on contiguous columns.
        columns = band.T.contiguous()
        grid = _find_grid(columns, settings, importance)
        bands.append(grid.weight(round_columns(columns, grid)))
    return _stack(bands)


def output_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return tr(E H E^T) / tr(W H W^T) of two weights [out, in], E = W - Q: the relative squared output error."""
    # The tiny constant avoids a division by zero for a layer of zeros.
    return output_energy(weight - quantized, hessian) / max(output_energy(weight, hessian), 1e-30)


def output_energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return tr(W H W^T) of a weight [out, in]: the squared norm of its outputs."""
    return float((weight @ hessian).mul_(weight).sum())


def _stack(bands: list[QuantizedWeight]) -> QuantizedWeight:
    return replace(
        bands[0],
        integers=torch.cat([band.integers for band in bands]),
        scales=torch.cat([band.scales for band in bands]),
        zero_points=torch.cat([band.zero_points for band in bands]),
    )


def _find_grid(columns: torch.Tensor, settings: GptqSettings, importance: torch.Tensor | None) -> IntegerGrid:
    return find_grid(columns, settings.bits, settings.group_size, settings.symmetric, importance, settings.scale_search)


def check_solvable(weight: torch.Tensor, hessian: torch.Tensor) -> None:
    """Raise `ValueError` for a weight [out, in] and a Hessian [in, in] that no solver can use."""
    if weight.ndim != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"a weight {tuple(weight.shape)} needs a square Hessian, found {tuple(hessian.shape)}")
    if not _finite(weight):
        raise ValueError("the weight holds values that are not finite")
    if not _finite(hessian):
        raise ValueError("the Hessian holds values that are not finite: some calibration activations were NaN or Inf")
    # A sum of squares has no negative diagonal.
    if float(hessian.diagonal().min()) < 0:
        raise ValueError("the Hessian has a negative diagonal, so it is not a sum of squares")
    if float(hessian.diagonal().max()) == 0:
        raise ValueError("the Hessian is zero: no calibration activation reached this layer")


def _finite(values: torch.Tensor) -> bool:
    """Return True if all values are finite; a finite sum proves it without a mask."""
    # Only an infinite sum needs the elementwise check.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def mean_energy(hessian: torch.Tensor) -> torch.Tensor:
    """Return the mean of the Hessian's diagonal over inputs that are not always zero; 1 if all are."""
    diagonal = hessian.diagonal()
    live = diagonal > 0
    return diagonal[live].mean() if bool(live.any()) else diagonal.new_ones(())


def backwards(hessian: torch.Tensor) -> torch.Tensor:
    """Return the indices of the inputs in reverse order."""
    return torch.arange(len(hessian), device=hessian.device).flip(0)


def factorize(hessian: torch.Tensor, damping: float, places: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
    """Return L of H + damping * `mean_energy`, with rows and columns in the order of ``places``, and the damping.

    The damping grows tenfold after each failure. An input that is always zero is decoupled from all others.

    Args:
        hessian: Hessian [in, in].
        damping: Initial share of the mean diagonal.
        places: Order of rows and columns; by default unchanged.

    Raises:
        ValueError: If no damping makes the Hessian positive definite.
    """
    mean = mean_energy(hessian)
    if places is None:
        places = torch.arange(len(hessian), device=hessian.device)
    dead = hessian.diagonal()[places] == 0
    while True:
        # H[places, places] by blocks of rows, without a third matrix of its size.
        permuted = torch.empty_like(hessian)
        for start in range(0, len(places), _BLOCK):
            rows = places[start : start + _BLOCK]
            permuted[start : start + len(rows)] = hessian[rows][:, places]
        # LAPACK's order of the numbers, in which the factor takes the matrix's own place.
        matrix = permuted.mT
        matrix.diagonal().add_(mean * damping)
        # A dead input keeps the matrix positive definite and changes nothing else.
        matrix.diagonal()[dead] = mean
        failed = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
        if not int(failed) and bool(torch.isfinite(matrix.diagonal()).all()):
            return matrix, damping
        del matrix, permuted
        # Stop before the damping outweighs the data.
        if damping >= _LARGEST_DAMPING:
            raise ValueError(f"no damping up to {damping:g} makes the Hessian positive definite")
        damping = min(max(damping * 10, 1e-4), _LARGEST_DAMPING)


def _put_back(ordered: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    columns = torch.empty_like(ordered)
    columns[places] = ordered
    return columns


def _round_in_turn(
    columns: torch.Tensor, places: torch.Tensor, coupling: torch.Tensor, pivots: torch.Tensor, grid: IntegerGrid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``columns`` [in, rows] in place from the last to the first; they become the errors W - Q.

    Args:
        columns: Weights in the order of the factor, so that those rounded first come last.
        places: Indices of the columns in that order.
        coupling: L / diag(L) of the Hessian in that order.
        pivots: diag(L).
        grid: Scales and zero points.

    Returns:
        The integers and diag(E L L^T E^T) [rows].
    """
    groups = (places // grid.group_size).tolist()
    scales = grid.scales.unbind()
    points = [(scales[group], *grid.bounds(group)) for group in range(len(scales))]
    integers = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    losses = torch.zeros(columns.shape[1], device=columns.device)
    for end in range(len(columns), 0, -_BLOCK):
        start = max(end - _BLOCK, 0)
        original = columns[start:end]
        # Add the errors of all later blocks at once; those of the same block follow column by column.
        targets = torch.addmm(original, coupling[end:, start:end].T, columns[end:])
        block_points = [points[group] for group in groups[start:end]]
        steps, errors = _round_block(targets, original, coupling[start:end, start:end], block_points)
        # A target's distance to its grid point, against an error's, which counts from the original weight.
        distances = targets.sub_(original).add_(errors)
        losses.addmv_(distances.square_().T, pivots[start:end].square())
        integers[start:end] = steps.add_(grid.zero_points[groups[start:end]])
        columns[start:end] = errors
    return integers, losses


def _round_block(
    targets: torch.Tensor,
    original: torch.Tensor,
    coupling: torch.Tensor,
    points: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return steps and errors of one block; ``targets`` get the errors of the block's own columns in place.

    A column is a few thousand numbers: calls and slices cost more than arithmetic. Errors of columns that are not
    rounded yet are zeros and are added with the rest.

    Args:
        targets: Weights plus the errors of later blocks [columns, rows].
        original: Original weights [columns, rows].
        coupling: L / diag(L) of the block's columns.
        points: Scale, smallest and largest step [rows] of each column.
    """
    steps, errors = torch.empty_like(targets), torch.zeros_like(targets)
    past, shares = errors.T, coupling.tril(-1).T.contiguous().unbind()
    columns = list(zip(targets, steps, errors, original, shares, points, strict=True))
    # Walk the columns from the last to the first.
    for target, step, error, weight, share, (scale, least, largest) in reversed(columns):
        target.addmv_(past, share)
        torch.div(target, scale, out=step).round_().clamp_(least, largest)
        torch.addcmul(weight, step, scale, value=-1, out=error)
    return steps, errors
