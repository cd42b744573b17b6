"""GPTQ: round a weight's columns one by one, and let the columns still to come make up for each error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from compress.numerics.integer_grid import IntegerGrid, QuantizedWeight, find_grid, round_columns
from compress.numerics.rounding_refinement import refine_columns

_BLOCK = 64
_BAND = 4096
_LARGEST_DAMPING = 10.0


@dataclass(frozen=True)
class GptqSettings:
    """What the grid is, and how the solver goes about it.

    ``group_size``: neighbouring columns that share a scale, or ``None`` for one scale a row. ``act_order``: round the
    columns with the largest diagonal of the Hessian first; scales are found before any column is rounded and groups are
    of neighbouring columns all the same, so that inference needs no permutation. ``damping``: the share of the mean
    diagonal that is added to the diagonal. ``refinement_sweeps``: passes of coordinate descent over integers and scales
    after the rounding.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = True
    act_order: bool = True
    damping: float = 0.05
    scale_search: bool = True
    refinement_sweeps: int = 0


@dataclass(frozen=True)
class GptqSolution:
    """A quantized weight, with what each of its rows lost: ``losses`` [out] is diag(E H E^T), E = W - Q.

    ``energies`` [out] is diag(W H W^T). ``damping`` is the share of the mean diagonal that was really added;
    ``dead_columns`` counts the inputs that were always zero, whose weights are set to zero.
    """

    quantized: QuantizedWeight
    losses: torch.Tensor
    energies: torch.Tensor
    damping: float
    dead_columns: int

    @property
    def error(self) -> float:
        """The relative squared error of the outputs, tr(E H E^T) / tr(W H W^T)."""
        return float(self.losses.sum()) / max(float(self.energies.sum()), 1e-30)

    def split(self, rows: Sequence[int]) -> list[GptqSolution]:
        """That of each of several layers that were stacked, of so many rows."""
        losses, energies = (torch.split(part, list(rows)) for part in (self.losses, self.energies))
        return [
            replace(self, quantized=part, losses=lost, energies=whole)
            for part, lost, whole in zip(self.quantized.split(rows), losses, energies, strict=True)
        ]


def quantize_gptq(weight: torch.Tensor, hessian: torch.Tensor, settings: GptqSettings) -> GptqSolution:
    """GPTQ (Frantar et al. 2022, section 3, algorithm 1) of ``weight`` [out, in] under ``hessian`` [in, in].

    The Hessian is X X^T of the layer's inputs, times anything positive. Rows don't touch each other, so layers that
    share their input can be stacked (`GptqSolution.split`).

    Instead of an inverse, the Cholesky factor of H itself is used. With H = L L^T the error is the sum over j of (sum
    over i >= j of e_i L_ij)^2, so that, going from the last column to the first, column j is best rounded at w_j + sum
    over i > j of e_i L_ij / L_jj. These are GPTQ's own updated weights (Chen et al. 2025 show it to be Babai's nearest
    plane).

    Raises `ValueError` for shapes that don't fit, values that aren't finite, a Hessian of zeros, and a Hessian that no
    damping makes positive definite.
    """
    check_solvable(weight, hessian)
    inputs = _prepare(hessian, settings)
    bands = [_solve(band, inputs, settings) for band in torch.split(weight, _BAND)]
    return replace(
        bands[0],
        quantized=_stack([band.quantized for band in bands]),
        losses=torch.cat([band.losses for band in bands]),
        energies=torch.cat([band.energies for band in bands]),
    )


def round_to_nearest(
    weight: torch.Tensor, settings: GptqSettings, importance: torch.Tensor | None = None
) -> QuantizedWeight:
    """Each weight of [out, in] to the nearest point of the grid that GPTQ would use.

    ``importance`` [in] is the mean square of each input, or the Hessian's diagonal; without it all columns count the
    same. Raises `ValueError` for weights that aren't finite.
    """
    if not _finite(weight):
        raise ValueError("the weight holds values that are not finite")
    bands = []
    for band in torch.split(weight, _BAND):
        columns = band.T.contiguous()
        grid = _find_grid(columns, settings, importance)
        bands.append(grid.weight(round_columns(columns, grid)))
    return _stack(bands)


