"""The parameters of distillation, which the stage inherits: all models' and, beside them, those of some."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.results.formatting import seconds_of
from compress.stages.base import SEARCH
from compress.stages.diffusion.settings import FeatureLosses, SmallDecoder
from compress.stages.diffusion.step_distillation_settings import FewerSteps
from compress.stages.training.settings import FIRST_TOKEN_ONLY, Training
from compress.stages.training.synthetic_data_settings import TEACHER_WRITES, TeacherWrites
from compress.utils.errors import StageError
from compress.utils.pydantic_models import Frozen, changed_fields


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


class LanguageDistillation(Frozen):
    """What a language model's distillation has beside any other's: windows of text, and how tokens are compared."""

    direction: Literal["forward", "reverse"] = Field(
        "forward",
        description="language models: KL from the teacher to the student, which covers all that the teacher holds "
        "possible, or from the student to the teacher, which avoids what the teacher does not",
    )
    top_k: int | None = Field(
        None, ge=1, description="language models: compare the teacher's likeliest tokens, and all others as one"
    )
    sequence_length: int | None = Field(
        None, ge=8, description="language models: tokens of a window; default: data.max_length"
    )
    documents: Literal["end_token", "blank_line"] = Field(
        "end_token", description="language models: what stands between two rows of running text in a window"
    )
    tokens: int | None = Field(
        None, ge=1, description="language models: how many tokens are learned from, in place of epochs"
    )
    teacher_writes: TeacherWrites | None = TEACHER_WRITES
    gradient_checkpointing: bool = Field(
        False, description="language models: compute blocks again on the way back, for less memory and more time"
    )
    lora: int | None = Field(
        None, ge=1, le=4096, description="language models: train adapters of that rank, which are merged at the end"
    )
    fsdp: bool = Field(
        False,
        description="language models: of several processes each keeps a part of the weights, gradients and moments, "
        "and of the teacher, in place of all of them (fully sharded data parallelism)",
    )
    keep_states: bool = Field(
        True,
        description="language models: keep the teacher's last hidden states, as bfloat16, for windows that come again "
        "and for other students of the same teacher",
    )


class Distillation(LanguageDistillation, Training):
    """A training in which a student learns to answer as its teacher does."""

    of_decoders: ClassVar[tuple[str, ...]] = tuple(LanguageDistillation.model_fields)
    """Fields that mean something for language models alone."""
    of_generators: ClassVar[tuple[str, ...]] = ("fewer_steps", "features", "small_decoder")
    """Those that do for models that draw."""

    teacher: str | None = Field(None, description="label of the stage whose output teaches; default: the input")
    student: Student | None = Field(None, description="what is trained; default: the input")
    method: Literal["logits", "distilbert", "tinybert", "minilm", "hidden"] = Field(
        "logits",
        description="the loss on representations, beside the one on the answers: logits, or embeddings; of language "
        "models `hidden`, the states behind matched blocks",
    )
    learning_rate: float = Field(
        5e-5, gt=0, le=1, description="peak learning rate", json_schema_extra={SEARCH: [1e-4, 3e-4]}
    )
    temperature: float = Field(2.0, gt=0, description="softens both sides of the loss on logits")
    logits_weight: float = Field(1.0, ge=0, description="weight of the loss on logits or embeddings")
    labels_weight: float = Field(0.0, ge=0, description="weight of the task's own loss on labeled examples")
    representation_weight: float = Field(1.0, ge=0, description="weight of the method's loss on representations")
    use_unlabeled: bool = Field(False, description="also learn from the recipe's unlabeled text")
    first_token_only: bool = FIRST_TOKEN_ONLY
    budget: str | None = Field(
        None,
        pattern=r"^[1-9]\d*(\.\d+)?[smh]$",
        description="language models, and models that draw: train for so long, in place of epochs, e.g. `30m`, the "
        "teacher's writing included; what is learned then depends on the machine's speed, and the report says how much "
        "it was",
    )
    fewer_steps: FewerSteps | None = Field(
        None, description="models that draw: the denoiser learns to do in one step what took several"
    )

    features: FeatureLosses | None = Field(
        None, description="models that draw: a UNet that was cut learns from the teacher's"
    )
    small_decoder: SmallDecoder | None = Field(
        None, description="models that draw: a small autoencoder of convolutions takes the VAE's place"
    )

    @property
    def draws(self) -> bool:
        """Whether the student is a model that draws, or a part of it."""
        return any(getattr(self, name) is not None for name in self.of_generators)

    @property
    def seconds(self) -> float | None:
        """The budget in seconds."""
        return None if self.budget is None else seconds_of(self.budget)

    def shortened(self, share: float) -> Self:
        """The same with as large a share of its epochs, tokens or seconds."""
        changes: dict[str, Any] = {"epochs": self.epochs * share}
        if self.tokens is not None:
            changes["tokens"] = max(1, round(self.tokens * share))
        if self.seconds is not None:
            changes["budget"] = f"{max(1, round(self.seconds * share))}s"
        return self.model_copy(update=changes)

    def less(self, spent: float) -> Self:
        """The same with what is left of its budget after so many seconds. Raises `StageError` where nothing is."""
        if self.seconds is None:
            return self
        if spent >= self.seconds:
            raise StageError(
                f"The teacher wrote for {spent:.0f} s, and nothing is left of a budget of {self.seconds:g} s.",
                where="budget",
                expected="time for a few hundred steps beside",
                hint="raise budget, or let the teacher write less",
            )
        return self.model_copy(update={"budget": f"{self.seconds - spent:.3f}s"})

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = changed_fields(self, ("epochs", "tokens", "budget"))
        if len(given) > 1:
            raise ValueError(f"one of epochs, tokens and budget, not {' and '.join(given)}")
        return self

    @model_validator(mode="after")
    def _two_models(self) -> Self:
        lessons = [name for name in self.of_generators if getattr(self, name) is not None]
        if len(lessons) > 1:
            raise ValueError(f"one of {', '.join(lessons)} in a stage")
        if self.features is not None and self.teacher is None:
            raise ValueError("a teacher (label of the stage before the cut, or `start`), whose features are learned")
        if self.teacher is None and self.student is None and not lessons:
            raise ValueError("a teacher (label of an earlier stage), a student, or both")
        if self.first_token_only and self.method != "logits":
            raise ValueError("no first_token_only: the method compares representations of every token")
        return self
