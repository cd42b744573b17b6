"""Grids of integers for a weight matrix: a scale and a zero point for each row and group of neighbouring columns.

Everything here is laid out [columns, rows] (a column of the weight is one contiguous stretch), and integers are counted
from the zero point: ``weight ~ steps * scale`` with ``-zero_point <= steps <= 2**bits - 1 - zero_point``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class QuantizedWeight:
    """``weight ~ (integers - zero_points) * scales``, with a scale and zero point for each row and group of columns.

    ``integers`` is [rows, columns] uint8 below 2**bits; ``scales`` is [rows, groups] float32, each of them a value
    that float16 has, since files store them so; ``zero_points`` is [rows, groups] uint8. Group g holds the columns
    from g * group_size on; the last group may be shorter. Per channel means a group as wide as the row.
    """

    integers: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    bits: int
    group_size: int

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle of the range, so that none has to be stored."""
        return bool((self.zero_points == 1 << (self.bits - 1)).all())

    def dequantize(self) -> torch.Tensor:
        """The weights that the integers stand for, [rows, columns] float32."""
        columns = self.integers.shape[1]
        groups = torch.arange(columns, device=self.integers.device) // self.group_size
        return (self.integers.float() - self.zero_points.float()[:, groups]) * self.scales[:, groups]

    def cpu(self) -> QuantizedWeight:
        """The same in the processor's memory."""
        integers, scales, zero_points = self.integers.cpu(), self.scales.cpu(), self.zero_points.cpu()
        return replace(self, integers=integers, scales=scales, zero_points=zero_points)

    def split(self, rows: Sequence[int]) -> list[QuantizedWeight]:
        """The weights of several layers that were stacked, of so many rows."""
        parts = (torch.split(part, list(rows)) for part in (self.integers, self.scales, self.zero_points))
        return [
            replace(self, integers=integers, scales=scales, zero_points=zero_points)
            for integers, scales, zero_points in zip(*parts, strict=True)
        ]

    def size_bits(self) -> float:
        """Bits for integers, 16-bit scales and, where they are needed, zero points of as many bits as a weight."""
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits * self.integers.numel() + (16 + zero_bits) * self.scales.numel()