def output_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) of two weights [out, in], E = W - Q: the relative squared error of the outputs."""
    return output_energy(weight - quantized, hessian) / max(output_energy(weight, hessian), 1e-30)


def output_energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(W H W^T) of a weight [out, in]: the squared norm of its outputs."""
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
    """Raise `ValueError` for a weight [out, in] and a Hessian [in, in] that no solver can go by."""
    if weight.ndim != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"a weight {tuple(weight.shape)} needs a square Hessian, found {tuple(hessian.shape)}")
    if not _finite(weight):
        raise ValueError("the weight holds values that are not finite")
    if not _finite(hessian):
        raise ValueError("the Hessian holds values that are not finite: some calibration activations were NaN or Inf")
    if float(hessian.diagonal().min()) < 0:
        raise ValueError("the Hessian has a negative diagonal, so it is not a sum of squares")
    if float(hessian.diagonal().max()) == 0:
        raise ValueError("the Hessian is zero: no calibration activation reached this layer")


def _finite(values: torch.Tensor) -> bool:
    """A sum of finite numbers may overflow, but one that is finite has only finite parts; it needs no mask."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


@dataclass(frozen=True)
class _Inputs:
    """What is known of a layer's inputs, made once for all of its rows.

    ``importance`` weights the columns for the search of scales. An error costs H_ii where nothing makes up for it, and
    L_ii^2 where all later columns do; the geometric mean of the two was measured to be better than either.
    ``places``: the columns in the order of the factor, which is walked from its last to its first, so that what is
    rounded first is last. ``coupling`` is L / diag(L) and ``pivots`` diag(L), of the Hessian in that order with
    ``shift`` added to its diagonal.
    """

    hessian: torch.Tensor
    live: torch.Tensor
    importance: torch.Tensor
    places: torch.Tensor
    coupling: torch.Tensor
    pivots: torch.Tensor
    shift: float
    damping: float


def _prepare(hessian: torch.Tensor, settings: GptqSettings) -> _Inputs:
    diagonal = hessian.diagonal()
    live, mean = diagonal > 0, mean_energy(hessian)
    alone = torch.where(live, diagonal, mean)
    places = alone.argsort(stable=True) if settings.act_order else backwards(hessian)
    factor, damping = factorize(hessian, settings.damping, places)
    pivots = factor.diagonal().clone()
    importance = alone.sqrt()
    importance[places] *= pivots
    return _Inputs(hessian, live, importance, places, factor.div_(pivots), pivots, damping * float(mean), damping)


def mean_energy(hessian: torch.Tensor) -> torch.Tensor:
    """The mean of the diagonal of those inputs that are not always zero; 1 where all are."""
    diagonal = hessian.diagonal()
    live = diagonal > 0
    return diagonal[live].mean() if bool(live.any()) else diagonal.new_ones(())


def backwards(hessian: torch.Tensor) -> torch.Tensor:
    """The places of the inputs, the last one first."""
    return torch.arange(len(hessian), device=hessian.device).flip(0)


def factorize(hessian: torch.Tensor, damping: float, places: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
    """L of H + damping * `mean_energy`, rows and columns in the order of ``places``, and the damping.

    That is ten times as much for each failure. An input that is always zero stands apart from all others.
    """
    mean = mean_energy(hessian)
    if places is None:
        places = torch.arange(len(hessian), device=hessian.device)
    dead = hessian.diagonal()[places] == 0
    while True:
        # LAPACK's order of the numbers, in which the factor takes the matrix's own place.
        matrix = _permuted(hessian, places).mT
        matrix.diagonal().add_(mean * damping)
        matrix.diagonal()[dead] = mean
        failed = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
        if not int(failed) and bool(torch.isfinite(matrix.diagonal()).all()):
            return matrix, damping
        del matrix
        if damping >= _LARGEST_DAMPING:
            raise ValueError(f"no damping up to {damping:g} makes the Hessian positive definite")
        damping = min(max(damping * 10, 1e-4), _LARGEST_DAMPING)


def _permuted(hessian: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """H[places, places] without a third matrix of its size."""
    matrix = torch.empty_like(hessian)
    for start in range(0, len(places), _BLOCK):
        rows = places[start : start + _BLOCK]
        matrix[start : start + len(rows)] = hessian[rows][:, places]
    return matrix


def _solve(weight: torch.Tensor, inputs: _Inputs, settings: GptqSettings) -> GptqSolution:
    columns = weight.T.clone(memory_format=torch.contiguous_format)
    columns[~inputs.live] = 0
    grid = _find_grid(columns, settings, inputs.importance)
    ordered = columns[inputs.places]
    del columns
    energies = _energies(ordered, inputs).sub_(ordered.square().sum(0), alpha=inputs.shift)
    integers, losses = _round_in_turn(ordered, inputs, grid)
    errors, integers = _put_back(ordered, inputs.places), _put_back(integers, inputs.places)
    del ordered
    losses -= refine_columns(errors, integers, grid, inputs.hessian, inputs.shift, settings.refinement_sweeps)
    losses.sub_(errors.square().sum(0), alpha=inputs.shift).clamp_(min=0)
    return GptqSolution(grid.weight(integers), losses, energies, inputs.damping, int((~inputs.live).sum()))


def _put_back(ordered: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    columns = torch.empty_like(ordered)
    columns[places] = ordered
    return columns


def _energies(columns: torch.Tensor, inputs: _Inputs) -> torch.Tensor:
    """diag(W L L^T W^T) [rows] of ``columns`` = W^T in the factor's order."""
    total = torch.zeros(columns.shape[1], device=columns.device)
    for start in range(0, len(columns), _BLOCK):
        end = min(start + _BLOCK, len(columns))
        total.addmv_(
            (inputs.coupling[start:, start:end].T @ columns[start:]).square_().T, inputs.pivots[start:end] ** 2
        )
    return total


