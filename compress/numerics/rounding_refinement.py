"""Better integers and scales for a weight that is quantized already: coordinate descent on the error of its outputs."""

from __future__ import annotations

import torch

from compress.numerics.integer_grid import IntegerGrid, as_float16

_BLOCK = 64


def refine_columns(
    errors: torch.Tensor, integers: torch.Tensor, grid: IntegerGrid, hessian: torch.Tensor, shift: float, sweeps: int
) -> torch.Tensor:
    """Change ``errors`` and ``integers`` [columns, rows] and the scales of ``grid`` in place; no step raises the error.

    For each group in turn, first its scale is set to the minimum of the parabola that the error is in it, then each of
    its columns moves to the grid point nearest to the minimum along that column (QuantEase, Behdin et al. 2023, section
    3). Returns by how much diag(E (H + shift) E^T) [rows] fell.
    """
    gained = torch.zeros(errors.shape[1], device=errors.device)
    for _ in range(sweeps):
        for group, start, end in grid.groups(len(errors)):
            here = slice(start, end)
            local = hessian[here, here].clone()
            local.diagonal().add_(shift)
            gradient = (hessian[here] @ errors).add_(errors[here], alpha=shift)
            steps = integers[here] - grid.zero_points[group]
            change = _refit_scale(steps, gradient, local, grid.scales[group])
            before, gradient = gradient, gradient + local @ change
            change += _descend(steps, gradient, local, grid.scales[group], grid.bounds(group))
            gained -= (change * before.mul_(2).add_(local @ change)).sum(0)
            errors[here] += change
            integers[here] = (steps + grid.zero_points[group]).to(torch.uint8)
    return gained


def _refit_scale(
    steps: torch.Tensor, gradient: torch.Tensor, local: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """Set ``scales`` [rows] in place to the best of their group; returns the change of the errors [size, rows].

    With errors e - d n for a change d of the scale, the error is least at d = (n H e) / (n H n).
    """
    curvature = (local @ steps).mul_(steps).sum(0)
    wanted = scales + (steps * gradient).sum(0) / curvature.clamp(min=1e-30)
    wanted = torch.where((curvature > 0) & (wanted * scales > 0), wanted, scales)
    stored = as_float16(wanted)
    nearer = (stored - wanted).abs() < (scales - wanted).abs()
    refit = torch.where(nearer, stored, scales)
    change = steps * (scales - refit)
    scales.copy_(refit)
    return change


def _descend(
    steps: torch.Tensor,
    gradient: torch.Tensor,
    local: torch.Tensor,
    scales: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Move ``steps`` [size, rows] of one group in place, column by column; returns the change of the errors.

    ``gradient`` is H E at the start, and is spoiled.
    """
    change = torch.empty_like(steps)
    # Division by the pivot and by the scale in one: how many steps the minimum lies away.
    inverse_pivots = (1 / local.diagonal().clamp(min=1e-30)).tolist()
    moved = torch.empty_like(scales)
    for start in range(0, len(steps), _BLOCK):
        end = min(start + _BLOCK, len(steps))
        if start:
            gradient[start:end].addmm_(local[start:end, :start], change[:start])
        for column in range(start, end):
            slope, step = gradient[column], steps[column]
            if column > start:
                slope.addmv_(change[start:column].T, local[start:column, column])
            torch.div(slope, scales, out=moved).mul_(inverse_pivots[column]).add_(step).round_().clamp_(*bounds)
            torch.sub(step, moved, out=change[column]).mul_(scales)
            step.copy_(moved)
    return change
