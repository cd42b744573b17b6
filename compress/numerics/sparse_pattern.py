"""Where zeros may lie: N of every M inputs kept, or blocks of outputs and inputs. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """``first`` of every ``second`` inputs kept (`2:4`), or, with ``blocks``, outputs x inputs of a block (`4x1`)."""

    first: int
    second: int
    blocks: bool

    @classmethod
    def read(cls, text: str) -> Pattern:
        """The pattern that `2:4` or `4x1` says."""
        blocks = "x" in text
        first, second = text.split("x" if blocks else ":")
        return cls(int(first), int(second), blocks)

    def __str__(self) -> str:
        return f"{self.first}{'x' if self.blocks else ':'}{self.second}"

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that the pattern itself says; blocks say none."""
        return None if self.blocks else 1 - self.first / self.second

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whether a layer of so many outputs and inputs can be divided so."""
        return inputs % self.second == 0 and (not self.blocks or outputs % self.first == 0)
