"""Recover quality after quantization with a LoRA adapter on the frozen integers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from compress.checkpoints.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.stage.prediction import PlanContext, Prediction, Shape
from compress.stage.stage import Context, Promise, Stage
from compress.tasks.capability import GENERATES
from compress.training.config import AdapterTraining
from compress.training.prediction import recovery_prediction


class Lora(AdapterTraining, Stage[QuantizedCheckpoint, QuantizedCheckpoint]):
    """Train a low-rank adapter on the frozen quantized model (QLoRA: Dettmers et al. 2023, section 3).

    It learns to predict as the model before quantization does, or to predict the text. The base keeps every byte; the
    adapter is an ordinary one of peft's, in the folder `adapter/` of the checkpoint:
    `PeftModel.from_pretrained(model, "CHECKPOINT/adapter")` puts it on the quantized model.
    """

    packages = ("torch", "transformers", "accelerate", "peft")
    requires = frozenset({GENERATES})
    adapter_beside = True
    kind: Literal["lora"] = "lora"

    def promise(self) -> Promise:
        """The base stays as it is."""
        return Promise(changes_weights=False)

    def check_data(self, start: Path, context: Context) -> None:
        """Cut the text into windows."""
        from compress.training.recovery import make_windows

        make_windows(Checkpoint(start), self, context)

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Every step has pupil and teacher; the files keep their size."""
        return recovery_prediction(self, before, plan)

    def run(self, model: QuantizedCheckpoint, context: Context) -> QuantizedCheckpoint:
        """Train on the ``train`` split. Raises `StageError` where it does not help."""
        from compress.training.quantized_recovery import train_adapter

        return train_adapter(model, self, context)
