"""What a stage for language models gets beside its model: a teacher, text and windows, all of them tiny."""

from __future__ import annotations

from pathlib import Path

import tiny

from compress.data.dataset import Dataset
from compress.models.checkpoint import Checkpoint
from compress.models.model import TorchModel
from compress.stages.base import Context
from compress.tasks.registry import get_task
from compress.utils.progress import Progress, SilentProgress

TASK = "text-generation"
LENGTH = 32


def text_data(train: int = 64, validation: int = 24) -> Dataset:
    """Rows of toy sentences, some 40 bytes each."""
    tables = {"train": tiny.table(train, seed=1).select(["text"])}
    if validation:
        tables["validation"] = tiny.table(validation, seed=3).select(["text"])
    return Dataset(get_task(TASK).columns, tables, ())


def context(
    teacher: Checkpoint, scratch: Path, data: Dataset | None = None, seed: int = 0, progress: Progress | None = None
) -> Context:
    """A context whose every earlier stage is ``teacher``."""
    made = progress or SilentProgress()
    return Context(
        get_task(TASK),
        data or text_data(),
        LENGTH,
        seed,
        made,
        lambda label: TorchModel.load(teacher.folder, get_task(TASK)),
        Path,
        scratch,
    )


class Notes(SilentProgress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)
