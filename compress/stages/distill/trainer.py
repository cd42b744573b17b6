"""How a student learns from a teacher: where the student comes from, what it is shown, what it is scored on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from compress.models.hooks import capture_outputs
from compress.models.model import TorchModel
from compress.models.pruned_layer_sizes import CHANNELS_KEY
from compress.models.structure import Attention, blocks
from compress.models.transformer_pruning import HEADS_KEY, NEURONS_KEY, drop_pooler, keep_layers
from compress.numerics.losses import (
    attention_mse,
    hidden_cosine,
    hidden_mse,
    relation_kl,
    scaled_scores,
    uniform_layer_map,
)
from compress.stages.base import Context
from compress.stages.distill.settings import Distillation, Student
from compress.stages.sparsify.magnitude import keep_zeros
from compress.stages.training.loop import Trainee, train
from compress.stages.training.partial_forward import shortened
from compress.tasks.capability import DUAL_ENCODER, EMBEDS, LOCALIZES, PREDICTS_TOKENS, TAKES_TEXT
from compress.tasks.inference import answers, forward, predict, with_targets
from compress.tasks.task import Examples
from compress.utils.errors import StageError
from compress.utils.torch_device import uses_bf16

_ONE_ANSWER = 2
"""Axes of answers of which each example has one: examples, and what an answer is made of."""
_KEPT_BYTES = 1 << 30
"""Of the teacher's answers at most; where there are more it answers in every step."""
_COMPARED = 16
"""Images by which it is seen whether two models prepare them alike."""


def make_student(origin: Student | None, model: TorchModel, teacher: TorchModel, context: Context) -> TorchModel:
    """Return the model to train: the stage's input, some of its layers, a copy with another config, or another model.

    Args:
        origin: Settings of the student, or None for the stage's input.
        model: Input of the stage.
        teacher: Teacher, whose classes the student gets.
        context: Context of the stage.

    Raises:
        StageError: If config changes do not make a valid model.
    """
    if origin is None:
        return model
    if origin.model is not None:
        torch.manual_seed(context.seed)
        return context.task.load(context.resolve(origin.model), teacher.labels(), trust_remote_code=False)
    if origin.layers is not None:
        student = TorchModel(copy.deepcopy(model.module), model.processor)
        keep_layers(student.module, origin.layers)
        return student
    torch.manual_seed(context.seed)
    config = copy.deepcopy(model.module.config)
    unknown = [name for name in origin.config or {} if not hasattr(config, name)]
    if unknown:
        raise StageError(f"The config of a {config.model_type!r} model has no field {unknown[0]!r}.")
    for key in (HEADS_KEY, NEURONS_KEY, CHANNELS_KEY):
        if hasattr(config, key):
            # The new model has as many heads or channels in each layer as its config says.
            delattr(config, key)
    try:
        config.update(dict(origin.config or {}))
        module = type(model.module)(config)
    except (ValueError, TypeError, KeyError, RuntimeError, ArithmeticError, StrictDataclassError) as error:
        raise StageError(f"The student's config does not make a model: {error}") from error
    if {EMBEDS, TAKES_TEXT} <= context.task.capabilities:
        drop_pooler(module)
        if module.config.hidden_size != model.processor.modules.width:
            raise StageError(
                f"The student's hidden_size is {module.config.hidden_size}, and its pooling is for "
                f"{model.processor.modules.width}.",
                hint="keep hidden_size, and have fewer dimensions by reduce_dimensions",
            )
    return TorchModel(module.eval(), model.processor)


