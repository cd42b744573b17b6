"""Optional interfaces of stages, and functions that apply them to any stage.

A stage implements a protocol by having its methods; it does not inherit from it. Each function here states what
holds for a stage that does not implement the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

from compress.stages.base import SEARCH, SEARCH_TIMES, AnyStage, AppliesTo, Context, IntegerWeights
from compress.stages.cost_model import UNPREDICTED, Estimate, PlanContext, Prediction, Shape, predicted
from compress.tasks.capability import Capabilities, suits
from compress.utils.pydantic_models import changed_fields


@runtime_checkable
class PredictsCost(Protocol):
    """A stage that predicts its time, memory and output size before any model is loaded."""

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost on an input of shape ``before``, and the shape of the output.

        Called in the order of the recipe. Raises `InputError` for an input that the stage cannot be applied to.
        """


class KeepsShape:
    """Mixin for a stage whose output is stored as its input is: it adds or removes no parameters to speak of."""

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return a cost that consists of reading and writing the weights."""
        return predicted(before, before)


@runtime_checkable
class Trains(Protocol):
    """A stage that trains; several launched processes train together in its `run`."""

    def shortened(self, share: float) -> Self:
        """Return the stage with a share of its training, for an early look of a search."""

    def with_default_training(self) -> Self:
        """Return the stage with default values in every field that only says how it trains.

        Both stages give models that differ in nothing but the values of their weights.
        """


@runtime_checkable
class InfersShapes(Protocol):
    """A stage that can compute the shape of its output without training."""

    def infer_shapes(self, model: object, context: Context) -> Any | None:
        """Return the output except for the values of weights, in a moment; ``model`` may be changed in place.

        A search counts the bytes of a recipe in this way before anything is trained. None if only `run` can tell.
        Raises what `run` raises.
        """


@runtime_checkable
class Searchable(Protocol):
    """A stage that chooses the values a search should try from the shape of its input."""

    def search_values(self, before: Shape | None, timed: bool = False) -> dict[str, tuple[Any, ...]]:
        """Return fields that a search should vary, with values; ``timed``: the search limits latency."""


@runtime_checkable
class QuantizesEmbeddings(Protocol):
    """A stage with fields for embedding tables alone."""

    def with_default_embeddings(self) -> Self:
        """Return the stage with default values in every field that concerns embedding tables alone."""


@runtime_checkable
class ResolvesForTargets(Protocol):
    """A stage with a field whose value `auto` depends on the processors of the targets."""

    def resolved(self, sums_in_32_bits: bool) -> Self:
        """Return the stage with `auto` decided.

        ``sums_in_32_bits``: the processors of all targets add products of 8-bit integers in 32 bits.
        """


@runtime_checkable
class PrefersInput(Protocol):
    """A stage that loads its input as another class for some tasks."""

    def preferred_input(self, task: Capabilities) -> type[Any]:
        """Return the model class that the input is loaded as for a task with these capabilities."""


@runtime_checkable
class AcceptsStart(Protocol):
    """A stage that also takes starting models of other classes than its input type."""

    @classmethod
    def accepted_starts(cls) -> tuple[type[Any], ...]:
        """Return those classes."""


@runtime_checkable
class ConflictsWithEarlier(Protocol):
    """A stage that cannot follow every stage."""

    def conflicts_with(self, earlier: AnyStage) -> tuple[str | None, str] | None:
        """Return a field of ``earlier`` and the values expected there, or None if there is no conflict.

        None in place of the field stands for the earlier stage itself.
        """


@runtime_checkable
class StoresIntegers(Protocol):
    """A stage that stores weights of a checkpoint as integers."""

    def integer_weights(self) -> tuple[IntegerWeights, ...]:
        """Return a description of these weights."""


@runtime_checkable
class SetsPrecision(Protocol):
    """A stage that sets the precision of an ONNX graph, which formats with integers of their own then follow."""

    def precision_settings(self) -> Mapping[str, Any]:
        """Return fields of a stage that writes such a format: `{"precision": "int8", "embedding_bits": 4}`."""


@runtime_checkable
class RoundsWeights(Protocol):
    """A stage that writes a format, and may round the weights while it does so."""

    def without_rounding(self) -> Self:
        """Return the stage that writes the format without rounding, for another model than the recipe's output."""


@runtime_checkable
class ChecksModel(Protocol):
    """A stage that cannot be applied to every starting model."""

    def check_model(self, start: Path) -> None:
        """Raise a `CompressError` if the stage cannot be applied to the starting model in the folder ``start``."""


@runtime_checkable
class ChecksWidths(Protocol):
    """A stage that needs certain sizes of matrices."""

    def check_widths(self, start: Path, before: Sequence[AnyStage]) -> None:
        """Raise a `CompressError` if the sizes do not fit once the stages ``before`` have changed the model."""


@runtime_checkable
class ChangesWidths(Protocol):
    """A stage that changes the sizes of matrices."""

    def prune_widths(self, model: object) -> bool:
        """Change a model without weights in place to the sizes of the output; return False if they are unknown."""


