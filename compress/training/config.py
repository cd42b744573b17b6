"""The parameters of a training loop, shared by every stage that trains."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from compress.frozen import Frozen
from compress.tasks.capability import TAKES_IMAGES, Capabilities

_LATER = ("frozen_layers", "first_token_only")


class Augment(Frozen):
    """How training images are varied, by the names of torchvision's `RandomCrop` and `RandomHorizontalFlip`."""

    crop_padding: int = Field(
        0, ge=0, description="pixels of black put around each image, of which a window of its own size is cut at random"
    )
    horizontal_flip: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="probability that an image is mirrored; not where left and right tell classes apart, as of digits",
    )

    @model_validator(mode="after")
    def _something_varies(self) -> Augment:
        if not (self.crop_padding or self.horizontal_flip):
            raise ValueError("crop_padding, horizontal_flip, or both")
        return self


class Training(Frozen):
    """AdamW with linear warm-up and linear decay (Loshchilov and Hutter 2019, section 3)."""

    trains: ClassVar[bool] = True
    epochs: float = Field(3.0, gt=0, le=1000, description="passes over the training examples")
    learning_rate: float = Field(5e-5, gt=0, le=1, description="peak learning rate")
    batch_size: int = Field(32, ge=1, description="examples a step in each process")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    max_gradient_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")
    precision: Literal["auto", "fastest", "fp32", "bf16"] = Field(
        "auto",
        description="`auto` takes bf16 autocast where the processor has bf16 arithmetic, `fastest` where that is "
        "faster than fp32: with AMX, or ARM's bf16",
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout while training; default: the model's own. 0 is also faster"
    )
    freeze_embeddings: bool = Field(False, description="leave the embedding tables as they are")
    augment: Augment | None = Field(
        None, description="training images are varied anew in every epoch: {crop_padding: 2, horizontal_flip: 0.5}"
    )
    keep_best: bool = Field(True, description="keep the epoch that is best on the validation split, if there is one")

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What recipes didn't have from the start is left out unless it is set, so that keys of caches stay."""
        return {name: value for name, value in serialize(self).items() if name not in _LATER or value}

    def idle_fields(self, task: Capabilities) -> tuple[str, ...]:
        """`augment`, where inputs are no images."""
        return ("augment",) if self.augment is not None and TAKES_IMAGES not in task else ()


FIRST_TOKEN_ONLY: bool = Field(
    False,
    description="compute of the last layer what a classifier reads, its first token: the same function, rounded "
    "otherwise, for less work",
)
