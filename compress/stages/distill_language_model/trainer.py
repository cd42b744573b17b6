"""How a language model learns from another: what the student reads, what it is scored on, and what comes out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.models.config_checks import max_positions
from compress.models.model import TorchModel
from compress.models.structure import stacks
from compress.stages.base import Context
from compress.stages.distill_language_model.settings import LanguageDistillation, with_remaining_budget
from compress.stages.distill_language_model.student import StudentWithLoss, block_pairs, shared_tokens
from compress.stages.recovery.quantized_recovery import adapt
from compress.stages.recovery.settings import AdapterTraining
from compress.stages.recovery.trainer import Body, Judge, Quality, Recovered, head_of, states_of, token_shares
from compress.stages.sparsify.magnitude import keep_zeros
from compress.stages.training import processes
from compress.stages.training.checkpoint import TrainingCheckpoint
from compress.stages.training.length import Length
from compress.stages.training.loop import Trainee, train
from compress.stages.training.sequences import TokenSequences, check_enough, training_sequences
from compress.stages.training.sharding import Sharded
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
    restore_zeros = keep_zeros(student.module)
    trainer = LanguageDistillationTrainer.between(settings, teacher, student, windows, context)
    adapted = None
    if settings.lora is not None:
        adapter_settings = AdapterTraining(rank=settings.lora, dropout=settings.dropout or 0.0)
        adapted = adapt(student.module, adapter_settings, context.seed)
    if settings.memory.gradient_checkpointing:
        try:
            student.module.activation_checkpointing_enable()
        except ValueError as error:
            raise StageError(
                f"A {student.module.config.model_type!r} model cannot compute its blocks again on the way back.",
                where="memory.gradient_checkpointing",
                hint="leave it out; a smaller sequence_length saves memory too",
            ) from error
    trainer.train(None if adapted is not None else restore_zeros)
    if settings.memory.gradient_checkpointing:
        student.module.activation_checkpointing_disable()
    if adapted is not None:
        student.module = adapted.merge_and_unload(safe_merge=True)
        if restore_zeros is not None:
            restore_zeros(0, 0)
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
    judge: Judge | None
    blocks: tuple[list[nn.Module], list[nn.Module]] = ([], [])
    """Of pupil and teacher, where all processes share them."""
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
        module, weights = teacher.module.eval().requires_grad_(False), settings.loss
        mine, theirs, complete = shared_tokens(weights, teacher, student, windows)
        bodies = Body(student.module, mine), Body(module, theirs)
        judged = complete and bool(weights.logits_weight or weights.labels_weight)
        for body in bodies if judged else bodies[: bool(weights.labels_weight)]:
            body.require_plain_head(windows.held_out)
        dtype = torch.bfloat16 if uses_bf16(settings.precision) else torch.float32
        pairs = block_pairs(student.module, module) if weights.hidden_weight else []
        widths = student.module.config.hidden_size, module.config.hidden_size
        torch.manual_seed(context.seed)
        student_with_loss = StudentWithLoss(bodies[0], weights, dtype, pairs, widths)
        if dtype == torch.bfloat16:
            bodies[1].lower()
        judge = Judge(bodies[0], bodies[1], windows.held_out, 1, dtype) if judged else None
        shares = settings.memory.fsdp and processes.several()

        def last_states(body: Body, ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {_STATES: states_of(body, ids, dtype)[0].to(torch.bfloat16)}

        states = TeacherStates(bodies[1], last_states, _folder(settings, bodies[1], windows, dtype, context), shares)
        blocks = (_blocks(student.module), _blocks(module)) if shares else ([], [])
        return cls(settings, student_with_loss, bodies[1], windows, context, dtype, states, judge, blocks)

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

    def train(self, after_step: Callable[[int, int], None] | None) -> None:
        """Train the student in place, and report the change."""
        context, judge = self.context, self.judge
        weights = self.settings.loss.logits_weight, self.settings.loss.labels_weight
        quality_before = None if judge is None else judge.quality()
        shared = self._shared() if self.blocks[0] else None
        student = self.student if shared is None else shared.module
        if shared is not None and after_step is not None:
            after_step = keep_zeros(student.body.causal)

        def quality(judge: Judge) -> Quality:
            with contextlib.nullcontext() if shared is None else shared.whole():
                return judge.quality()

        trainee = Trainee(
            student,
            self.windows.train,
            self.loss,
            after_step=after_step,
            validate=None if judge is None else lambda: -quality(judge).error(*weights),
            length=self.length(),
            pieces=self.pieces,
            together=True,
            told=self._told,
            kept=None if processes.several() else TrainingCheckpoint(context.scratch),
            stopped=context.note,
            known=student.body.causal,
            freeze_embeddings=self.settings.freeze_embeddings,
            keep_best=self.settings.keep_best,
        )
        self._began = time.monotonic()
        train(trainee, self.settings, context.seed, context.progress, "distill_language_model")
        # The loop has put back the state that was judged best, by this run or by one that was killed.
        after = None if judge is None else quality(judge)
        if shared is not None:
            shared.put_back()
        context.add_table("Loss while training", ("tokens", "loss"), self.curve)
        done = f"{self._last * self.step_tokens:,} tokens, {self._rate():,.0f} a second"
        if self.states.answered or self.states.found:
            done += f"; the teacher read {self.states.answered:,} windows, {self.states.found:,} were known"
        if quality_before is not None and after is not None:
            done = f"{Recovered(quality_before, after)}; {done}"
        context.note(f"distill_language_model: {done}")

    def _shared(self) -> Sharded[StudentWithLoss]:
        """Shard student and teacher over the processes, for everything that reads them while training."""
        shared = Sharded(self.student, self.blocks[0])
        self.teacher = self.states.teacher = Sharded(self.teacher, self.blocks[1], apart=False).module
        if self.judge is not None:
            self.judge.student, self.judge.teacher = shared.module.body, self.teacher
        return shared

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
        taught: Any = None
        states: torch.Tensor | None = None
        with torch.no_grad():
            if self.student.pairs:
                taught = self.teacher.outputs(ids, output_hidden_states=True)
                states = taught.last_hidden_state
            elif self.settings.loss.logits_weight:
                states = self.states.of(ids)[_STATES]
        teacher_states = states if self.settings.loss.logits_weight else None
        loss: torch.Tensor = module(
            batch, lambda: None if teacher_states is None else head_of(self.teacher, teacher_states, self.dtype), taught
        )
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


def _blocks(module: nn.Module) -> list[nn.Module]:
    return [block for stack in stacks(module).values() for block in stack]


def _folder(
    settings: LanguageDistillation, teacher: Body, windows: TokenSequences, dtype: torch.dtype, context: Context
) -> Path | None:
    """Return the folder of the cached teacher states, or None if they are not cached."""
    if not (settings.memory.cache_teacher_states and settings.loss.logits_weight and not settings.loss.hidden_weight):
        return None
    key = states_key(teacher, dtype)
    folder = context.scratch / "states" if context.shared is None else context.shared(key)
    return with_room(folder, windows, 2 * teacher.causal.config.hidden_size, "distill_language_model", context)
