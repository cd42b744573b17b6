"""Fine-tune a model on labeled examples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.checkpoints.torch_model import TorchModel
from compress.stage.stage import Context, Needs, Stage
from compress.tasks import IMAGES
from compress.training.config import FIRST_TOKEN_ONLY, Training


class Finetune(Training, Stage[TorchModel, TorchModel]):
    """Train all weights on the task's own loss: makes a teacher, or recovers quality after pruning."""

    packages = ("torch", "transformers", "accelerate")
    tasks = ("text-classification", "image-classification")
    kind: Literal["finetune"] = "finetune"
    frozen_layers: int = Field(
        0,
        ge=0,
        description="lowest layers, with the embeddings below them, that stay as they are; what they give is computed "
        "once, so that a step costs less",
    )
    first_token_only: bool = FIRST_TOKEN_ONLY

    def idle_fields(self, task: str) -> tuple[str, ...]:
        """`first_token_only`, where inputs are images."""
        return (
            *super().idle_fields(task),
            *(("first_token_only",) if self.first_token_only and task in IMAGES else ()),
        )

    def needs(self) -> Needs:
        """Labeled training examples."""
        return Needs(splits=("train",))

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Train ``model`` in place on the ``train`` split."""
        from compress.training.loop import Trainee, forward, train
        from compress.training.sparsity import keep_zeros

        trainee = Trainee(
            model.module,
            context.encode("train", model),
            loss=lambda module, batch: context.task.loss(forward(module, batch), batch["labels"]),
            after_step=keep_zeros(model.module),
            validate=context.validator(model),
            frozen_layers=self.frozen_layers,
            first_token_only=self.first_token_only,
        )
        train(trainee, self, context.seed, context.progress, "finetune")
        return model
