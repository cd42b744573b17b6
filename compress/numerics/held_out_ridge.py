"""Ridge regression from sums over rows, with the damping that serves rows best that it was not solved on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.numerics.gptq import factorize

_TIMES = (1, 10, 100, 1000)
"""Of the least damping: those that are tried."""


@dataclass
class Sums:
    """Over rows of inputs x and what is wanted of them t: of x x^T [in, in], x t^T [in, out] and the squares of t."""

    inputs: torch.Tensor
    cross: torch.Tensor
    squares: float = 0.0

    @classmethod
    def none(cls, inputs: int, outputs: int, device: str | torch.device) -> Sums:
        """Of no rows."""
        return cls(torch.zeros(inputs, inputs, device=device), torch.zeros(inputs, outputs, device=device))

    def add(self, rows: torch.Tensor, wanted: torch.Tensor) -> None:
        """``rows`` [n, in] and ``wanted`` [n, out]."""
        self.inputs.addmm_(rows.T, rows)
        self.cross.addmm_(rows.T, wanted)
        self.squares += float(wanted.double().square().sum())

    def error(self, solution: torch.Tensor) -> float:
        """The sum over rows of ||t - M^T x||^2, for M [in, out]."""
        moved = (self.inputs @ solution - 2 * self.cross).double()
        return self.squares + float((solution.double() * moved).sum())


def solve(fitted: Sums, held_out: Sums, damping: float) -> tuple[torch.Tensor, float]:
    """M [in, out] of least ||t - M^T x||^2 over the rows of both, and the error that is left of t on ``held_out``.

    That error is one of a solution that has not seen those rows; by it the damping is chosen, among ``damping`` and up
    to a thousand times as much, relative to the mean energy of an input (Hoerl and Kennard 1970). 1 or more says
    that nothing was learned. Raises `ValueError` for sums that no damping makes positive definite.
    """
    errors = {}
    for times in _TIMES:
        chosen = damping * times
        errors[chosen] = held_out.error(_solution(fitted.inputs, fitted.cross, chosen)) / held_out.squares
    best = min(errors, key=errors.__getitem__)
    return _solution(fitted.inputs + held_out.inputs, fitted.cross + held_out.cross, best), errors[best]


def _solution(inputs: torch.Tensor, cross: torch.Tensor, damping: float) -> torch.Tensor:
    factor, _ = factorize(inputs, damping)
    return torch.cholesky_solve(cross, factor)
