"""Tasks, by their Hugging Face names. The names are importable without torch; `get_task` loads one file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.tasks.task import Task

_TASKS = {
    "text-classification": "compress.tasks.text_classification",
    "text-generation": "compress.tasks.text_generation",
    "image-classification": "compress.tasks.image_classification",
    "feature-extraction": "compress.tasks.feature_extraction",
    "automatic-speech-recognition": "compress.tasks.automatic_speech_recognition",
}
TASK_NAMES = tuple(_TASKS)
GENERATING = ("text-generation",)
"""Tasks whose models answer token by token and are judged on running text: it has no labels and no slices."""

EMBEDDING = ("feature-extraction",)
"""Tasks whose answer is an embedding."""

IMAGES = ("image-classification",)
"""Tasks whose inputs are images."""

WRITTEN = (*GENERATING, "automatic-speech-recognition")
"""Tasks whose graphs are written node by node from a checkpoint, rather than traced from a module."""


def get_task(name: str) -> Task:
    """The task of that name. Raises `KeyError` for a name outside `TASK_NAMES`."""
    task: Task = import_module(_TASKS[name]).TASK
    return task