def _round_in_turn(columns: torch.Tensor, inputs: _Inputs, grid: IntegerGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``columns`` [in, rows] in place from the last to the first; they become the errors W - Q.

    Returns the integers and diag(E L L^T E^T) [rows].
    """
    coupling, pivots = inputs.coupling, inputs.pivots
    groups = (inputs.places // grid.group_size).tolist()
    scales = grid.scales.unbind()
    points = [(scales[group], *grid.bounds(group)) for group in range(len(scales))]
    integers = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    losses = torch.zeros(columns.shape[1], device=columns.device)
    for end in range(len(columns), 0, -_BLOCK):
        start = max(end - _BLOCK, 0)
        original = columns[start:end]
        targets = torch.addmm(original, coupling[end:, start:end].T, columns[end:])
        here = [points[group] for group in groups[start:end]]
        steps, errors = _round_block(targets, original, coupling[start:end, start:end], here)
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
    """Steps and errors of one block; ``targets`` lack only what the block's own errors add, and get it in place.

    ``points``: the scale, the least and the largest step [rows] of each column. A column is a few thousand numbers:
    calls cost more than arithmetic, and so do slices. Errors that are still to come are zeros, added with the rest.
    """
    steps, errors = torch.empty_like(targets), torch.zeros_like(targets)
    past, shares = errors.T, coupling.tril(-1).T.contiguous().unbind()
    columns = list(zip(targets, steps, errors, original, shares, points, strict=True))
    for target, step, error, weight, share, (scale, least, largest) in reversed(columns):
        target.addmv_(past, share)
        torch.div(target, scale, out=step).round_().clamp_(least, largest)
        torch.addcmul(weight, step, scale, value=-1, out=error)
    return steps, errors
