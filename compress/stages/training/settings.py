"""Settings of training that stages inherit as fields. Importing this imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from compress.formats.registry import RUNTIMES
from compress.results.formatting import parse_duration
from compress.stages.base import AppliesTo
from compress.tasks.capability import LOCALIZES, TAKES_IMAGES
from compress.utils.pydantic_models import Frozen, changed_fields

TORCH = "torch"
if TYPE_CHECKING:
    WritingRuntime = str
else:
    WritingRuntime = Literal[(TORCH, *(name for name, spec in RUNTIMES.items() if spec.many_texts))]


class TeacherWrites(Frozen):
    """Settings of text that a teacher generates for its student."""

    conversations: int = Field(
        ge=1, description="number of conversations that the teacher generates with its chat template"
    )
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of generated sequences in training; the rest is the data's text",
    )
    runtime: WritingRuntime = Field(
        TORCH,
        description="runtime of the teacher; all but torch use continuous batching, which is several times as fast on "
        "CPUs",
    )

    @property
    def tokens(self) -> int:
        """Approximate number of generated tokens: 200 for each conversation."""
        return 200 * self.conversations


Precision = Literal["auto", "fastest", "fp32", "bf16"]
PRECISION: Precision = Field(
    "auto",
    description="data type of training; `auto`: bf16 autocast if the processor supports it; `fastest`: bf16 if it is "
    "measured to be faster than fp32",
)
_CHANGES_ONLY_VALUES = (
    *("epochs", "learning_rate", "batch_size", "optimizer", "precision", "keep_best"),
    *("freeze_embeddings", "augment"),
)
"""Fields that change nothing but the values of the trained weights; dropout may stand in the model's config."""


class Augment(Frozen):
    """Random changes to training images, named after torchvision's `RandomCrop` and `RandomHorizontalFlip`."""

    crop_padding: int = Field(
        0, ge=0, description="pixels of black padding around each image before a random crop of the original size"
    )
    horizontal_flip: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="probability of a horizontal flip; omit it if left and right distinguish classes, as for digits",
    )

    @model_validator(mode="after")
    def _changes_something(self) -> Augment:
        if not (self.crop_padding or self.horizontal_flip):
            raise ValueError("crop_padding, horizontal_flip, or both")
        return self


class Optimizer(Frozen):
    """Settings of AdamW and its schedule (Loshchilov and Hutter 2019, section 3)."""

    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising learning rate")
    decay: Literal["linear", "cosine"] = Field("linear", description="schedule of the learning rate after the warm-up")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    max_gradient_norm: float = Field(1.0, gt=0, description="maximum global norm of gradients")


class TrainingSettings(Frozen):
    """Settings of the training loop: AdamW with linear warm-up and decay."""

    epochs: float = Field(3.0, gt=0, le=1000, description="passes over the training examples")
    learning_rate: float = Field(5e-5, gt=0, le=1, description="peak learning rate")
    batch_size: int = Field(32, ge=1, description="examples per step in each process")
    optimizer: Optimizer = Field(Optimizer(), description="AdamW and its schedule")
    precision: Precision = PRECISION
    dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout during training; default: that of the model. 0 is also faster"
    )

    def shortened(self, share: float) -> Self:
        """Return the settings with a share of the epochs."""
        return self.model_copy(update={"epochs": self.epochs * share})

    def with_default_training(self) -> Self:
        """Return the settings with default values in the fields that change nothing but the values of weights."""
        fields = type(self).model_fields
        return self.model_copy(update={name: fields[name].default for name in _CHANGES_ONLY_VALUES if name in fields})


KEEP_BEST: bool = Field(
    True, description="keep the epoch with the best validation metric, if there is a validation split"
)


class Training(TrainingSettings):
    """Settings of a training on the examples of the ``train`` split."""

    freeze_embeddings: bool = Field(False, description="do not train the embedding tables")
    augment: Annotated[Augment | None, AppliesTo(frozenset({TAKES_IMAGES}), frozenset({LOCALIZES}))] = Field(
        None, description="random augmentation of training images: {crop_padding: 2, horizontal_flip: 0.5}"
    )


class BudgetedTraining(TrainingSettings):
    """Settings of a training that may be limited by time in place of epochs."""

    budget: str | None = Field(
        None,
        pattern=r"^[1-9]\d*(\.\d+)?[smh]$",
        description="training time instead of epochs, e.g. `30m`; the result then depends on the machine, and the "
        "report states the number of steps",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        names = [name for name in ("epochs", "tokens", "budget") if name in type(self).model_fields]
        lengths = changed_fields(self, names)
        if len(lengths) > 1:
            raise ValueError(f"one of {', '.join(names[:-1])} and {names[-1]}, not {' and '.join(lengths)}")
        return self

    @property
    def seconds(self) -> float | None:
        """Budget in seconds."""
        return None if self.budget is None else parse_duration(self.budget)

    def shortened(self, share: float) -> Self:
        """Return the settings with a share of the epochs, or of the budget."""
        changes: dict[str, Any] = {"epochs": self.epochs * share}
        if self.seconds is not None:
            changes["budget"] = f"{max(1, round(self.seconds * share))}s"
        return self.model_copy(update=changes)


FIRST_TOKEN_ONLY: bool = Field(
    False,
    description="compute only the first token in the last layer, since a classifier reads no other; same output up to "
    "rounding",
)
