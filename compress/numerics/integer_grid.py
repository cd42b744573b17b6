"""Integer grids for weight matrices: a scale and a zero point for each row and group of consecutive columns.

Tensors are laid out [columns, rows] (a column of the weight is contiguous), and steps are counted from the zero
point: ``weight ~ steps * scale`` with ``-zero_point <= steps <= 2**bits - 1 - zero_point``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class QuantizedWeight:
    """Quantized matrix ``weight ~ (integers - zero_points) * scales`` with scales per row and group of columns.

    ``integers`` is [rows, columns] uint8 below 2**bits; ``scales`` is [rows, groups] float32 with values that float16
    can represent, as files store them; ``zero_points`` is [rows, groups] uint8. Group g starts at column
    g * group_size; the last group may be shorter. Per-channel quantization has one group as wide as the row.
    """

    integers: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    bits: int
    group_size: int

    @property
    def symmetric(self) -> bool:
        """Return True if every zero point is the middle of the range, so that none has to be stored."""
        return bool((self.zero_points == 1 << (self.bits - 1)).all())

    def dequantize(self) -> torch.Tensor:
        """Return the weights that the integers represent, [rows, columns] float32."""
        columns = self.integers.shape[1]
        groups = torch.arange(columns, device=self.integers.device) // self.group_size
        return (self.integers.float() - self.zero_points.float()[:, groups]) * self.scales[:, groups]

    def cpu(self) -> QuantizedWeight:
        """Return a copy in the processor's memory."""
        integers, scales, zero_points = self.integers.cpu(), self.scales.cpu(), self.zero_points.cpu()
        return replace(self, integers=integers, scales=scales, zero_points=zero_points)

    def split(self, rows: Sequence[int]) -> list[QuantizedWeight]:
        """Return the weights of several stacked layers with these numbers of rows."""
        parts = (torch.split(part, list(rows)) for part in (self.integers, self.scales, self.zero_points))
        return [
            replace(self, integers=integers, scales=scales, zero_points=zero_points)
            for integers, scales, zero_points in zip(*parts, strict=True)
        ]

    def size_bits(self) -> float:
        """Return the bits of integers, 16-bit scales and, if needed, zero points as wide as a weight."""
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits * self.integers.numel() + (16 + zero_bits) * self.scales.numel()


