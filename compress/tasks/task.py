"""What a task knows: its columns, how it loads a model, how examples become inputs, the loss and the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from compress.data.slices import Slice
from compress.measurement import Measurement
from compress.tasks.evaluation import Evaluation

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from compress.models.torch_model import TorchModel


@dataclass(frozen=True)
class Column:
    """A column that the task reads. ``label`` columns hold class names or ids."""

    name: str
    label: bool = False


@dataclass(frozen=True)
class Examples:
    """Encoded examples, unpadded. ``inputs[i][name]`` is a 1-D int64 array; ``labels`` is [n] int64 or None.

    ``padding`` gives, for each input name, the value that fills a shorter example on the right. ``scored`` is how
    many tokens at the end of each example count, where not all of them do; ``note`` what a reader must know of how
    the examples were made.
    """

    inputs: Sequence[dict[str, np.ndarray]]
    padding: dict[str, int]
    labels: np.ndarray | None = None
    scored: int | None = None
    note: str = ""

    def __len__(self) -> int:
        return len(self.inputs)

    def lengths(self) -> np.ndarray:
        """Tokens of each example, [n]."""
        return np.array([len(next(iter(example.values()))) for example in self.inputs])

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The examples at ``indices``, padded to the longest: name -> [len(indices), length] int64."""
        width = max(len(next(iter(self.inputs[i].values()))) for i in indices)
        out = {}
        for name, fill in self.padding.items():
            array = np.full((len(indices), width), fill, dtype=np.int64)
            for row, i in enumerate(indices):
                array[row, : len(self.inputs[i][name])] = self.inputs[i][name]
            out[name] = array
        return out


Kept = Mapping[str, np.ndarray]
"""What is kept of a model's outputs, by name; the first axis is that of the examples."""


class Task(Protocol):
    """One Hugging Face task. Implementations live in one file each and are registered in `compress.tasks`."""

    name: str
    columns: tuple[Column, ...]
    slices: tuple[Slice, ...]
    """The parts of the test data that are looked at where the recipe names none."""
    batch_size: int
    """Examples that are evaluated at once."""
    reads_rows: bool
    """Whether example i is row i, so that there can be slices; else rows are running text that is cut elsewhere."""
    generates: bool
    """Whether models answer token by token, so that generation is what is timed and tried."""

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and processor; a missing head is created for ``labels``. Raises `ModelError`."""

    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Turn rows (columns named as in `columns`; label columns optional) into inputs. Raises `DataError`."""

    def held_out(
        self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int, evaluation: Evaluation
    ) -> Examples:
        """The inputs that a model is judged by. Raises `DataError` for rows that leave nothing to judge by."""

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Scalar training loss of a batch."""

    def keep(self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]) -> Kept:
        """What of a batch's outputs the metrics need; ``indices`` are its examples'. Raises `ModelError`."""

    def measure(self, kept: Kept, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """The task's metrics with 95% intervals and raw outcomes of each example. Raises `ModelError`."""

    def compare(self, kept: Kept, reference: Kept, model: str, target: str) -> list[Measurement]:
        """How near a model's answers are to those of ``reference``, the baseline, on the same examples."""

    def probabilities(self, kept: Kept) -> np.ndarray | None:
        """Of each answer that could be given, [n, answers]; None where answers are no classes. Raises `ModelError`."""