class DistillationTrainer:
    """Trainer of one distillation: the teacher's answers, the losses and the training run.

    With ``method: logits`` the teacher answers once, before training, and may have another tokenizer than the
    student. The other methods compare representations, so both must read the same tokens. Where images are varied, the
    teacher answers what the student is shown (Beyer et al. 2022, section 3.1), so both must prepare them alike.
    """

    def __init__(self, settings: Distillation, teacher: TorchModel, student: TorchModel, context: Context) -> None:
        self.settings = settings
        self.teacher = teacher
        self.student = student
        self.context = context
        self.examples = self._examples(student)
        self.teacher_examples = self.examples
        """With what makes the teacher's answers."""
        if settings.labels_weight and self.examples.labels is None:
            raise StageError("The training examples have no labels to learn from.", hint="leave labels_weight out")
        self.taught: torch.Tensor | None = None
        self.comparison: _Comparison | None = None

    def train(self) -> None:
        """Train the student in place. Raises `StageError` where a method cannot compare the two models."""
        settings, context = self.settings, self.context
        if settings.method == "logits":
            examples = self._examples(self.teacher)
            if PREDICTS_TOKENS in context.task.capabilities:
                # As many answers as there are tokens in the vocabulary, for each masked one, are not to be kept.
                _require_same_tokens(self.teacher, self.student, "fill-mask compares answers")
            elif settings.augment is None and self._can_be_kept(examples):
                context.progress.note("distill: the teacher answers")
                module = self.teacher.module.eval()
                with shortened(module, first_token=settings.first_token_only):
                    taught = predict(module, examples, bf16=uses_bf16(settings.precision))
                self.taught = torch.from_numpy(taught)
            else:
                for theirs, mine in zip(examples.inputs[:_COMPARED], self.examples.inputs[:_COMPARED], strict=True):
                    if not np.array_equal(theirs["pixel_values"], mine["pixel_values"]):
                        raise StageError(
                            "The teacher answers the images that the student is shown, but the two prepare "
                            "images differently.",
                            expected="the same size, scale, mean and deviation in both preprocessor_config.json",
                            hint="write the same into both, or leave augment out if there is any: then each has its "
                            "way",
                        )
        else:
            _require_same_tokens(self.teacher, self.student, f"method: {settings.method} compares representations")
            rows = context.data.split("train").slice(0, 1)
            teacher_examples = context.task.encode(rows, self.teacher.processor, None, context.max_length)
            self.teacher_examples = replace(self.examples, head=teacher_examples.head)
            self.comparison = _Comparison.between(settings.method, self.teacher.module, self.student.module)
        self.teacher.module.eval().requires_grad_(False)
        trainee = Trainee(
            self.student.module,
            self.examples,
            loss=self._loss,
            # The projections' weights are trained with the student and discarded.
            extra=list(self.comparison.projections.parameters()) if self.comparison else [],
            after_step=keep_zeros(self.student.module),
            validate=context.validator(self.student),
            first_token_only=settings.first_token_only,
            freeze_embeddings=settings.freeze_embeddings,
            augment=settings.augment,
            keep_best=settings.keep_best,
        )
        with nullcontext() if self.comparison is None else self.comparison.listening():
            train(trainee, settings, context.seed, context.progress, "distill")

    def _can_be_kept(self, examples: Examples) -> bool:
        """Return whether the teacher's answers fit in memory; dense predictions are large."""
        if LOCALIZES not in self.context.task.capabilities:
            return True
        return len(examples) * predict(self.teacher.module, examples.subset([0])).nbytes <= _KEPT_BYTES

    def _examples(self, model: TorchModel) -> Examples:
        labeled = self.context.encode("train", model)
        more = self.context.encode_unlabeled(model) if self.settings.use_unlabeled else None
        return labeled if more is None else labeled.with_unlabeled(more)

    def _loss(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        settings = self.settings
        options = self.comparison.options if self.comparison else {}
        task = self.context.task
        labeled = bool(settings.labels_weight)
        outputs = with_targets(task, module, batch, **options) if labeled else forward(module, batch, **options)
        mine = answers(self.examples, outputs, batch).float()
        if self.taught is not None:
            taught = self.taught[batch["index"].cpu()].to(mine.device)
            # Of answers by token, those of the longest example alone are as many as all are kept in.
            taught = taught[tuple(map(slice, mine.shape))] if taught.ndim > _ONE_ANSWER else taught
        else:
            with torch.no_grad():
                theirs = forward(self.teacher.module, batch, **options)
                taught = answers(self.teacher_examples, theirs, batch).float()
        if mine.shape != taught.shape and DUAL_ENCODER not in task.capabilities:
            raise StageError(
                f"The student answers with {mine.shape[-1]} numbers and the teacher with {taught.shape[-1]}.",
                expected="as many classes, or dimensions of an embedding",
                hint="put reduce_dimensions before or after both, not between them",
            )
        loss = settings.logits_weight * task.distance(mine, taught, settings.temperature)
        if labeled:
            loss = loss + settings.labels_weight * task.loss(outputs, batch["labels"])
        if self.comparison is not None and settings.representation_weight:
            mask = batch["attention_mask"].float()
            loss = loss + settings.representation_weight * self.comparison.loss(outputs, theirs, mask)
        return loss


def _require_same_tokens(teacher: TorchModel, student: TorchModel, what: str) -> None:
    if teacher.processor.get_vocab() != student.processor.get_vocab():
        raise StageError(
            f"{what} token by token, but teacher and student have different vocabularies.",
            hint="use method: logits, or trim the vocabulary after this stage",
        )


@dataclass
class _Comparison:
    """The loss on representations of one method. Projections map student widths to the teacher's."""

    method: str
    options: dict[str, Any]
    projections: nn.ModuleList = field(default_factory=nn.ModuleList)
    layer_map: Sequence[int] = ()
    attentions: dict[str, Attention] = field(default_factory=dict)
    captured: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    heads: int = 0

    @classmethod
    def between(cls, method: str, teacher: PreTrainedModel, student: PreTrainedModel) -> _Comparison:
        """Prepare ``method``. Raises `StageError` for head counts that it cannot compare."""
        options: dict[str, Any] = {} if method == "minilm" else {"output_hidden_states": True}
        comparison = cls(method, options)
        teacher_blocks, student_blocks = blocks(teacher), blocks(student)
        widths: tuple[int, int] = student.config.hidden_size, teacher.config.hidden_size
        if method in ("tinybert", "minilm"):
            comparison.heads = teacher_blocks[-1].require_attention().heads
            attentions = [block.require_attention() for block in (*teacher_blocks, *student_blocks)]
            counts = {count for attention in attentions for count in (attention.heads, attention.groups)}
            if len(counts) != 1:
                raise StageError(
                    f"method: {method} compares attention head by head; the models have {sorted(counts)} heads.",
                    hint="give the student the teacher's number of heads, or use method: logits or distilbert",
                )
        pairs, projections = [], 0
        if method == "tinybert":
            comparison.layer_map = uniform_layer_map(len(student_blocks), len(teacher_blocks))
            pairs = [(student_blocks[m], teacher_blocks[n - 1]) for m, n in enumerate(comparison.layer_map)]
            projections = len(student_blocks) + 1
        elif method == "minilm":
            pairs = [(student_blocks[-1], teacher_blocks[-1])]
        elif widths[0] != widths[1]:
            projections = 1
        comparison.projections = nn.ModuleList(nn.Linear(*widths, bias=False) for _ in range(projections))
        for index, (student_block, teacher_block) in enumerate(pairs):
            for role, block in (("student", student_block), ("teacher", teacher_block)):
                comparison.attentions[f"{role}.{index}"] = block.require_attention()
        return comparison

    def listening(self) -> AbstractContextManager[None]:
        """Keep the queries, keys and values of the attentions that are compared."""
        watched: dict[tuple[str, str], nn.Module] = {
            (owner, name): getattr(attention, name)
            for owner, attention in self.attentions.items()
            for name in ("query", "key", "value")
        }
        return capture_outputs(watched, self._keep)

    def _keep(self, key: tuple[str, str], output: torch.Tensor) -> None:
        owner, name = key
        self.captured[key] = self.attentions[owner].of(name, output)

    def loss(self, student: PreTrainedModel, teacher: PreTrainedModel, mask: torch.Tensor) -> torch.Tensor:
        """Return the method's loss on representations; ``mask`` is [B, L]."""
        if self.method == "distilbert":
            mine = student.hidden_states[-1].float()
            mine = self.projections[0](mine) if len(self.projections) else mine
            return hidden_cosine(mine, teacher.hidden_states[-1].float(), mask)
        if self.method == "minilm":
            return relation_kl(*self._scores(0, "query", "key"), mask) + relation_kl(
                *self._scores(0, "value", "value"), mask
            )
        loss = torch.zeros((), device=mask.device)
        for m, n in enumerate((0, *self.layer_map)):
            mine = self.projections[m](student.hidden_states[m].float())
            loss = loss + hidden_mse(mine, teacher.hidden_states[n].float(), mask)
        for index in range(len(self.layer_map)):
            loss = loss + attention_mse(*self._scores(index, "query", "key"), mask)
        return loss

    def _scores(self, index: int, left: str, right: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the student's and the teacher's relations of two projections of the pair ``index`` of attentions."""
        student, teacher = (
            scaled_scores(self.captured[owner, left].float(), self.captured[owner, right].float(), self.heads)
            for owner in (f"student.{index}", f"teacher.{index}")
        )
        return student, teacher
