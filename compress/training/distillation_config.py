"""The parameters of a distillation: who learns, from whom, and what the loss weighs."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from compress.frozen import Frozen
from compress.training.config import FIRST_TOKEN_ONLY, Training


class Student(Frozen):
    """Where the student comes from: layers, config or model. Without any, the stage's input is the student."""

    layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="indices of the input's layers to keep, counted from 0"
    )
    config: dict[str, Any] | None = Field(
        None, description="changes to the input's config, e.g. {hidden_size: 192}; weights start anew"
    )
    model: str | None = Field(None, description="Hugging Face id, local folder or `sample:NAME`")
    random_weights: bool = Field(
        False, description="of `model` only config.json and the processor are read, and weights drawn from the seed"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.random_weights and self.model is None:
            raise ValueError("model, whose config.json says for what weights are drawn")
        if sum(value is not None for value in (self.layers, self.config, self.model)) != 1:
            raise ValueError("exactly one of layers, config and model")
        return self


class Distillation(Training):
    """A training in which a student learns to answer as its teacher does."""

    teacher: str | None = Field(None, description="label of the stage whose output teaches; default: the input")
    student: Student | None = Field(None, description="what is trained; default: the input")
    method: Literal["logits", "distilbert", "tinybert", "minilm"] = Field(
        "logits", description="the loss on representations, beside the one on the answers: logits, or embeddings"
    )
    temperature: float = Field(2.0, gt=0, description="softens both sides of the loss on logits")
    logits_weight: float = Field(1.0, ge=0, description="weight of the loss on logits or embeddings")
    labels_weight: float = Field(0.0, ge=0, description="weight of the task's own loss on labeled examples")
    representation_weight: float = Field(1.0, ge=0, description="weight of the method's loss on representations")
    use_unlabeled: bool = Field(False, description="also learn from the recipe's unlabeled text")
    first_token_only: bool = FIRST_TOKEN_ONLY

    @model_validator(mode="after")
    def _two_models(self) -> Self:
        if self.teacher is None and self.student is None:
            raise ValueError("a teacher (label of an earlier stage), a student, or both")
        if self.first_token_only and self.method != "logits":
            raise ValueError("no first_token_only: the method compares representations of every token")
        return self
