"""Ridge regression from accumulated sums, with the damping that fits held-out rows best."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.numerics.gptq import factorize

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
