"""Train a student to answer as its teacher does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from compress.models.torch_model import TorchModel
from compress.stages.base import Context, Needs, Reference, Stage
from compress.stages.cost_model import Estimate, PlanContext, Prediction, Shape, predicted
from compress.stages.distill.settings import Distillation
from compress.stages.training.cost import FLOPS_FORWARD, FLOPS_TRAINING, training_prediction
from compress.stages.training.settings import Training
from compress.stages.training.synthetic_data_settings import writing_packages
from compress.tasks.capability import (
    BY_TOKEN,
    DRAWS,
    EMBEDS,
    GENERATES,
    REWRITES,
    TAKES_ARRAYS,
    TELLS_OF_IMAGES,
    TRANSCRIBES,
    Capabilities,
    takes_media,
)
from compress.utils.errors import InputError
from compress.utils.pydantic_models import changed_fields


class Distill(Distillation, Stage[TorchModel, TorchModel]):
    """Knowledge distillation (Hinton et al. 2015), with the representation losses of three papers.

    ``distilbert``: cosine of the last hidden states (Sanh et al. 2019, section 2). ``tinybert``: MSE of
    embeddings, hidden states and attention scores, layers mapped uniformly (Jiao et al. 2020, section 3.1).
    ``minilm``: KL of the last layer's attention and value relations (Wang et al. 2020, section 3.1).
    A learned projection joins widths that differ.

    Where a task's answers are embeddings, the loss on them is their squared distance (Reimers and Gurevych 2020) in
    place of the one on logits.

    Language models are compared token by token, on windows of running text or on the answers of conversations: by the
    divergence of their next-token distributions (Hinton et al. 2015; reverse: Gu et al. 2024; ``top_k``: Anshumann et
    al. 2025), the cross-entropy of the text (``labels_weight``), and with ``hidden`` the squared error of the states
    behind matched blocks, relative to the teacher's (Jiao et al. 2020, equation 8).

    Models that draw learn to do it in ``fewer_steps``; by ``features`` what they lost where their UNet was cut (Kim et
    al. 2023, BK-SDM, section 3.2); or to decode latents by a ``small_decoder`` of convolutions.
    """

    packages = ("torch", "transformers", "accelerate")
    excludes = frozenset({TAKES_ARRAYS, TRANSCRIBES, REWRITES, TELLS_OF_IMAGES})
    kind: Literal["distill"] = "distill"

    def idle_fields(self, task: Capabilities) -> tuple[str, ...]:
        """Those of classes, where answers are embeddings; those of tokens and texts, where inputs are neither.

        Of language models those of labeled rows, of models that draw all but those of fewer steps, and everywhere else
        those of either.
        """
        if DRAWS in task:
            own = (name for name in Distillation.model_fields if name not in (*Training.model_fields, *_OF_DENOISERS))
            return (*super().idle_fields(task), *changed_fields(self, (*own, "freeze_embeddings")))
        if GENERATES in task:
            others: tuple[str, ...] = ("use_unlabeled", "first_token_only")
            others = (*others, "method") if self.method not in ("logits", "hidden") else others
            others = (*others, "top_k", "direction", "temperature") if not self.logits_weight else others
            return (*super().idle_fields(task), *changed_fields(self, (*others, *self.of_generators)))
        others = ("temperature", "labels_weight", "first_token_only") if EMBEDS in task else ()
        if BY_TOKEN in task:
            others = ("first_token_only",)
        if takes_media(task):
            others = ("method", "representation_weight", "use_unlabeled", "first_token_only")
        others = (*others, *self.of_decoders, *self.of_generators, "budget")
        others = (*others, "method") if self.method == "hidden" else others
        return (*super().idle_fields(task), *changed_fields(self, dict.fromkeys(others)))

    def calls(self) -> tuple[str, ...]:
        """Also peft, where adapters are trained, diffusers, where a denoiser is, and what the teacher writes by."""
        more = {"peft": self.lora is not None, "diffusers": self.draws}
        called = (name for name, is_called in more.items() if is_called)
        return (*self.packages, *called, *writing_packages(self.teacher_writes))

    def needs(self) -> Needs:
        """Training examples, with labels if these have a say, and unlabeled text if asked for."""
        labels = bool(self.labels_weight or self.use_unlabeled)
        return Needs(splits=("train",), unlabeled=self.use_unlabeled, labels=labels)

    def refers_to(self) -> tuple[str, ...]:
        """The teacher's label."""
        return (self.teacher,) if self.teacher else ()

    def paths(self) -> dict[str, Reference]:
        """The student, where it is a model of its own."""
        if self.student is None or self.student.model is None:
            return {}
        return {"student.model": Reference(self.student.model, random_weights=self.student.random_weights)}

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """The student goes forwards and backwards in every epoch, the teacher forwards: once, if its answers do."""
        after = self._student_shape(before, plan)
        teacher = plan.shapes.get(self.teacher) if self.teacher else before

        if self.seconds is not None:
            return predicted(before, after, Estimate(value=self.seconds, note="the budget"))

        own = self.teacher_writes
        written = 0 if own is None else own.tokens(self.sequence_length or plan.max_length)

        def flops(before: Shape, after: Shape, tokens: float) -> float | None:
            if own is not None:
                tokens = written if own.share == 1 else tokens / (1 - own.share)
            tokens = tokens if self.tokens is None else self.tokens / self.epochs
            extra = [*plan.unlabeled.values()] if self.use_unlabeled else []
            if teacher is None or None in extra:
                return None
            tokens += sum(plan.tokens(text) for text in extra if text)
            learns, teaches = (
                (shape.first_token_only() if self.first_token_only else shape).working for shape in (after, teacher)
            )
            passes = 1 if self.method == "logits" and self.augment is None else self.epochs
            lesson = (FLOPS_TRAINING * learns * self.epochs + FLOPS_FORWARD * teaches * passes) * tokens
            return lesson + FLOPS_FORWARD * teaches * written

        return training_prediction(self, before, after, plan, flops, trained=after, teacher=teacher or before)

    def _student_shape(self, before: Shape | None, plan: PlanContext) -> Shape | None:
        student = self.student
        if student is not None and student.model is not None:
            return plan.find_model(student.model, student.random_weights)
        if student is None or before is None:
            return before
        if student.layers is not None:
            return before.with_layers(len(student.layers))
        return reconfigured(before, student.config or {})

    def worth_searching(self, before: Shape | None, timed: bool = False) -> dict[str, tuple[Any, ...]]:
        """Also all of the input's layers, half and a third of them, evenly spread, where the student keeps layers.

        And two and four times as many epochs: an imitation gets better for long (Beyer et al. 2022, section 3.2).
        """
        found = super().worth_searching(before, timed)
        if self.seconds is None and self.tokens is None:
            found["epochs"] = (2 * self.epochs, 4 * self.epochs)
        if self.student is None or self.student.layers is None or before is None or before.layers < 2:
            return found
        counts = dict.fromkeys(max(before.layers // part, 1) for part in (1, 2, 3))
        return {**found, "student.layers": tuple(spread_layers(before.layers, count) for count in counts)}

    def check_data(self, start: Path, context: Context) -> None:
        """Cut the text into windows, where the student reads it as the starting model does. Raises `DataError`.

        Of models that draw it is known what they learn: `InputError` where neither fewer_steps, features nor
        small_decoder say it.
        """
        if DRAWS in context.task.capabilities and not self.draws:
            raise InputError(
                f"The recipe does not say what a student for {context.task.name} learns.",
                where="distill",
                expected="fewer_steps: {method: progressive, steps: 4}, or consistency; features: {}, or "
                "small_decoder: {}",
            )
        if GENERATES in context.task.capabilities and (self.student is None or self.student.model is None):
            from compress.models.processor import load_tokenizer
            from compress.stages.training.sequences import lesson_windows

            tokenizer = load_tokenizer(start)
            lesson_windows(tokenizer, self, context)
            if self.teacher_writes is not None:
                self.teacher_writes.check(tokenizer)

    def check_model(self, start: Path) -> None:
        """Raises `StageError` for an architecture whose config cannot say which layers are left."""
        if self.student is not None and self.student.layers is not None:
            from compress.models.prune_dry_run import check_kept_layers

            check_kept_layers(start, self.student.layers)

    def cut_widths(self, model: Any) -> bool:
        """None can tell where the student has another config."""
        return self.student is None or self.student.config is None

    def rehearse(self, model: TorchModel, context: Context) -> TorchModel:
        """The student, untrained."""
        from compress.stages.distill.trainer import make_student

        return make_student(self.student, model, model, context)

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Train the student on the ``train`` split, and on unlabeled text if asked for."""
        from compress.stages.distill.trainer import Lesson, make_student

        teacher = context.earlier(self.teacher) if self.teacher else model
        if self.fewer_steps is not None:
            from compress.stages.diffusion.step_distillation import teach_fewer_steps

            return teach_fewer_steps(self, self.fewer_steps, teacher, model, context)
        if self.features is not None:
            from compress.stages.diffusion.feature_distillation import distill_features

            return distill_features(self, self.features, teacher, model, context)
        if self.small_decoder is not None:
            from compress.stages.diffusion.tiny_autoencoder import distill_decoder

            return distill_decoder(self, self.small_decoder, teacher, model, context)
        student = make_student(self.student, model, teacher, context)
        if GENERATES in context.task.capabilities:
            from compress.stages.distill_language_model.trainer import teach

            return teach(self, teacher, student, context)
        Lesson(self, teacher, student, context).teach()
        return student


_OF_DENOISERS = ("teacher", "budget", *Distillation.of_generators)
"""What models that draw have, beside a training's own fields."""
_SIZES = {"hidden_size": "hidden", "intermediate_size": "intermediate", "num_hidden_layers": "layers"}
_SIZELESS = re.compile(r"dropout|hidden_act|initializer|num_attention_heads|label|eps|pad_token_id")


def spread_layers(layers: int, count: int) -> list[int]:
    """``count`` of so many layers, evenly spread, the last among them: 6 and 3 give 1, 3, 5."""
    return [(place + 1) * layers // count - 1 for place in range(count)]


def reconfigured(shape: Shape, changes: Mapping[str, Any]) -> Shape | None:
    """The shape after changes to the config; ``None`` for those whose effect cannot be told.

    Each sort is scaled as its matrices are: hidden^2 for attention, hidden x intermediate for feed-forward.
    """
    known = all(name in _SIZES or _SIZELESS.search(name) for name in changes)
    sized = {_SIZES[name]: value for name, value in changes.items() if name in _SIZES}
    if not known or not all(isinstance(value, int) and value > 0 for value in sized.values()):
        return None
    if not (shape.hidden and shape.intermediate and shape.layers):
        return None
    wide = replace(shape, **sized)
    hidden, middle = wide.hidden / shape.hidden, wide.intermediate / shape.intermediate
    layers = wide.layers / shape.layers
    return replace(
        wide,
        embeddings=shape.embeddings * hidden,
        attention=shape.attention * layers * hidden**2,
        feed_forward=shape.feed_forward * layers * hidden * middle,
        other=shape.other * hidden**2,
    )
