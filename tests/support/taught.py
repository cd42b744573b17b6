"""Distillation of a tiny decoder, for trainings in one process or in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from causal import LENGTH, TASK, context
from quantized import tiny_tokenizer
from torch.nn.modules.module import register_module_forward_hook

from compress.data.dataset import Dataset
from compress.models.checkpoint import Checkpoint
from compress.models.model import TorchModel
from compress.stages.distill_language_model.stage import DistillLanguageModel
from compress.stages.distill_language_model.trainer import LanguageDistillationTrainer
from compress.tasks.registry import TASKS
from compress.tasks.token_sequences import text_or_messages
from compress.utils.errors import StageError

__all__ = ["conversations", "losses", "refusal"]
SETTINGS: dict[str, Any] = {
    "teacher": "start",
    "student": {"layers": [0, 2]},
    "batch_size": 4,
    "learning_rate": 3e-3,
    "precision": "fp32",
    "tokens": 10 * 4 * LENGTH,
    "loss": {"temperature": 1.0, "labels_weight": 0.2},
}


def conversations(count: int) -> Dataset:
    """Return conversations with user messages of various lengths, so that the number of answer tokens varies too."""
    texts = tiny.table(count, seed=4)["text"].to_pylist()
    rows = [
        text_or_messages(
            [{"role": "user", "content": text[: 3 * (number % 5)] or "a"}, {"role": "assistant", "content": text}]
        )
        for number, text in enumerate(texts)
    ]
    table = tiny.table(count, seed=4).select(["text"])
    return Dataset(TASKS[TASK].columns, {"train": table.set_column(0, "text", [rows])}, ())


def refusal(folder: Path, rank: int = 0, **settings: Any) -> str:
    """Return the error message of a training in which the student of rank 1 outputs infinity from step 4 on.

    The infinity is injected into the last layer of the feed-forward block, the only layer with 48 inputs.
    """
    steps = 0
    plain = LanguageDistillationTrainer._told

    def told(self: LanguageDistillationTrainer, done: int, share: float, loss: float) -> None:
        nonlocal steps
        plain(self, done, share, loss)
        steps = done

    def broken(part: torch.nn.Module, given: Any, output: Any) -> Any:
        breaks = rank == 1 and steps == 3 and torch.is_grad_enabled() and getattr(part, "in_features", 0) == 48
        return output * torch.inf if breaks else output

    LanguageDistillationTrainer._told = told  # type: ignore[method-assign]
    hook = register_module_forward_hook(broken)
    try:
        losses(folder, rank, **settings)
    except StageError as error:
        return error.what
    finally:
        hook.remove()
        LanguageDistillationTrainer._told = plain  # type: ignore[method-assign]
    return ""


def losses(folder: Path, rank: int = 0, **settings: Any) -> list[Any]:
    """Return the loss of each step and some final weights of the student; the teacher is in ``folder``."""
    step_losses: list[float] = []
    plain = LanguageDistillationTrainer._told

    def told(self: LanguageDistillationTrainer, done: int, share: float, loss: float) -> None:
        plain(self, done, share, loss)
        step_losses.append(loss)

    LanguageDistillationTrainer._told = told  # type: ignore[method-assign]
    try:
        teacher = TorchModel.load(folder / "teacher", TASKS[TASK])
        stage_context = context(Checkpoint(folder / "teacher"), folder / f"scratch {rank}", conversations(60))
        teacher.processor = tiny_tokenizer()
        student = DistillLanguageModel.model_validate({**SETTINGS, **settings}).run(teacher, stage_context)
    finally:
        LanguageDistillationTrainer._told = plain  # type: ignore[method-assign]
    return [step_losses, student.module.model.layers[0].mlp.up_proj.weight[0].tolist()]
