"""The context of a stage for language models: a tiny teacher, tiny texts and short windows."""

from __future__ import annotations

from pathlib import Path

import tiny
from stage_context import Notes as Notes
from stage_context import stage_context

from compress.data.dataset import Dataset
from compress.models.checkpoint import Checkpoint
from compress.models.model import TorchModel
from compress.stages.base import Context
from compress.tasks.registry import TASKS
from compress.utils.progress import Progress

TASK = "text-generation"
LENGTH = 32


def text_data(train: int = 64, validation: int = 24) -> Dataset:
    """Return splits of toy sentences of about 40 bytes each."""
    tables = {"train": tiny.table(train, seed=1).select(["text"])}
    if validation:
        tables["validation"] = tiny.table(validation, seed=3).select(["text"])
    return Dataset(TASKS[TASK].columns, tables, ())


def context(
    teacher: Checkpoint, scratch: Path, data: Dataset | None = None, seed: int = 0, progress: Progress | None = None
) -> Context:
    """Return a context in which every earlier stage resolves to ``teacher``."""

    def earlier(label: str) -> TorchModel:
        return TorchModel.load(teacher.folder, TASKS[TASK])

    return stage_context(TASK, data or text_data(), LENGTH, seed, progress, earlier, scratch=scratch)
