"""How a student learns from a teacher: where the student comes from, what it is shown, what it is scored on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from compress.models.model import TorchModel
from compress.models.pruned_layer_sizes import CHANNELS_KEY
from compress.models.transformer_pruning import HEADS_KEY, NEURONS_KEY, drop_pooler, keep_layers
from compress.numerics.embeddings import normalized
from compress.stages.base import Context
from compress.stages.distill.projection import pooled_like, projected
from compress.stages.distill.replaced_words import replace_words
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

    A new text encoder gets a linear layer after pooling if its embeddings have another width than the teacher's.

    Args:
        origin: Settings of the student, or None for the stage's input.
        model: Input of the stage.
        teacher: Teacher, whose classes the student gets.
        context: Context of the stage.

    Raises:
        StageError: If config changes do not make a valid model.
    """
    student = _student_of(origin, model, teacher, context)
    is_new = origin is not None and origin.layers is None
    if is_new and {EMBEDS, TAKES_TEXT} <= context.task.capabilities:
        torch.manual_seed(context.seed)
        student.processor = projected(student.processor, teacher.processor.modules.dimensions)
    return student


def _student_of(origin: Student | None, model: TorchModel, teacher: TorchModel, context: Context) -> TorchModel:
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
        return TorchModel(module.eval(), pooled_like(model.processor, module.config.hidden_size))
    return TorchModel(module.eval(), model.processor)


class DistillationTrainer:
    """Trainer of one distillation: the teacher's answers, the losses and the training run.

    The teacher answers once, before training, and may have another tokenizer than the student. Where images are varied,
    the teacher answers what the student is shown (Beyer et al. 2022, section 3.1), so both must prepare them alike.
    """

    def __init__(self, settings: Distillation, teacher: TorchModel, student: TorchModel, context: Context) -> None:
        self.settings = settings
        self.teacher = teacher
        self.student = student
        self.context = context
        self.more = self._more_rows()
        self.examples = self._examples(student)
        if settings.labels_weight and self.examples.labels is None:
            raise StageError("The training examples have no labels to train on.", hint="leave labels_weight out")
        self.taught: torch.Tensor | None = None

    def train(self) -> None:
        """Train the student in place. Raises `StageError` if the two models cannot be compared."""
        settings, context = self.settings, self.context
        examples = self._examples(self.teacher)
        if PREDICTS_TOKENS in context.task.capabilities:
            # As many answers as there are tokens in the vocabulary, for each masked one, are not to be kept.
            if self.teacher.processor.get_vocab() != self.student.processor.get_vocab():
                raise StageError(
                    "fill-mask compares answers token by token, but teacher and student have different vocabularies.",
                    hint="trim the vocabulary after this stage",
                )
        elif settings.augment is None and self._can_be_kept(examples):
            module, bf16 = self.teacher.module.eval(), uses_bf16(settings.precision)
            with shortened(module, settings.first_token_only):
                text = "distill: predictions of the teacher"
                taught = predict(module, examples, bf16=bf16, progress=context.progress, description=text)
            self.taught = torch.from_numpy(taught)
        else:
            for theirs, mine in zip(examples.inputs[:_COMPARED], self.examples.inputs[:_COMPARED], strict=True):
                if not np.array_equal(theirs["pixel_values"], mine["pixel_values"]):
                    raise StageError(
                        "The teacher answers the images that the student is shown, but the two prepare images "
                        "differently.",
                        expected="the same size, scale, mean and deviation in both preprocessor_config.json",
                        hint="write the same into both, or remove augment: then each uses its own preprocessing",
                    )
        self.teacher.module.eval().requires_grad_(False)
        trainee = Trainee(
            self.student.module,
            self.examples,
            loss=self._loss,
            after_step=keep_zeros(self.student.module),
            validate=self._validator(),
            first_token_only=settings.first_token_only,
            freeze_embeddings=settings.freeze_embeddings,
            augment=settings.augment,
            keep_best=settings.keep_best,
        )
        train(trainee, settings, context.seed, context.progress, "distill")

    def _validator(self) -> Callable[[], float] | None:
        """Return a function that scores the student on the validation split, or None without one.

        Embeddings are scored by their cosine to the teacher's, as a student may retrieve well in a space of its own.
        """
        context, student = self.context, self.student
        capabilities = context.task.capabilities
        if EMBEDS not in capabilities or DUAL_ENCODER in capabilities or "validation" not in context.data.splits:
            return context.validator(student)
        taught = normalized(predict(self.teacher.module, context.encode("validation", self.teacher)))
        examples = context.encode("validation", student)

        def cosine() -> float:
            return float((normalized(predict(student.module, examples)) * taught).sum(axis=1).mean())

        return cosine

    def _can_be_kept(self, examples: Examples) -> bool:
        """Return whether the teacher's answers fit in memory; dense predictions are large."""
        if LOCALIZES not in self.context.task.capabilities:
            return True
        return len(examples) * predict(self.teacher.module, examples.subset([0])).nbytes <= _KEPT_BYTES

    def _examples(self, model: TorchModel) -> Examples:
        labeled = self.context.encode("train", model)
        for rows in self.more:
            labeled = labeled.with_unlabeled(self.context.encode_rows(rows, model))
        return labeled

    def _more_rows(self) -> list[pa.Table]:
        """Return the rows that only the teacher labels: the recipe's unlabeled texts, and texts with other words."""
        settings, data = self.settings, self.context.data
        more = [data.unlabeled] if settings.use_unlabeled and data.unlabeled is not None else []
        if settings.replace_words:
            (column,) = (column.name for column in self.context.task.columns if not column.label)
            texts = [text for rows in (data.split("train"), *more) for text in rows[column].to_pylist()]
            varied = replace_words(texts, settings.replace_words, self.context.seed)
            self.context.note(f"distill: {len(varied):,} texts with replaced words, made of {len(texts):,}")
            more.append(pa.table({column: pa.array(varied, pa.string())}))
        return more

    def _loss(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        settings, task = self.settings, self.context.task
        labeled = bool(settings.labels_weight)
        outputs = with_targets(task, module, batch) if labeled else forward(module, batch)
        mine = answers(self.examples, outputs, batch).float()
        if self.taught is not None:
            taught = self.taught[batch["index"].cpu()].to(mine.device)
            # Of answers by token, those of the longest example alone are as many as all are kept in.
            taught = taught[tuple(map(slice, mine.shape))] if taught.ndim > _ONE_ANSWER else taught
        else:
            with torch.no_grad():
                taught = answers(self.examples, forward(self.teacher.module, batch), batch).float()
        if mine.shape != taught.shape and DUAL_ENCODER not in task.capabilities:
            raise StageError(
                f"The student has {mine.shape[-1]} outputs and the teacher {taught.shape[-1]}.",
                expected="as many classes, or dimensions of an embedding",
                hint="put reduce_dimensions before or after both, not between them",
            )
        loss = task.distance(mine, taught, settings.temperature)
        return loss + settings.labels_weight * task.loss(outputs, batch["labels"]) if labeled else loss
