"""Pattern of structured sparsity, N of every M inputs. Importing this module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: ``first`` of every ``second`` inputs of an output are kept."""

    first: int
    second: int

    @classmethod
    def read(cls, text: str) -> Pattern:
        """Parse a pattern such as `2:4`."""
        first, second = text.split(":")
        return cls(int(first), int(second))

    def __str__(self) -> str:
        return f"{self.first}:{self.second}"

    @property
    def sparsity(self) -> float:
        """Return the share of zeros that the pattern implies."""
        return 1 - self.first / self.second

    def fits(self, inputs: int) -> bool:
        """Return True if the pattern divides a layer with so many inputs."""
        return inputs % self.second == 0