_LARGEST_SCALE = float(torch.finfo(torch.float16).max)
_SMALLEST_SCALE = 2.0**-24
_FEW, _MANY, _COARSE = 6, 12, 5
"""Number of candidate ranges up to 5 bits and above. Twice as many lower GPTQ's error by only a thousandth."""
_REFITS = 2
_CACHE_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class IntegerGrid:
    """Scales (float32 with float16 values) and zero points (integral floats), both [groups, rows].

    A scale may be negative: the steps of a symmetric grid reach one further down than up.
    """

    scales: torch.Tensor
    zero_points: torch.Tensor
    bits: int
    group_size: int

    def bounds(self, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the smallest and the largest step of each row in a group."""
        zero_points = self.zero_points[group]
        return -zero_points, (1 << self.bits) - 1 - zero_points

    def groups(self, columns: int) -> Iterator[tuple[int, int, int]]:
        """Yield index, first column and end of each group; the last may be shorter."""
        for group, start in enumerate(range(0, columns, self.group_size)):
            yield group, start, min(start + self.group_size, columns)

    def weight(self, integers: torch.Tensor) -> QuantizedWeight:
        """Return the quantized weight of ``integers`` [columns, rows], counted from 0."""
        return QuantizedWeight(
            integers=integers.T.contiguous(),
            scales=self.scales.T.contiguous(),
            zero_points=self.zero_points.T.to(torch.uint8).contiguous(),
            bits=self.bits,
            group_size=self.group_size,
        )


def find_grid(
    columns: torch.Tensor,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    importance: torch.Tensor | None,
    search: bool,
) -> IntegerGrid:
    """Return the grid for ``columns`` [columns, rows].

    A symmetric zero point is the middle, 2**(bits - 1), and the range has one more step below zero than above. With
    ``search`` a scale is negative if the weights reach further up than down. An asymmetric range always includes zero.

    Args:
        columns: Weight [columns, rows].
        bits: Bits of an integer.
        group_size: Columns that share a scale; None for one scale per row.
        symmetric: Fix the zero point at the middle of the range.
        importance: Weights of the columns in the squared error [columns].
        search: Choose each scale as the best of several clipped ranges, refitted by least squares; without it the range
            just covers the weights.

    Raises:
        ValueError: If a scale is too large for float16.
    """
    count, rows = columns.shape
    size = group_size or count
    groups = -(-count // size)
    # Only ratios of importance matter; a mean of 1 keeps numbers in range.
    weights = (
        torch.ones(count, device=columns.device)
        if importance is None
        else importance / importance.mean().clamp(min=1e-30)
    )
    scales, zero_points = torch.empty(2, groups, rows, device=columns.device)
    height = max(1, _CACHE_ELEMENTS // size)
    for group, start in enumerate(range(0, count, size)):
        group_columns = slice(start, min(start + size, count))
        # Work on bands of rows that fit a processor's cache.
        for top in range(0, rows, height):
            band = slice(top, top + height)
            values = columns[group_columns, band].contiguous()
            fit = _fit_group(values, weights[group_columns], bits, symmetric, search)
            scales[group, band], zero_points[group, band] = fit
    return IntegerGrid(scales, zero_points, bits, size)


def round_columns(columns: torch.Tensor, grid: IntegerGrid) -> torch.Tensor:
    """Return the nearest integers to ``columns`` [columns, rows], counted from 0, uint8."""
    integers = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    for group, start, end in grid.groups(len(columns)):
        # Steps are counted from the zero point and stored from 0.
        steps = (columns[start:end] / grid.scales[group]).round_().clamp_(*grid.bounds(group))
        integers[start:end] = (steps + grid.zero_points[group]).to(torch.uint8)
    return integers


def as_float16(scales: torch.Tensor) -> torch.Tensor:
    """Return scales rounded to nonzero float16 values, as files store them. Raises `ValueError` beyond float16."""
    largest = float(scales.abs().max())
    if largest > _LARGEST_SCALE:
        raise ValueError(f"a scale of {largest:.3g} is beyond float16, in which files store scales")
    # A scale of zero would lose the sign of the steps.
    return scales.abs().clamp_(min=_SMALLEST_SCALE).copysign_(scales).half().float()


def _fit_group(
    values: torch.Tensor, importance: torch.Tensor, bits: int, symmetric: bool, search: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point [rows] of one group ``values`` [size, rows]; a group of zeros has scale 1.

    Args:
        values: Weights of the group [size, rows].
        importance: Weights of the columns in the squared error [size].
        bits: Bits of an integer.
        symmetric: Fix the zero point at the middle of the range.
        search: Search over clipped ranges.
    """
    levels, middle = (1 << bits) - 1, 1 << (bits - 1)
    # Flip rows that reach further up, so that the longer side of the range covers them.
    upwards = values.amax(0) > -values.amin(0) if symmetric and search else None
    if upwards is not None:
        values = torch.where(upwards, -values, values)
    low, high = values.amin(0).clamp_(max=0), values.amax(0).clamp_(min=0)
    empty = low == high
    if symmetric:
        # The scale must cover both ends of the range.
        full_scale = torch.maximum(low / -middle, high / (middle - 1))
        zero_points = torch.full_like(full_scale, middle)
    else:
        full_scale = (high - low) / levels
        zero_points = (-low / full_scale.clamp(min=1e-30)).round_().clamp_(0, levels)
    full_scale = torch.where(empty, torch.ones_like(full_scale), full_scale)
    scales = as_float16(full_scale)
    if search:
        # The smallest share of the full range worth trying: few bits profit from strong clipping.
        least = {2: 0.3, 3: 0.5, 4: 0.65}.get(bits, 0.8)
        shares = torch.linspace(1.0, least, _FEW if bits <= _COARSE else _MANY).tolist()
        scales = _search(values, importance, scales, (-zero_points, levels - zero_points), shares)
    if upwards is not None:
        # A negative scale undoes the flip.
        scales = torch.where(upwards, -scales, scales)
    return torch.where(empty, torch.ones_like(scales), scales), torch.where(empty, float(middle), zero_points)


def _search(
    values: torch.Tensor,
    importance: torch.Tensor,
    whole: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    shares: list[float],
) -> torch.Tensor:
    """Return the scale [rows] with the least weighted squared error among shares of the full scale and their refits.

    For given steps n the error sum h (w - s n)^2 is a parabola in s with the minimum sum h w n / sum h n^2, where it is
    lower by (sum h w n)^2 / sum h n^2 than at s = 0. Steps that are all zero yield NaN and never win.

    Args:
        values: Weights of the group [size, rows].
        importance: Weights h of the columns [size].
        whole: Scale of the full range [rows].
        bounds: Smallest and largest step.
        shares: Shares of the full scale to try.
    """
    steps, product = torch.empty_like(values), torch.empty_like(values)
    best, most = whole, torch.full_like(whole, -torch.inf)

    def consider(scales: torch.Tensor) -> torch.Tensor:
        nonlocal best, most
        torch.div(values, scales, out=steps).round_().clamp_(*bounds)
        linear = importance @ torch.mul(values, steps, out=product)
        refit = linear / (importance @ steps.square_())
        gain = linear * refit
        better = gain > most
        best, most = torch.where(better, refit, best), torch.where(better, gain, most)
        return best

    # First scan shares of the full range, then refit the best scale.
    for share in shares:
        consider(whole * share)
    for _ in range(_REFITS):
        consider(best)
    return as_float16(best)
