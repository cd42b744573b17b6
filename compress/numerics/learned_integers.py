"""Integers that learn: a weight in steps of its grid, counted from the zero point, and rounded where it is used."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from compress.numerics.fake_quantization import straight_through
from compress.numerics.integer_grid import QuantizedWeight, as_float16

_WITHIN = 0.49
"""Weights stay so near to an integer of the grid, in steps, that it is the one they are rounded to."""


@dataclass(frozen=True)
class LearnedGrid:
    """What `steps` [rows, columns] can be of a grid: the integers of ``quantized`` less their zero points."""

    quantized: QuantizedWeight
    symmetric: bool

    @classmethod
    def of(cls, quantized: QuantizedWeight) -> LearnedGrid:
        """The grid of a quantized weight."""
        return cls(quantized, quantized.symmetric)

    def nearest(self, steps: torch.Tensor) -> torch.Tensor:
        """The nearest to ``steps`` within the grid, less their zero points; the gradient passes."""
        return straight_through(steps, lambda exact: self._clamped(exact.round()))

    def start(self, weight: torch.Tensor) -> torch.Tensor:
        """The steps nearest to ``weight`` that are rounded to the integers of the grid."""
        chosen = self.quantized.integers.float() - self._zeros()
        scales = self._by_column(self.quantized.scales.float())
        return (weight / scales - chosen).clamp_(-_WITHIN, _WITHIN).add_(chosen)

    @torch.no_grad()
    def hold(self, steps: torch.Tensor) -> None:
        """Bring back what left the grid, in place, so that no weight gets out of its gradient's reach."""
        self._clamped(steps, _WITHIN)

    @torch.no_grad()
    def learned(self, steps: torch.Tensor, scales: torch.Tensor) -> QuantizedWeight:
        """What is to be stored of ``steps`` and ``scales`` [rows, groups]."""
        integers = self.nearest(steps).add(self._zeros()).to(torch.uint8)
        return replace(self.quantized, integers=integers, scales=as_float16(scales))

    def _clamped(self, steps: torch.Tensor, beyond: float = 0.0) -> torch.Tensor:
        """``steps`` within the grid and ``beyond``, in place."""
        highest = (1 << self.quantized.bits) - 1
        if self.symmetric:
            zero = 1 << (self.quantized.bits - 1)
            return steps.clamp_(-zero - beyond, highest - zero + beyond)
        zeros = self._zeros().to(steps.device)
        return steps.clamp_(-zeros - beyond, highest - zeros + beyond)

    def _zeros(self) -> torch.Tensor:
        return self._by_column(self.quantized.zero_points.float())

    def _by_column(self, of_groups: torch.Tensor) -> torch.Tensor:
        columns = torch.arange(self.quantized.integers.shape[1], device=of_groups.device)
        return of_groups[:, columns // self.quantized.group_size]
