"""Patterns of structured sparsity: N of every M inputs, or blocks. Importing this module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity (``first`` of every ``second`` inputs kept), or blocks of ``first`` outputs x ``second`` inputs."""

    first: int
    second: int
    blocks: bool

    @classmethod
    def read(cls, text: str) -> Pattern:
        """Parse a pattern such as `2:4` or `4x1`."""
        blocks = "x" in text
        first, second = text.split("x" if blocks else ":")
        return cls(int(first), int(second), blocks)

    def __str__(self) -> str:
        return f"{self.first}{'x' if self.blocks else ':'}{self.second}"

    @property
    def sparsity(self) -> float | None:
        """Return the share of zeros that the pattern implies; None for blocks."""
        return None if self.blocks else 1 - self.first / self.second

    def fits(self, outputs: int, inputs: int) -> bool:
        """Return True if a layer of this size can be divided by the pattern."""
        return inputs % self.second == 0 and (not self.blocks or outputs % self.first == 0)
