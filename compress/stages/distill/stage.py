"""Train a student to predict what its teacher predicts."""

from __future__ import annotations

from typing import Any, Literal

from compress.models.model import TorchModel
from compress.stages.base import Context, Requirements, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape
from compress.stages.distill.settings import Distillation, layer_choices, student_and_teacher_shapes
from compress.stages.protocols import field_search_values
from compress.stages.training.length import FLOPS_FORWARD, FLOPS_TRAINING, training_prediction
from compress.tasks.capability import DESCRIBES_IMAGES, GENERATES, GENERATES_IMAGES, REWRITES, TAKES_ARRAYS, TRANSCRIBES


class Distill(Distillation, Stage[TorchModel, TorchModel]):
    """Knowledge distillation of a model's outputs (Hinton et al. 2015).

    For tasks whose outputs are embeddings, the loss is their squared distance (Reimers and Gurevych 2020) instead of
    the loss on logits. A student of text with another width gets a linear layer into the teacher's space.
    """

    packages = ("torch", "transformers", "accelerate")
    excludes = frozenset({TAKES_ARRAYS, TRANSCRIBES, REWRITES, DESCRIBES_IMAGES, GENERATES, GENERATES_IMAGES})
    kind: Literal["distill"] = "distill"

    def needs(self) -> Requirements:
        """Return training examples, with labels if the loss uses them, and unlabeled text if requested."""
        labels = bool(self.labels_weight or self.use_unlabeled or self.replace_words)
        return Requirements(splits=("train",), unlabeled=self.use_unlabeled, labels=labels)

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost: the student trains in every epoch; the teacher predicts once if its answers are stored."""
        after, teacher = student_and_teacher_shapes(self, before, plan)

        def flops(before: Shape, after: Shape, tokens: float) -> float | None:
            unlabeled = [*plan.unlabeled.values()] if self.use_unlabeled else []
            if teacher is None or None in unlabeled:
                return None
            tokens += sum(plan.tokens(text) for text in unlabeled if text)
            texts = [text for text in (plan.splits["train"], *unlabeled) if text]
            tokens *= 1 + self.replace_words / max(sum(text.rows for text in texts), 1)
            passes = 1 if self.augment is None else self.epochs
            return (FLOPS_TRAINING * after.working * self.epochs + FLOPS_FORWARD * teacher.working * passes) * tokens

        return training_prediction(
            self.batch_size, before, after, plan, flops, trained=after, teacher=teacher or before
        )

    def search_values(self, before: Shape | None, timed: bool = False) -> dict[str, tuple[Any, ...]]:
        """Return values of the fields, numbers of the student's layers, and two and four times as many epochs.

        A student improves for a long time (Beyer et al. 2022, section 3.2).
        """
        epochs = {"epochs": (2 * self.epochs, 4 * self.epochs)}
        return field_search_values(self, timed) | epochs | layer_choices(self.student, before)

    def infer_shapes(self, model: TorchModel, context: Context) -> TorchModel:
        """Return the student, untrained."""
        from compress.stages.distill.trainer import make_student

        return make_student(self.student, model, model, context)

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Train the student on the ``train`` split, and on unlabeled text if requested."""
        from compress.stages.distill.projection import trained_layers
        from compress.stages.distill.trainer import DistillationTrainer, make_student

        teacher = context.earlier(self.teacher) if self.teacher else model
        student = make_student(self.student, model, teacher, context)
        with trained_layers(student):
            DistillationTrainer(self, teacher, student, context).train()
        return student
