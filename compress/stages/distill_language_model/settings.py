"""Settings of the stage `distill_language_model`. Importing this imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.stages.distill.settings import TeacherAndStudent
from compress.stages.training.settings import KEEP_BEST, BudgetedTraining, TeacherWrites
from compress.utils.errors import StageError
from compress.utils.pydantic_models import Frozen, changed_fields


class LanguageLoss(Frozen):
    """Weights and kinds of the losses on a language model's predictions."""

    logits_weight: float = Field(1.0, ge=0, description="weight of the KL divergence between predictions")
    direction: Literal["forward", "reverse"] = Field(
        "forward",
        description="forward KL makes the student cover every token that the teacher considers possible; reverse KL "
        "makes it avoid tokens that the teacher does not",
    )
    top_k: int | None = Field(
        None, ge=1, description="compare the teacher's k most likely tokens, and all others as one"
    )
    temperature: float = Field(2.0, gt=0, description="temperature of the KL divergence")
    labels_weight: float = Field(0.0, ge=0, description="weight of the cross-entropy of the text")

    @model_validator(mode="after")
    def _fields_have_an_effect(self) -> Self:
        if not (self.logits_weight or self.labels_weight):
            raise ValueError("logits_weight or labels_weight above 0")
        if not self.logits_weight and (unused := changed_fields(self, ["direction", "top_k", "temperature"])):
            raise ValueError(f"logits_weight above 0, since {unused[0]} concerns that loss")
        return self


class MemorySaving(Frozen):
    """Ways to save memory or disk space at the price of time."""

    gradient_checkpointing: bool = Field(
        False, description="recompute blocks in the backward pass: less memory, more time"
    )
    cache_teacher_states: bool = Field(
        True,
        description="cache the teacher's last hidden states as bfloat16, for repeated sequences and for other "
        "students of the same teacher",
    )


class LanguageDistillation(TeacherAndStudent, BudgetedTraining):
    """Settings of a training in which a language model learns the next-token predictions of another."""

    batch_size: int = Field(32, ge=1, description="sequences per step of all processes together")
    loss: LanguageLoss = Field(LanguageLoss(), description="losses and their weights")
    keep_best: bool = KEEP_BEST
    freeze_embeddings: bool = Field(False, description="do not train the embedding tables")
    tokens: int | None = Field(None, ge=1, description="number of tokens to train on, in place of epochs")
    sequence_length: int | None = Field(None, ge=8, description="tokens of a sequence; default: data.max_length")
    documents: Literal["end_token", "blank_line"] = Field(
        "end_token", description="separator between two rows of running text in a sequence"
    )
    teacher_writes: TeacherWrites | None = Field(
        None, description="learn from conversations that the teacher generates, in place of the text or beside it"
    )
    memory: MemorySaving = Field(MemorySaving(), description="ways to save memory and disk space")

    def shortened(self, share: float) -> Self:
        """Return the settings with a share of the epochs, tokens or budget."""
        shorter = super().shortened(share)
        tokens = None if self.tokens is None else max(1, round(self.tokens * share))
        return shorter.model_copy(update={"tokens": tokens})


def with_remaining_budget(settings: LanguageDistillation, spent_seconds: float) -> LanguageDistillation:
    """Return the settings with the budget left after ``spent_seconds``. Raises `StageError` if none is left."""
    budget = settings.seconds
    if budget is None:
        return settings
    if spent_seconds >= budget:
        raise StageError(
            f"Generating text with the teacher took {spent_seconds:.0f} s, which leaves nothing of a budget of "
            f"{budget:g} s.",
            where="budget",
            expected="time for a few hundred training steps besides",
            hint="raise budget, or generate less text",
        )
    return settings.model_copy(update={"budget": f"{budget - spent_seconds:.3f}s"})
