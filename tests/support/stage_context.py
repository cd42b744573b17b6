"""The context of a stage, progress that records its notes, and recipes over files in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from compress.data.dataset import Dataset
from compress.stages.base import Context
from compress.tasks.registry import TASKS
from compress.utils.progress import Progress, SilentProgress


class Notes(SilentProgress):
    """Progress that records its notes and passes each of them to ``stop``, which may raise an error."""

    def __init__(self, stop: Callable[[str], None] | None = None) -> None:
        self.said: list[str] = []
        self._stop = stop

    def note(self, message: str) -> None:
        self.said.append(message)
        if self._stop is not None:
            self._stop(message)

    def detail(self, message: str) -> None:
        self.note(message)


def refuse_earlier(label: str) -> Any:
    """Fail the test when a stage requests the output of an earlier one."""
    raise AssertionError(f"no earlier stage {label!r}")


def stage_context(
    task: str,
    data: Dataset,
    max_length: int = 24,
    seed: int = 0,
    progress: Progress | None = None,
    earlier: Callable[[str], Any] = refuse_earlier,
    resolve: Callable[[str], Path] = Path,
    scratch: Path = Path("no scratch"),
) -> Context:
    """Return the context of a stage of a recipe for ``task``."""
    return Context(TASKS[task], data, max_length, seed, progress or SilentProgress(), earlier, resolve, scratch)


def write_recipe(
    folder: Path,
    task: str,
    splits: Sequence[str] | dict[str, str],
    stages: Sequence[Any],
    name: str = "tiny",
    **fields: Any,
) -> Path:
    """Write ``name``.yaml for ``model/`` and the splits, which are a mapping to files or names of JSONL files.

    ``max_length`` and ``labels`` among ``fields`` become fields of the data.
    """
    data: dict[str, Any] = {
        "splits": splits if isinstance(splits, dict) else {name: f"{name}.jsonl" for name in splits}
    }
    data |= {field: fields.pop(field) for field in ("max_length", "labels") if field in fields}
    values = {"name": name, "task": task, "model": "model", "data": data, "stages": list(stages), **fields}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
