"""Fine-tune a model on labeled examples."""

from __future__ import annotations

from typing import Annotated, Literal

from compress.models.model import TorchModel
from compress.stages.base import AppliesTo, Context, Requirements, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape
from compress.stages.training.length import FLOPS_TRAINING, training_prediction
from compress.stages.training.settings import FIRST_TOKEN_ONLY, KEEP_BEST, Training
from compress.tasks.capability import ANSWERS_PER_TOKEN, HAS_LABELS, TAKES_AUDIO, TAKES_IMAGES


class Finetune(Training, Stage[TorchModel, TorchModel]):
    """Train all weights on the task's own loss: produces a teacher, or recovers quality after pruning."""

    packages = ("torch", "transformers", "accelerate")
    requires = frozenset({HAS_LABELS})
    required_data = Requirements(splits=("train",), labels=True)
    kind: Literal["finetune"] = "finetune"
    keep_best: bool = KEEP_BEST
    first_token_only: Annotated[bool, AppliesTo(excludes=frozenset({TAKES_IMAGES, TAKES_AUDIO, ANSWERS_PER_TOKEN}))] = (
        FIRST_TOKEN_ONLY
    )

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost of the training."""

        def flops(before: Shape, after: Shape, tokens: float) -> float:
            return FLOPS_TRAINING * after.working * self.epochs * tokens

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
            first_token_only=self.first_token_only,
            freeze_embeddings=self.freeze_embeddings,
            augment=self.augment,
            keep_best=self.keep_best,
        )
        train(trainee, self, context.seed, context.progress, "finetune")
        return model
