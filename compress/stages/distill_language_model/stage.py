"""Train a language model to predict the next tokens that another predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from compress.formats.registry import RUNTIMES
from compress.models.model import TorchModel
from compress.stages.base import Context, Requirements, Stage
from compress.stages.cost_model import Estimate, PlanContext, Prediction, Shape, predicted
from compress.stages.distill.settings import layer_choices, student_and_teacher_shapes
from compress.stages.distill_language_model.settings import LanguageDistillation
from compress.stages.protocols import field_search_values
from compress.stages.training.length import FLOPS_FORWARD, FLOPS_TRAINING, training_prediction
from compress.stages.training.settings import TORCH
from compress.tasks.capability import GENERATES


class DistillLanguageModel(LanguageDistillation, Stage[TorchModel, TorchModel]):
    """Knowledge distillation of a language model, token by token.

    Models are compared on sequences of running text or on the answers of conversations: by the divergence of their
    next-token distributions (Hinton et al. 2015; reverse: Gu et al. 2024; ``top_k``: Anshumann et al. 2025), and the
    cross-entropy of the text.
    """

    packages = ("torch", "transformers", "accelerate")
    requires = frozenset({GENERATES})
    kind: Literal["distill_language_model"] = "distill_language_model"

    def called_packages(self) -> tuple[str, ...]:
        """Return the distributions that the stage calls, with those that generate text."""
        if self.teacher_writes is None or self.teacher_writes.runtime == TORCH:
            return self.packages
        return (*self.packages, *RUNTIMES[self.teacher_writes.runtime].writing_packages)

    def needs(self) -> Requirements:
        """Return the training split."""
        return Requirements(splits=("train",), labels=bool(self.loss.labels_weight))

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the cost: the student trains in every epoch; the teacher predicts once if its states can be stored."""
        after, teacher = student_and_teacher_shapes(self, before, plan)
        if self.seconds is not None:
            return predicted(before, after, Estimate(value=self.seconds, note="the budget"))
        synthetic = self.teacher_writes
        generated = 0 if synthetic is None else synthetic.tokens

        def flops(before: Shape, after: Shape, tokens: float) -> float | None:
            if synthetic is not None:
                tokens = generated if synthetic.share == 1 else tokens / (1 - synthetic.share)
            tokens = tokens if self.tokens is None else self.tokens / self.epochs
            if teacher is None:
                return None
            training = FLOPS_TRAINING * after.working * self.epochs + FLOPS_FORWARD * teacher.working
            return training * tokens + FLOPS_FORWARD * teacher.working * generated

        return training_prediction(
            self.batch_size, before, after, plan, flops, trained=after, teacher=teacher or before
        )

    def search_values(self, before: Shape | None, timed: bool = False) -> dict[str, tuple[Any, ...]]:
        """Return values of the fields, numbers of the student's layers, and two and four times as many epochs."""
        longer = self.seconds is None and self.tokens is None
        epochs = {"epochs": (2 * self.epochs, 4 * self.epochs)} if longer else {}
        return field_search_values(self, timed) | epochs | layer_choices(self.student, before)

    def check_data(self, start: Path, context: Context) -> None:
        """Split the text into sequences, if the student has the starting model's tokenizer. Raises `DataError`.

        Conversations that the teacher generates need a chat template.
        """
        if self.student is not None and self.student.model is not None:
            return
        from compress.models.processor import load_tokenizer
        from compress.stages.training.sequences import training_sequences
        from compress.tasks.token_sequences import before_question

        tokenizer = load_tokenizer(start)
        training_sequences(tokenizer, self, context)
        if self.teacher_writes is not None:
            before_question(tokenizer)

    def prune_widths(self, model: object) -> bool:
        """Return False if the student has another config, since its sizes are unknown then."""
        return self.student is None or self.student.config is None

    def infer_shapes(self, model: TorchModel, context: Context) -> TorchModel:
        """Return the student, untrained."""
        from compress.stages.distill.trainer import make_student

        return make_student(self.student, model, model, context)

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Train the student on the ``train`` split."""
        from compress.stages.distill.trainer import make_student
        from compress.stages.distill_language_model.trainer import distill_language_model

        teacher = context.earlier(self.teacher) if self.teacher else model
        return distill_language_model(self, teacher, make_student(self.student, model, teacher, context), context)