@runtime_checkable
class ChecksData(Protocol):
    """A stage that reads running text."""

    def check_data(self, start: Path, context: Context) -> None:
        """Verify before the run that there is enough text, tokenized for the starting model. Raises `DataError`."""


def fields_without_effect(stage: AnyStage, task: Capabilities) -> list[str]:
    """Return the fields that are set although their `AppliesTo` does not cover a task with these capabilities."""
    limits = {
        name: limit
        for name, field in type(stage).model_fields.items()
        for limit in field.metadata
        if isinstance(limit, AppliesTo)
    }
    return [
        name for name in changed_fields(stage, limits) if not suits(task, limits[name].requires, limits[name].excludes)
    ]


def predict_cost(stage: AnyStage, before: Shape | None, plan: PlanContext) -> Prediction:
    """Return the predicted cost of a stage; without `PredictsCost` the shape is kept and the costs are unknown."""
    if isinstance(stage, PredictsCost):
        prediction = stage.predict(before, plan)
        libraries = f"{stage.kind} calls {', '.join(stage.packages)}, whose needs differ from model to model"
        named = Estimate.unknown(f"{UNPREDICTED}: {libraries}")
        seconds, memory = prediction.seconds, prediction.peak_memory_bytes
        return replace(
            prediction,
            seconds=named if seconds.note == UNPREDICTED else seconds,
            peak_memory_bytes=named if memory.note == UNPREDICTED else memory,
        )
    unknown = predicted(before, before, Estimate.unknown("not predicted by the stage"))
    return replace(unknown, disk_bytes=Estimate.unknown("its output size is unknown before it runs"))


def loaded_type(stage: AnyStage, task: Capabilities) -> type[Any]:
    """Return the class that a stage's input is loaded as for a task with these capabilities."""
    return stage.preferred_input(task) if isinstance(stage, PrefersInput) else stage.input_type


def starts_from(cls: type[AnyStage], model_type: type[Any]) -> bool:
    """Return whether stages of a class also take starting models of ``model_type``, another class than their input."""
    return issubclass(cls, AcceptsStart) and issubclass(model_type, cls.accepted_starts())


def inferred_output(stage: AnyStage, model: object, context: Context) -> Any | None:
    """Return a stage's output except for the values of weights, or None if only running the stage can tell."""
    return stage.infer_shapes(model, context) if isinstance(stage, InfersShapes) else None


def integer_weights(stage: AnyStage) -> tuple[IntegerWeights, ...]:
    """Return descriptions of the integers that a stage stores; by default there are none."""
    return stage.integer_weights() if isinstance(stage, StoresIntegers) else ()


def width_changes(stages: Iterable[AnyStage]) -> list[Callable[[Any], bool]]:
    """Return the functions that change a model without weights in place to the sizes of the stages' outputs."""
    return [stage.prune_widths for stage in stages if isinstance(stage, ChangesWidths)]


def search_values(stage: AnyStage, before: Shape | None, timed: bool = False) -> dict[str, tuple[Any, ...]]:
    """Return fields of a stage that a search should vary, with values, for an input of shape ``before``.

    Without `Searchable`, these are the values in the fields' metadata.
    """
    return stage.search_values(before, timed) if isinstance(stage, Searchable) else field_search_values(stage, timed)


def field_search_values(stage: AnyStage, timed: bool = False) -> dict[str, tuple[Any, ...]]:
    """Return the values under `search`, and if ``timed`` `search_times`, in the metadata of a stage's fields.

    `search_times` lists values that are worth trying for latency alone. The field's own value is tried too.
    """
    keys = (SEARCH, SEARCH_TIMES) if timed else (SEARCH,)
    metadata = {name: field.json_schema_extra for name, field in type(stage).model_fields.items()}
    return {
        name: tuple(extra[key])  # type: ignore[arg-type]
        for name, extra in metadata.items()
        if isinstance(extra, dict)
        for key in keys
        if key in extra
    }


def check_stages(stages: Iterable[AnyStage], start: Path) -> None:
    """Check that every stage can be applied to the model in a folder. Raises a `CompressError`."""
    for check in model_checks(stages):
        check.run(start)


class ModelCheck(NamedTuple):
    """Check of a stage on the starting model; ``run`` gets the model's folder and raises a `CompressError`.

    The result depends on ``stages``: the checked stage is the last one. The earlier ones change the sizes of matrices
    or leave an importance matrix.
    """

    stages: tuple[AnyStage, ...]
    run: Callable[[Path], None]
    of_widths: bool = False


def model_checks(stages: Iterable[AnyStage]) -> Iterator[ModelCheck]:
    """Yield the checks of each stage, up to a stage that continues with another model."""
    relevant_stages: tuple[AnyStage, ...] = ()
    for stage in stages:
        if stage.references():
            return
        if isinstance(stage, ChecksModel):
            yield ModelCheck((stage,), stage.check_model)
        if isinstance(stage, ChecksWidths):
            check = partial(stage.check_widths, before=relevant_stages)
            yield ModelCheck((*relevant_stages, stage), check, of_widths=True)
        if stage.output_spec().imatrix_beside or isinstance(stage, ChangesWidths):
            relevant_stages += (stage,)
