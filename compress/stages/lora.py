"""Recover quality after quantization with a LoRA adapter on the frozen integers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.checkpoints.checkpoint import QuantizedCheckpoint
from compress.stage.stage import Context, Needs, Promise, Stage
from compress.tasks.capability import GENERATES
from compress.training.recovery_config import Recovery


class Lora(Recovery, Stage[QuantizedCheckpoint, QuantizedCheckpoint]):
    """Train a low-rank adapter on the frozen quantized model (QLoRA: Dettmers et al. 2023, section 3).

    It learns to predict as the model before quantization does, or to predict the text. The base keeps every byte; the
    adapter is an ordinary one of peft's, in the folder `adapter/` of the checkpoint:
    `PeftModel.from_pretrained(model, "CHECKPOINT/adapter")` puts it on the quantized model.
    """

    packages = ("torch", "transformers", "accelerate", "peft")
    requires = frozenset({GENERATES})
    kind: Literal["lora"] = "lora"
    learning_rate: float = Field(1e-3, gt=0, le=1, description="peak learning rate")
    rank: int = Field(16, ge=1, le=4096, description="columns of each factor")
    alpha: float | None = Field(None, gt=0, description="the product counts alpha / rank; default: twice the rank")
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="last parts of the names of adapted layers, e.g. q_proj; default: all linear ones",
    )
    objective: Literal["teacher", "text"] = Field(
        "teacher", description="imitate the teacher's predictions, or predict the next token of the text"
    )

    def needs(self) -> Needs:
        """Text to learn from."""
        return Needs(splits=("train",))

    def refers_to(self) -> tuple[str, ...]:
        """The teacher's label."""
        return (self.teacher,)

    def promise(self) -> Promise:
        """The base stays as it is."""
        return Promise(changes_weights=False)

    def run(self, model: QuantizedCheckpoint, context: Context) -> QuantizedCheckpoint:
        """Train on the ``train`` split. Raises `StageError` where it does not help."""
        from compress.training.lora import train_adapter

        return train_adapter(model, self, context)
