"""How a language model learns from another: what the student reads, what it is scored on, and what comes out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from compress.models.config_checks import max_positions
from compress.models.model import TorchModel
from compress.stages.base import Context
from compress.stages.distill_language_model.settings import LanguageDistillation, with_remaining_budget
from compress.stages.distill_language_model.student import StudentWithLoss, shared_tokens
from compress.stages.recovery.trainer import Body, Judge, Recovered, head_of, states_of, token_shares
from compress.stages.sparsify.magnitude import keep_zeros
from compress.stages.training import processes
from compress.stages.training.checkpoint import TrainingCheckpoint
from compress.stages.training.length import Length
from compress.stages.training.loop import Trainee, train
from compress.stages.training.sequences import TokenSequences, check_enough, training_sequences
from compress.stages.training.synthetic_data import with_synthetic_text
from compress.stages.training.teacher_states import TeacherStates, states_key, with_room
from compress.utils.errors import DataError, StageError
from compress.utils.torch_device import uses_bf16

_AT_ONCE = 2048
"""Tokens that go forwards and backwards together; more of a step's follow one by one."""
_NOTES = 20
"""How often it is said how far the training is."""
_STATES = "states"


def distill_language_model(
    settings: LanguageDistillation, teacher: TorchModel, student: TorchModel, context: Context
) -> TorchModel:
    """Train ``student`` in place, and return it.

    Args:
        settings: Loss, text and training.
        teacher: Model whose distributions the student learns.
        student: Model that is trained.
        context: Data and folders of the stage.

    Raises:
        StageError: The models cannot be compared.
        DataError: The text is too short.
    """
    windows = training_sequences(student.processor, settings, context)
    length = settings.sequence_length or context.max_length
    for model in (teacher, student):
        positions = max_positions(model.module.config.to_dict())
        if positions is not None and length > positions:
            raise DataError(
                f"Windows have {length} tokens, and a {model.module.config.model_type!r} model reads {positions}.",
                where="sequence_length",
                expected=f"at most {positions}",
            )
    if settings.teacher_writes is not None:
        bf16, tokenizer = uses_bf16(settings.precision), student.processor
        windows, seconds = with_synthetic_text(windows, settings.teacher_writes, teacher, tokenizer, context, bf16)
        settings = with_remaining_budget(settings, seconds)
        check_enough(windows.train.inputs, windows.held_out.inputs, settings.batch_size, length)
    trainer = LanguageDistillationTrainer.between(settings, teacher, student, windows, context)
    if settings.memory.gradient_checkpointing:
        try:
            student.module.activation_checkpointing_enable()
        except ValueError as error:
            raise StageError(
                f"transformers has no gradient checkpointing for a {student.module.config.model_type!r} model.",
                where="memory.gradient_checkpointing",
                hint="leave it out; a smaller sequence_length saves memory too",
            ) from error
    trainer.train()
    if settings.memory.gradient_checkpointing:
        student.module.activation_checkpointing_disable()
    student.module.requires_grad_(True).eval()
    return student


