"""Records of a diff, which views, limits and JSON output share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.report.compare.change import Comparison
from compress.results.report import Measurement
from compress.utils.pydantic_models import Frozen, FrozenAliased

SCHEMA = 1
How = Literal["identical", "rounded", "changed"]


class FieldChange(Frozen):
    """Field with different values. None means that a side lacks the field."""

    file: str = Field(description="`config.json`, `recipe`, `tokenizer.json`, `report` or another file")
    field: str
    before: str | None
    after: str | None


class TensorChange(Frozen):
    """Change of a tensor from the first model to the second. Errors are root mean squares relative to the first tensor.

    ``how`` is `identical` (all numbers equal), `rounded` (the stored bits explain the change) or `changed`.
    """

    name: str
    other: str = Field("", description="name in the second model, if it differs")
    layer: str
    kind: str = Field(description="part of its layer: `attention.self.query`, `mlp.up_proj`, `whole`")
    shape: tuple[int, ...]
    how: How
    by: str = Field("name", description="rule that matched it to a tensor of the second model: `name` or `content`")
    relative: float = Field(0.0, description="norm of the difference over the norm of the tensor")
    unexplained: float = Field(0.0, description="like `relative`, without the part that the stored bits explain")
    squares: tuple[float, float] = Field((0, 0), description="sums of squares of the first tensor and the difference")
    times_rounding: float | None = Field(None, description="difference over the error of rounding to the step")
    within_half_step: float | None = Field(None, description="share of the weights no more than half a step away")
    cosine: float = 1.0
    factor: float = Field(1.0, description="factor for the first tensor that brings it closest to the second")
    ranges: tuple[float, float, float, float] = Field(
        description="minimum and maximum of the first, then of the second"
    )
    sparsity: tuple[float, float]
    bits: tuple[float, float]
    dtypes: tuple[str, str]
    zeroed_rows: tuple[int, ...] = Field((), description="rows that only the second sets to zero")
    spectrum: tuple[tuple[float, ...], tuple[float, ...]] | None = Field(
        None, description="largest singular values of both, for changed matrices"
    )
    rank: int | None = Field(None, description="rank of the difference, if a few directions hold 99.9% of it")
    causes: tuple[str, ...] = Field((), description="likely causes of the change")


class LayerChange(Frozen):
    """Change of all tensors of one layer."""

    name: str
    relative: float
    unexplained: float
    changed: int
    tensors: int
    worst: str = Field(description="tensor with the largest change")
    causes: tuple[str, ...] = ()


class WeightsDiff(Frozen):
    """Changes of the weights of two models."""

    formats: tuple[str, str]
    tensors: tuple[TensorChange, ...]
    layers: tuple[LayerChange, ...] = Field(description="changed layers, the largest change first")
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    again: tuple[str, ...] = Field(
        (), description="further copies in the second model, and tensors that it does not need to store"
    )
    unread: tuple[str, ...] = ()

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Descriptions of the tensors without a counterpart of the same shape."""
        removed, added = (f"{name}: removed" for name in self.removed), (f"{name}: added" for name in self.added)
        return (*self.resized, *removed, *added)

    @property
    def verdict(self) -> How:
        """Largest kind of change of all tensors."""
        if self.unmatched or self.having("changed"):
            return "changed"
        return "rounded" if self.having("rounded") else "identical"

    def having(self, how: How) -> tuple[TensorChange, ...]:
        """Return the tensors with one kind of change."""
        return tuple(tensor for tensor in self.tensors if tensor.how == how)


class ModuleDifference(Frozen):
    """Difference of a module's output in both models: the root mean square error over the output's spread."""

    module: str
    error: float


class Activations(Frozen):
    """Differences of intermediate values in both models, in the order of computation."""

    first: str | None = Field(description="first module whose values differ, or None")
    error: float = Field(0.0, description="error of that module")
    modules: tuple[ModuleDifference, ...] = ()
    notes: tuple[str, ...] = ()


class AnswersDiff(Frozen):
    """Outputs of both models for the same inputs. ``rows`` compare the second model with the first, with intervals."""

    inputs: str = Field(description="inputs: random texts or images, or the rows of a file or of a test split")
    rows: tuple[Measurement, ...] = ()
    comparison: Comparison | None = Field(None, description="comparison of metrics, for labelled rows or two reports")
    flips: tuple[str, ...] = Field((), description="unlabelled inputs with different predictions")
    notes: tuple[str, ...] = ()

    def find(self, metric: str) -> Measurement | None:
        """Return the row of a metric, or None."""
        return next((row for row in self.rows if row.metric == metric), None)


class LimitFound(Frozen):
    """Limit with its measured value. ``state`` is `missed` if the whole confidence interval lies above the bound."""

    name: str
    bound: float
    value: float | None
    state: Literal["kept", "missed", "cannot tell", "not measured"]


class Diff(FrozenAliased):
    """Differences of two models. ``first`` names the first thing to examine."""

    schema_version: int = Field(SCHEMA, alias="schema")
    before: str
    after: str
    verdict: Literal["identical", "same", "changed"]
    first: str
    summary: tuple[str, ...]
    fields: tuple[FieldChange, ...] = ()
    weights: WeightsDiff | None = None
    answers: AnswersDiff | None = None
    activations: Activations | None = None
    limits: tuple[LimitFound, ...] = ()
    not_compared: tuple[str, ...] = Field((), description="parts that could not be compared, with reasons")
    isolation: dict[str, int | bool | None] = Field({}, description="limits of the process that opened the models")
