"""What a diff of two models finds: one record for views, limits and whoever reads JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.report.compare.change import Comparison
from compress.results.measurement import Measurement
from compress.utils.pydantic_models import Frozen, FrozenAliased

SCHEMA = 1
How = Literal["identical", "rounded", "changed"]


class FieldChange(Frozen):
    """A field that differs; None for one that a side lacks."""

    file: str = Field(description="`config.json`, `recipe`, `tokenizer.json`, `report` or another file")
    field: str
    before: str | None
    after: str | None


class TensorChange(Frozen):
    """A tensor of the first model beside what it is in the second. Sizes are root mean squares over the first's own.

    ``how``: `identical` in every number; `rounded`: what the bits of the stored forms explain; `changed`: more.
    """

    name: str
    other: str = Field("", description="its name in the second model, where that is another")
    layer: str
    kind: str = Field(description="which part of its layer: `attention.self.query`, `mlp.up_proj`, `whole`")
    shape: tuple[int, ...]
    how: How
    by: str = Field("name", description="`name` or `content`: how it was found in the second model")
    relative: float = Field(0.0, description="size of the difference over that of the tensor")
    unexplained: float = Field(0.0, description="the same without what the stored bits explain")
    times_rounding: float | None = Field(None, description="the difference over what rounding to the step gives")
    within_half_step: float | None = Field(None, description="share of the weights no more than half a step away")
    cosine: float = 1.0
    factor: float = Field(1.0, description="by which the first is multiplied to be nearest to the second")
    ranges: tuple[float, float, float, float] = Field(description="least and largest of the first, then of the second")
    sparsity: tuple[float, float]
    bits: tuple[float, float]
    dtypes: tuple[str, str]
    zeroed_rows: tuple[int, ...] = Field((), description="rows that are all zeros in the second alone")
    spectrum: tuple[tuple[float, ...], tuple[float, ...]] | None = Field(
        None, description="the largest singular values of both, of what changed"
    )
    rank: int | None = Field(None, description="of the difference, where a few directions hold 99.9% of it")
    causes: tuple[str, ...] = Field((), description="what was done to it, in words, where that is plain")

    @property
    def entries(self) -> int:
        """Number of weights."""
        total = 1
        for size in self.shape:
            total *= size
        return total


class LayerChange(Frozen):
    """The tensors of one layer together."""

    name: str
    relative: float
    unexplained: float
    changed: int
    tensors: int
    worst: str = Field(description="the tensor that changed most")
    causes: tuple[str, ...] = ()


class WeightsDiff(Frozen):
    """The tensors of two models."""

    formats: tuple[str, str]
    tensors: tuple[TensorChange, ...]
    layers: tuple[LayerChange, ...] = Field(description="those that changed, the one that changed most first")
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    again: tuple[str, ...] = Field((), description="what the second holds once more, or has no need to")
    unread: tuple[str, ...] = ()

    @property
    def verdict(self) -> How:
        """The worst of all tensors."""
        if self.added or self.removed or self.resized:
            return "changed"
        return next((how for how in ("changed", "rounded") if any(one.how == how for one in self.tensors)), "identical")

    def having(self, how: How) -> tuple[TensorChange, ...]:
        """Return the tensors with one kind of change."""
        return tuple(one for one in self.tensors if one.how == how)


class Parting(Frozen):
    """The output of a module in both models on the same inputs: root mean square of the difference over its spread."""

    module: str
    error: float


class Activations(Frozen):
    """Differences of intermediate values in both models, in the order of computation."""

    first: str | None = Field(description="the first whose values part; None where none do")
    error: float = Field(0.0, description="there")
    modules: tuple[Parting, ...] = ()
    notes: tuple[str, ...] = ()


class AnswersDiff(Frozen):
    """Answers of both models to the same inputs. ``rows`` compare the second with the first, with intervals."""

    inputs: str = Field(description="which: `64 drawn texts`, or the rows of a file or of a recipe's test split")
    rows: tuple[Measurement, ...] = ()
    comparison: Comparison | None = Field(None, description="where there are labels, or two reports")
    flips: tuple[str, ...] = Field((), description="inputs that both answer otherwise, where nothing is labelled")
    notes: tuple[str, ...] = ()

    def find(self, metric: str) -> Measurement | None:
        """A row by its metric."""
        return next((row for row in self.rows if row.metric == metric), None)


class LimitFound(Frozen):
    """A bound that was asked for. ``state`` is `missed` where the value surely lies above it."""

    name: str
    bound: float
    value: float | None
    state: Literal["kept", "missed", "cannot tell", "not measured"]


class Diff(FrozenAliased):
    """Two models. ``first`` names what to look at before all else."""

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
    not_compared: tuple[str, ...] = Field((), description="what could not be compared, and why")
