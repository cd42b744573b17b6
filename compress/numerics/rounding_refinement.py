"""Refinement of a quantized weight: coordinate descent over integers and scales on the output error."""

from __future__ import annotations

import torch

from compress.numerics.integer_grid import IntegerGrid, as_float16

_BLOCK = 64


def refine_columns(
    errors: torch.Tensor, integers: torch.Tensor, grid: IntegerGrid, hessian: torch.Tensor, shift: float, sweeps: int
) -> torch.Tensor:
    """Change ``errors``, ``integers`` and the scales of ``grid`` in place so that no step raises the error.

    For each group in turn, its scale is set to the minimum of the error, which is a parabola in the scale. Then each of
    its columns moves to the grid point nearest to the minimum along that column (QuantEase, Behdin et al. 2023, section
    3).

    Args:
        errors: W - Q [columns, rows].
        integers: Integers counted from 0 [columns, rows].
        grid: Scales and zero points.
        hessian: Hessian H [columns, columns].
        shift: Value added to the Hessian's diagonal.
        sweeps: Number of passes.

    Returns:
        Decrease of diag(E (H + shift) E^T) [rows].
    """
    gained = torch.zeros(errors.shape[1], device=errors.device)
    for _ in range(sweeps):
        for group, start, end in grid.groups(len(errors)):
            columns = slice(start, end)
            local = hessian[columns, columns].clone()
            local.diagonal().add_(shift)
            # Gradient of the error with respect to the group's errors.
            gradient = (hessian[columns] @ errors).add_(errors[columns], alpha=shift)
            steps = integers[columns] - grid.zero_points[group]
            change = _refit_scale(steps, gradient, local, grid.scales[group])
            old_gradient, gradient = gradient, gradient + local @ change
            change += _descend(steps, gradient, local, grid.scales[group], grid.bounds(group))
            # Exact decrease of the quadratic error.
            gained -= (change * old_gradient.mul_(2).add_(local @ change)).sum(0)
            errors[columns] += change
            integers[columns] = (steps + grid.zero_points[group]).to(torch.uint8)
    return gained


def _refit_scale(
    steps: torch.Tensor, gradient: torch.Tensor, local: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """Set ``scales`` [rows] in place to the best of their group and return the change of the errors [size, rows].

    With errors e - d n for a change d of the scale, the error is least at d = (n H e) / (n H n).

    Args:
        steps: Integers minus zero points [size, rows].
        gradient: H E [size, rows].
        local: Hessian of the group [size, size].
        scales: Scales [rows].
    """
    curvature = (local @ steps).mul_(steps).sum(0)
    optimum = scales + (steps * gradient).sum(0) / curvature.clamp(min=1e-30)
    optimum = torch.where((curvature > 0) & (optimum * scales > 0), optimum, scales)
    stored = as_float16(optimum)
    # Rounding to float16 may move a scale away from the optimum: then the old one stays.
    nearer = (stored - optimum).abs() < (scales - optimum).abs()
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
    """Move ``steps`` of one group in place, column by column, and return the change of the errors [size, rows].

    Args:
        steps: Integers minus zero points [size, rows].
        gradient: H E at the start [size, rows]; overwritten.
        local: Hessian of the group [size, size].
        scales: Scales [rows].
        bounds: Smallest and largest step.
    """
    change = torch.empty_like(steps)
    # Division by the pivot and by the scale in one: how many steps the minimum lies away.
    inverse_pivots = (1 / local.diagonal().clamp(min=1e-30)).tolist()
    targets = torch.empty_like(scales)
    for start in range(0, len(steps), _BLOCK):
        end = min(start + _BLOCK, len(steps))
        # Apply the changes of earlier blocks at once.
        if start:
            gradient[start:end].addmm_(local[start:end, :start], change[:start])
        for column in range(start, end):
            slope, step = gradient[column], steps[column]
            # Apply the changes of earlier columns of this block.
            if column > start:
                slope.addmv_(change[start:column].T, local[start:column, column])
            torch.div(slope, scales, out=targets).mul_(inverse_pivots[column]).add_(step).round_().clamp_(*bounds)
            torch.sub(step, targets, out=change[column]).mul_(scales)
            step.copy_(targets)
    return change