_LARGEST_SCALE = float(torch.finfo(torch.float16).max)
_SMALLEST_SCALE = 2.0**-24
_FEW, _MANY, _COARSE = 6, 12, 5
"""How many ranges the search tries. Up to five bits, twice as many lower GPTQ's error by a thousandth."""
_REFITS = 2
_CACHE_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class IntegerGrid:
    """``scales`` (float32 with values that float16 has) and ``zero_points`` (whole numbers), both [groups, rows].

    A scale may be negative: the steps of a symmetric grid reach one further down than up, and weights need not.
    """

    scales: torch.Tensor
    zero_points: torch.Tensor
    bits: int
    group_size: int

    def bounds(self, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the largest step of each row in a group, or of all rows [1] where they are the same."""
        zero_points = self.zero_points[group]
        return -zero_points, (1 << self.bits) - 1 - zero_points

    def groups(self, columns: int) -> Iterator[tuple[int, int, int]]:
        """Index, first column and end of each group; the last may be shorter."""
        for group, start in enumerate(range(0, columns, self.group_size)):
            yield group, start, min(start + self.group_size, columns)

    def weight(self, integers: torch.Tensor) -> QuantizedWeight:
        """The quantized weight of ``integers`` [columns, rows], counted from 0."""
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
    """The grid for ``columns`` [columns, rows]; groups of ``group_size`` columns, or one a row for ``None``.

    With ``search`` each scale is the best of several clipped ranges, refitted, by the squared error weighted with
    ``importance`` [columns]; without it the range just covers the weights. A symmetric zero point is the middle,
    2**(bits - 1), and the range has one step more below zero than above it: with ``search`` a scale is negative where
    the weights reach further up than down. An asymmetric range always includes zero. Raises `ValueError` for weights
    too large for a float16 scale.
    """
    count, rows = columns.shape
    size = group_size or count
    groups = -(-count // size)
    weights = (
        torch.ones(count, device=columns.device)
        if importance is None
        else importance / importance.mean().clamp(min=1e-30)
    )
    scales, zero_points = torch.empty(2, groups, rows, device=columns.device)
    height = max(1, _CACHE_ELEMENTS // size)
    for group, start in enumerate(range(0, count, size)):
        here = slice(start, min(start + size, count))
        for top in range(0, rows, height):
            band = slice(top, top + height)
            values = columns[here, band].contiguous()
            fit = _fit_group(values, weights[here], bits, symmetric, search)
            scales[group, band], zero_points[group, band] = fit
    return IntegerGrid(scales, zero_points, bits, size)


def round_columns(columns: torch.Tensor, grid: IntegerGrid) -> torch.Tensor:
    """The nearest integers to ``columns`` [columns, rows], counted from 0, uint8."""
    integers = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    for group, start, end in grid.groups(len(columns)):
        steps = (columns[start:end] / grid.scales[group]).round_().clamp_(*grid.bounds(group))
        integers[start:end] = (steps + grid.zero_points[group]).to(torch.uint8)
    return integers


def as_float16(scales: torch.Tensor) -> torch.Tensor:
    """Scales as files store them, none of them zero. Raises `ValueError` for one beyond float16."""
    largest = float(scales.abs().max())
    if largest > _LARGEST_SCALE:
        raise ValueError(f"a scale of {largest:.3g} is beyond float16, in which files store scales")
    return scales.abs().clamp_(min=_SMALLEST_SCALE).copysign_(scales).half().float()


def _fit_group(
    values: torch.Tensor, importance: torch.Tensor, bits: int, symmetric: bool, search: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [rows] of one group ``values`` [size, rows]; a group of zeros has scale 1."""
    levels, middle = (1 << bits) - 1, 1 << (bits - 1)
    upwards = values.amax(0) > -values.amin(0) if symmetric and search else None
    if upwards is not None:
        values = torch.where(upwards, -values, values)
    low, high = values.amin(0).clamp_(max=0), values.amax(0).clamp_(min=0)
    empty = low == high
    if symmetric:
        whole = torch.maximum(low / -middle, high / (middle - 1))
        zero_points = torch.full_like(whole, middle)
    else:
        whole = (high - low) / levels
        zero_points = (-low / whole.clamp(min=1e-30)).round_().clamp_(0, levels)
    whole = torch.where(empty, torch.ones_like(whole), whole)
    scales = as_float16(whole)
    if search:
        shares = torch.linspace(1.0, _least_share(bits), _FEW if bits <= _COARSE else _MANY).tolist()
        scales = _search(values, importance, scales, (-zero_points, levels - zero_points), shares)
    if upwards is not None:
        scales = torch.where(upwards, -scales, scales)
    return torch.where(empty, torch.ones_like(scales), scales), torch.where(empty, float(middle), zero_points)


def _least_share(bits: int) -> float:
    """The smallest share of the full range worth trying: at few bits, most of it is given up for finer steps."""
    return {2: 0.3, 3: 0.5, 4: 0.65}.get(bits, 0.8)


def _search(
    values: torch.Tensor,
    importance: torch.Tensor,
    whole: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    shares: list[float],
) -> torch.Tensor:
    """The scale [rows] with the least weighted squared error among ``shares`` of ``whole`` and their refits.

    For given steps n the error sum h (w - s n)^2 is a parabola in s, least at sum h w n / sum h n^2, where it is lower
    by (sum h w n)^2 / sum h n^2 than at s = 0. Steps that are all zero gain no number, and are never the best.
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

    for share in shares:
        consider(whole * share)
    for _ in range(_REFITS):
        consider(best)
    return as_float16(best)
