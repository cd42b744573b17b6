"""Train a student to answer as its teacher does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, model_validator

from compress.checkpoints.torch_model import TorchModel
from compress.frozen import Frozen
from compress.stage.stage import Context, Needs, Stage
from compress.tasks import EMBEDDING, IMAGES
from compress.training.config import FIRST_TOKEN_ONLY, Training


class Student(Frozen):
    """Where the student comes from: layers, config or model. Without any, the stage's input is the student."""

    layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="indices of the input's layers to keep, counted from 0"
    )
    config: dict[str, Any] | None = Field(
        None, description="changes to the input's config, e.g. {hidden_size: 192}; weights start anew"
    )
    model: str | None = Field(None, description="Hugging Face id, local folder or `sample:NAME`")
    random_weights: bool = Field(
        False, description="of `model` only config.json and the processor are read, and weights drawn from the seed"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Student:
        if self.random_weights and self.model is None:
            raise ValueError("model, whose config.json says for what weights are drawn")
        if sum(value is not None for value in (self.layers, self.config, self.model)) != 1:
            raise ValueError("exactly one of layers, config and model")
        return self


class Distill(Training, Stage[TorchModel, TorchModel]):
    """Knowledge distillation (Hinton et al. 2015), with the representation losses of three papers.

    ``distilbert``: cosine of the last hidden states (Sanh et al. 2019, section 2). ``tinybert``: MSE of
    embeddings, hidden states and attention scores, layers mapped uniformly (Jiao et al. 2020, section 3.1).
    ``minilm``: KL of the last layer's attention and value relations (Wang et al. 2020, section 3.1).
    A learned projection joins widths that differ.

    Where a task's answers are embeddings, the loss on them is their squared distance (Reimers and Gurevych 2020) in
    place of the one on logits.
    """

    packages = ("torch", "transformers", "accelerate")
    tasks = ("text-classification", "image-classification", "feature-extraction")
    kind: Literal["distill"] = "distill"
    teacher: str | None = Field(None, description="label of the stage whose output teaches; default: the input")
    student: Student | None = Field(None, description="what is trained; default: the input")
    method: Literal["logits", "distilbert", "tinybert", "minilm"] = Field(
        "logits", description="the loss on representations, beside the one on the answers: logits, or embeddings"
    )
    temperature: float = Field(2.0, gt=0, description="softens both sides of the loss on logits")
    logits_weight: float = Field(1.0, ge=0, description="weight of the loss on logits or embeddings")
    labels_weight: float = Field(0.0, ge=0, description="weight of the task's own loss on labeled examples")
    representation_weight: float = Field(1.0, ge=0, description="weight of the method's loss on representations")
    use_unlabeled: bool = Field(False, description="also learn from the recipe's unlabeled text")
    first_token_only: bool = FIRST_TOKEN_ONLY

    @model_validator(mode="after")
    def _two_models(self) -> Distill:
        if self.teacher is None and self.student is None:
            raise ValueError("a teacher (label of an earlier stage), a student, or both")
        if self.first_token_only and self.method != "logits":
            raise ValueError("no first_token_only: the method compares representations of every token")
        return self

    def idle_fields(self, task: str) -> tuple[str, ...]:
        """Those of classes, where answers are embeddings; those of tokens and texts, where inputs are images."""
        others: tuple[str, ...] = ("temperature", "labels_weight", "first_token_only") if task in EMBEDDING else ()
        if task in IMAGES:
            others = ("method", "representation_weight", "use_unlabeled", "first_token_only")
        idle = tuple(name for name in others if getattr(self, name) != type(self).model_fields[name].default)
        return (*super().idle_fields(task), *idle)

    def needs(self) -> Needs:
        """Training examples, with labels if these have a say, and unlabeled text if asked for."""
        labels = bool(self.labels_weight or self.use_unlabeled)
        return Needs(splits=("train",), unlabeled=self.use_unlabeled, without_labels=not labels)

    def refers_to(self) -> tuple[str, ...]:
        """The teacher's label."""
        return (self.teacher,) if self.teacher else ()

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Train the student on the ``train`` split, and on unlabeled text if asked for."""
        from compress.training.distillation import Lesson, make_student

        teacher = context.earlier(self.teacher) if self.teacher else model
        student = make_student(self.student, model, teacher, context)
        Lesson(self, teacher, student, context).teach()
        return student


ANOTHER_STUDENT = (
    "another student of random weights than a model that is read elsewhere in the recipe; "
    "`student: {config: {}}` draws weights by the config of the stage's input"
)


def read_and_drawn(model: str, stages: Iterable[object]) -> str | None:
    """A name that stands for weights that are read and, as a student, for drawn ones; models are known by their names.

    ``model`` is the starting model.
    """
    students = [stage.student for stage in stages if isinstance(stage, Distill) and stage.student]
    drawn = {student.model for student in students if student.random_weights}
    read = {model, *(student.model for student in students if not student.random_weights)}
    return min((name for name in drawn & read if name is not None), default=None)
