"""Fine-tune a model on labeled examples."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compress.models.model import TorchModel
from compress.stages.base import AppliesTo, Context, Requirements, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape
from compress.stages.training.length import FLOPS_FORWARD, FLOPS_TRAINING, KEPT_STATES_BYTES, training_prediction
from compress.stages.training.settings import FIRST_TOKEN_ONLY, KEEP_BEST, Training
from compress.tasks.capability import ANSWERS_PER_TOKEN, HAS_LABELS, TAKES_AUDIO, TAKES_IMAGES


class Finetune(Training, Stage[TorchModel, TorchModel]):
    """Train all weights on the task's own loss: makes a teacher, or recovers quality after pruning."""

    packages = ("torch", "transformers", "accelerate")
    requires = frozenset({HAS_LABELS})
    kind: Literal["finetune"] = "finetune"
    frozen_layers: int = Field(
        0,
        ge=0,
        description="lowest layers, with the embeddings below them, that stay as they are; what they give is computed "
        "once, so that a step costs less",
    )
    keep_best: bool = KEEP_BEST
    first_token_only: Annotated[bool, AppliesTo(excludes=frozenset({TAKES_IMAGES, TAKES_AUDIO, ANSWERS_PER_TOKEN}))] = (
        FIRST_TOKEN_ONLY
    )

    def needs(self) -> Requirements:
        """Return labeled training examples."""
        return Requirements(splits=("train",), labels=True)

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost: every epoch trains, and frozen layers compute once if their output can be stored."""

        def flops(before: Shape, after: Shape, tokens: float) -> float:
            frozen = (after.attention + after.feed_forward) * self.frozen_layers / max(after.layers, 1)
            learned = (after.first_token_only() if self.first_token_only else after).working - frozen
            passes = 1 if 4 * tokens * after.hidden <= KEPT_STATES_BYTES else self.epochs
            return (FLOPS_TRAINING * learned * self.epochs + FLOPS_FORWARD * frozen * passes) * tokens

        return training_prediction(self.batch_size, before, before, plan, flops, trained=before)

    def infer_shapes(self, model: TorchModel, context: Context) -> TorchModel:
        """Return the model itself."""
        return model

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Train ``model`` in place on the ``train`` split."""
        from compress.stages.sparsify.magnitude import keep_zeros
        from compress.stages.training.loop import Trainee, train
        from compress.tasks.inference import loss_of

        trainee = Trainee(
            model.module,
            context.encode("train", model),
            loss=lambda module, batch: loss_of(context.task, module, batch),
            after_step=keep_zeros(model.module),
            validate=context.validator(model),
            frozen_layers=self.frozen_layers,
            first_token_only=self.first_token_only,
            freeze_embeddings=self.freeze_embeddings,
            augment=self.augment,
            keep_best=self.keep_best,
        )
        train(trainee, self, context.seed, context.progress, "finetune")
        return model
