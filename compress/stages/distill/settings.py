"""Settings of the stage `distill`, and of the student model that other distillation stages share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from compress.stages.base import SEARCH, AppliesTo, Reference
from compress.stages.cost_model import PlanContext, Shape
from compress.stages.training.settings import FIRST_TOKEN_ONLY, KEEP_BEST, Training
from compress.tasks.capability import (
    ANSWERS_PER_TOKEN,
    EMBEDS,
    HAS_CLASSES,
    TAKES_AUDIO,
    TAKES_IMAGES,
    TAKES_PAIRS,
    TAKES_TEXT,
)
from compress.utils.pydantic_models import Frozen

_NOT_FOR_EMBEDDINGS = AppliesTo(excludes=frozenset({EMBEDS}))
_CLASSIFIERS_OF_TEXT = AppliesTo(excludes=frozenset({TAKES_IMAGES, TAKES_AUDIO, ANSWERS_PER_TOKEN, EMBEDS}))
_SINGLE_TEXTS = AppliesTo(
    frozenset({TAKES_TEXT, HAS_CLASSES}), frozenset({ANSWERS_PER_TOKEN, TAKES_PAIRS, TAKES_IMAGES})
)
_TEXT_ONLY = AppliesTo(excludes=frozenset({TAKES_IMAGES, TAKES_AUDIO}))


class Student(Frozen):
    """Origin of a student model: layers of the input, a changed config, or another model."""

    layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="indices of the input's layers to keep, counted from 0"
    )
    config: dict[str, Any] | None = Field(
        None,
        description="changes to the input's config, e.g. {hidden_size: 192}; the weights are initialized at random",
    )
    model: str | None = Field(None, description="Hugging Face id, local folder or `sample:NAME`")
    random_weights: bool = Field(
        False, description="read only config.json and the processor of `model`, and initialize its weights at random"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.random_weights and self.model is None:
            raise ValueError("model, whose config.json describes the weights that are initialized")
        if sum(value is not None for value in (self.layers, self.config, self.model)) != 1:
            raise ValueError("exactly one of layers, config and model")
        return self


class TeacherAndStudent(Frozen):
    """Settings that name the two models of a distillation."""

    teacher: str | None = Field(None, description="label of the stage whose output is the teacher; default: the input")
    student: Student | None = Field(None, description="the model to train; default: the input")
    learning_rate: float = Field(
        5e-5, gt=0, le=1, description="peak learning rate", json_schema_extra={SEARCH: [1e-4, 3e-4]}
    )

    @model_validator(mode="after")
    def _require_two_models(self) -> Self:
        if self.teacher is None and self.student is None:
            raise ValueError("a teacher (label of an earlier stage), a student, or both")
        return self

    def earlier_outputs(self) -> tuple[str, ...]:
        """Return the teacher's label."""
        return (self.teacher,) if self.teacher else ()

    def references(self) -> dict[str, Reference]:
        """Return the student, if it is a model of its own."""
        if self.student is None or self.student.model is None:
            return {}
        return {"student.model": Reference(self.student.model, random_weights=self.student.random_weights)}

    def check_model(self, start: Path) -> None:
        """Raise `StageError` for an architecture whose config cannot say which layers are kept."""
        if self.student is not None and self.student.layers is not None:
            from compress.models.prune_dry_run import check_layer_selection

            check_layer_selection(start, self.student.layers)


def student_and_teacher_shapes(
    settings: TeacherAndStudent, before: Shape | None, plan: PlanContext
) -> tuple[Shape | None, Shape | None]:
    """Return the shapes of student and teacher, None if unknown; ``before`` is the shape of the stage's input."""
    teacher, student, after = (
        plan.shapes.get(settings.teacher) if settings.teacher else before,
        settings.student,
        before,
    )
    if student is not None and student.model is not None:
        after = plan.find_model(student.model, student.random_weights)
    elif student is not None and before is not None:
        layers = student.layers
        after = before.with_selected_layers(layers) if layers else reconfigured(before, student.config or {})
    return after, teacher


def layer_choices(student: Student | None, before: Shape | None) -> dict[str, tuple[Any, ...]]:
    """Return layers that a search should try for a student that keeps some: all, a half, a third, evenly spread."""
    if student is None or student.layers is None or before is None or before.layers < 2:
        return {}
    counts = dict.fromkeys(max(before.layers // part, 1) for part in (1, 2, 3))
    return {"student.layers": tuple(spread_layers(before.layers, count) for count in counts)}


class Distillation(TeacherAndStudent, Training):
    """Settings of a training in which a student learns to predict what its teacher predicts."""

    temperature: Annotated[float, _NOT_FOR_EMBEDDINGS] = Field(
        2.0, gt=0, description="temperature of the loss on logits"
    )
    labels_weight: Annotated[float, _NOT_FOR_EMBEDDINGS] = Field(
        0.0, ge=0, description="weight of the task's own loss on labeled examples"
    )
    keep_best: bool = KEEP_BEST
    use_unlabeled: Annotated[bool, _TEXT_ONLY] = Field(False, description="also train on the recipe's unlabeled texts")
    replace_words: Annotated[int, _SINGLE_TEXTS] = Field(
        0,
        ge=0,
        description="also train on so many texts in which random words are replaced by words of other texts, and which "
        "the teacher labels; this helps a student that is much simpler than its teacher",
    )
    first_token_only: Annotated[bool, _CLASSIFIERS_OF_TEXT] = FIRST_TOKEN_ONLY


_SIZES = {"hidden_size": "hidden", "intermediate_size": "intermediate", "num_hidden_layers": "layers"}
_SIZELESS = re.compile(r"dropout|hidden_act|initializer|num_attention_heads|label|eps|pad_token_id")


def spread_layers(layers: int, count: int) -> list[int]:
    """Return ``count`` of ``layers`` indices, evenly spread, including the last: 6 and 3 give 1, 3, 5."""
    return [(position + 1) * layers // count - 1 for position in range(count)]


def reconfigured(shape: Shape, changes: Mapping[str, Any]) -> Shape | None:
    """Return the shape after changes to the config, or None if their effect is unknown.

    Each sort is scaled as its matrices are: hidden^2 for attention, hidden x intermediate for feed-forward.
    """
    known = all(name in _SIZES or _SIZELESS.search(name) for name in changes)
    sized = {_SIZES[name]: value for name, value in changes.items() if name in _SIZES}
    if not known or not all(isinstance(value, int) and value > 0 for value in sized.values()):
        return None
    if not (shape.hidden and shape.intermediate and shape.layers):
        return None
    wide = replace(shape, **sized)
    hidden, middle = wide.hidden / shape.hidden, wide.intermediate / shape.intermediate
    layers = wide.layers / shape.layers
    return replace(
        wide,
        embeddings=shape.embeddings * hidden,
        attention=shape.attention * layers * hidden**2,
        feed_forward=shape.feed_forward * layers * hidden * middle,
        other=shape.other * hidden**2,
    )