@dataclass
class LanguageDistillationTrainer:
    """Trainer of one distillation: the student, its teacher, the sequences and the judge."""

    settings: LanguageDistillation
    student: StudentWithLoss
    teacher: Body
    windows: TokenSequences
    context: Context
    dtype: torch.dtype
    states: TeacherStates
    judge: Judge
    curve: list[tuple[int, float]] = field(default_factory=list)
    _seen: list[float] = field(default_factory=list)
    _began: float = 0.0
    _first: int = 0
    _last: int = 0
    _noted: int = 0

    @classmethod
    def between(
        cls,
        settings: LanguageDistillation,
        teacher: TorchModel,
        student: TorchModel,
        windows: TokenSequences,
        context: Context,
    ) -> LanguageDistillationTrainer:
        """Prepare both models.

        Args:
            settings: Settings of the stage.
            teacher: Teacher model.
            student: Student model.
            windows: Token sequences of the training.
            context: Context of the stage.

        Raises:
            StageError: If the predictions of the two models cannot be compared.
        """
        module = teacher.module.eval().requires_grad_(False)
        mine, theirs = shared_tokens(teacher, student, windows)
        bodies = Body(student.module, mine), Body(module, theirs)
        for body in bodies:
            body.require_plain_head(windows.held_out)
        dtype = torch.bfloat16 if uses_bf16(settings.precision) else torch.float32
        if dtype == torch.bfloat16:
            bodies[1].lower()
        judge = Judge(bodies[0], bodies[1], windows.held_out, 1, dtype)

        def last_states(body: Body, ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {_STATES: states_of(body, ids, dtype)[0].to(torch.bfloat16)}

        states = TeacherStates(bodies[1], last_states, _folder(settings, bodies[1], windows, dtype, context))
        student_with_loss = StudentWithLoss(bodies[0], settings.loss, dtype)
        return cls(settings, student_with_loss, bodies[1], windows, context, dtype, states, judge)

    @property
    def step_tokens(self) -> int:
        """Tokens that a step learns from."""
        return self.settings.batch_size * len(self.windows.train.inputs[0]["input_ids"])

    def length(self) -> Length:
        """Return the length of the training."""
        settings = self.settings
        batches = len(self.windows.train) // settings.batch_size
        if settings.tokens is not None:
            return Length(max(1, settings.tokens // self.step_tokens))
        return Length(max(1, round(settings.epochs * batches)), settings.seconds)

    def train(self) -> None:
        """Train the student in place, and report the change."""
        context = self.context
        weights = self.settings.loss.logits_weight, self.settings.loss.labels_weight
        quality_before = self.judge.quality()
        trainee = Trainee(
            self.student,
            self.windows.train,
            self.loss,
            after_step=keep_zeros(self.student.body.causal),
            validate=lambda: self.judge.quality().error(*weights),
            validates_loss=True,
            length=self.length(),
            pieces=self.pieces,
            together=True,
            told=self._told,
            kept=None if processes.num_processes() > 1 else TrainingCheckpoint(context.scratch),
            stopped=context.note,
            freeze_embeddings=self.settings.freeze_embeddings,
            keep_best=self.settings.keep_best,
        )
        self._began = time.monotonic()
        train(trainee, self.settings, context.seed, context.progress, "distill_language_model")
        # The loop has put back the state that was judged best, by this run or by one that was killed.
        recovered = Recovered(quality_before, self.judge.quality())
        context.add_table("Loss while training", ("tokens", "loss"), self.curve)
        done = f"{self._last * self.step_tokens:,} tokens, {self._rate():,.0f} a second"
        if self.states.answered or self.states.found:
            done += f"; teacher states: {self.states.answered:,} windows computed, {self.states.found:,} cached"
        context.note(f"distill_language_model: {recovered}; {done}")

    def pieces(self, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Split a batch into parts of `_AT_ONCE` tokens, with each token's share of the loss."""
        ids = batch["input_ids"]
        counted = batch.pop("labels", None)
        following = ids.roll(-1, 1)
        token_weights, labels_each = token_shares(ids, counted)
        size = max(1, _AT_ONCE // ids.shape[1])
        columns = {"input_ids": ids, "index": batch["index"]}
        flat_columns = {"each": token_weights, "labels_each": labels_each, "following": following}
        return [
            {name: values[start : start + size] for name, values in columns.items()}
            | {name: values[start : start + size].flatten() for name, values in flat_columns.items()}
            for start in range(0, len(ids), size)
        ]

    def loss(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the share of the batch's loss that a part of it has."""
        ids = batch["input_ids"]
        self.teacher.move(ids.device)
        taught = None
        if self.settings.loss.logits_weight:
            with torch.no_grad():
                taught = head_of(self.teacher, self.states.of(ids)[_STATES], self.dtype)
        loss: torch.Tensor = module(batch, taught)
        return loss

    def _told(self, done: int, share: float, loss: float) -> None:
        self._first = self._first or done
        self._seen.append(loss)
        self._last = done
        if int(share * _NOTES) <= self._noted:
            return
        self._noted = int(share * _NOTES)
        mean = sum(self._seen) / len(self._seen)
        self._seen.clear()
        self.curve.append((done * self.step_tokens, round(mean, 5)))
        self.context.progress.note(
            f"distill_language_model: {share:.0%}, {done * self.step_tokens:,} tokens, loss {mean:.4f}, "
            f"{self._rate():,.0f} tokens a second"
        )

    def _rate(self) -> float:
        """Tokens a second, in this run."""
        steps = self._last - self._first + 1 if self._first else 0
        return steps * self.step_tokens / max(time.monotonic() - self._began, 1e-9)


def _folder(
    settings: LanguageDistillation, teacher: Body, windows: TokenSequences, dtype: torch.dtype, context: Context
) -> Path | None:
    """Return the folder of the cached teacher states, or None if they are not cached."""
    if not (settings.memory.cache_teacher_states and settings.loss.logits_weight):
        return None
    key = states_key(teacher, dtype)
    folder = context.scratch / "states" if context.shared is None else context.shared(key)
    return with_room(folder, windows, 2 * teacher.causal.config.hidden_size, "distill_language_model", context)
