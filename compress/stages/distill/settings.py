"""Settings of the stage `distill`, and of the student model that other distillation stages share."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from compress.stages.base import SEARCH, AppliesTo
from compress.stages.training.settings import FIRST_TOKEN_ONLY, KEEP_BEST, Training
from compress.tasks.capability import ANSWERS_PER_TOKEN, EMBEDS, TAKES_AUDIO, TAKES_IMAGES
from compress.utils.pydantic_models import Frozen, changed_fields

_NOT_FOR_EMBEDDINGS = AppliesTo(excludes=frozenset({EMBEDS}))
_CLASSIFIERS_OF_TEXT = AppliesTo(excludes=frozenset({TAKES_IMAGES, TAKES_AUDIO, ANSWERS_PER_TOKEN, EMBEDS}))
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


class Distillation(Training):
    """Settings of a training in which a student learns to predict what its teacher predicts."""

    teacher: str | None = Field(None, description="label of the stage whose output is the teacher; default: the input")
    student: Student | None = Field(None, description="the model to train; default: the input")
    method: Annotated[Literal["logits", "distilbert", "tinybert", "minilm"], _TEXT_ONLY] = Field(
        "logits", description="loss on representations, besides the one on logits or embeddings"
    )
    learning_rate: float = Field(
        5e-5, gt=0, le=1, description="peak learning rate", json_schema_extra={SEARCH: [1e-4, 3e-4]}
    )
    temperature: Annotated[float, _NOT_FOR_EMBEDDINGS] = Field(
        2.0, gt=0, description="softens both sides of the loss on logits"
    )
    logits_weight: float = Field(1.0, ge=0, description="weight of the loss on logits or embeddings")
    labels_weight: Annotated[float, _NOT_FOR_EMBEDDINGS] = Field(
        0.0, ge=0, description="weight of the task's own loss on labeled examples"
    )
    representation_weight: Annotated[float, _TEXT_ONLY] = Field(
        1.0, ge=0, description="weight of the method's loss on representations"
    )
    keep_best: bool = KEEP_BEST
    use_unlabeled: Annotated[bool, _TEXT_ONLY] = Field(False, description="train on the recipe's unlabeled text too")
    first_token_only: Annotated[
        bool, AppliesTo(excludes=frozenset({TAKES_IMAGES, TAKES_AUDIO, ANSWERS_PER_TOKEN, EMBEDS}))
    ] = FIRST_TOKEN_ONLY

    @model_validator(mode="after")
    def _two_models(self) -> Self:
        if self.teacher is None and self.student is None:
            raise ValueError("a teacher (label of an earlier stage), a student, or both")
        return self

    @model_validator(mode="after")
    def _fields_have_an_effect(self) -> Self:
        if self.first_token_only and self.method != "logits":
            raise ValueError("no first_token_only: the method compares representations of every token")
        if self.method == "logits" and changed_fields(self, ["representation_weight"]):
            raise ValueError("method: distilbert, tinybert or minilm, whose loss representation_weight is for")
        return self
