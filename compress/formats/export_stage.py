"""Base class of the stages that write a model in a format with weights of its own precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic

from compress.stages.base import InputModel, OutputModel, OutputSpec, Requirements, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape, in_precision
from compress.utils.errors import StageError, first_line


class ExportStage(Stage[InputModel, OutputModel], Generic[InputModel, OutputModel]):
    """Stage that traces a model, writes it in ``precision`` and compares it with torch on real examples.

    A subclass declares the fields ``precision``, one of whose values is `fp32`, and ``embedding_bits``, the bits of
    embedding tables in int8, where None stands for those of ``precision``.
    """

    # The model is traced with training rows, calibrated on them, and compared with torch.
    required_data = Requirements(splits=("train",))

    if TYPE_CHECKING:
        precision: str
        embedding_bits: int | None

    def output_spec(self) -> OutputSpec:
        """Return the output specification; weights change unless they stay float32."""
        return OutputSpec(changes_weights=self.precision != "fp32")

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Predict the size of the same weights in the requested precision; the graph itself is small."""
        return in_precision(before, self.precision, self.embedding_bits)


@contextmanager
def refuse_unconvertible(runtime: str, library: str) -> Iterator[None]:
    """Raise `StageError` if ``library`` cannot convert the model for ``runtime`` inside the context."""
    try:
        yield
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError, KeyError) as error:
        raise StageError(
            f"The model cannot be converted for {runtime}: {first_line(error)}",
            expected=f"operators that {library} supports",
            hint="leave this target out, or export to another format",
        ) from error
