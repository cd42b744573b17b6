"""A weight matrix as integers: what every solver gives, and every file format stores."""

from __future__ import annotations

from collections.abc import Sequence
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
        groups = torch.arange(columns) // self.group_size
        return (self.integers.float() - self.zero_points.float()[:, groups]) * self.scales[:, groups]

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
