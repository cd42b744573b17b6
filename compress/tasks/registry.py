"""Registry of tasks by Hugging Face name, including those of other packages (entry points `compress.tasks`).

Importing this imports neither torch nor numpy.

Tasks of plug-ins are added to the built-in ones, and may not replace them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.plugins import UnusablePluginError, load_extensions
from compress.tasks import (
    audio_classification,
    automatic_speech_recognition,
    feature_extraction,
    fill_mask,
    graph_agreement,
    image_classification,
    image_feature_extraction,
    image_segmentation,
    image_text_to_text,
    object_detection,
    question_answering,
    text2text_generation,
    text_classification,
    text_generation,
    text_ranking,
    token_classification,
    zero_shot_image_classification,
)
from compress.tasks.capability import TAKES_AUDIO, TAKES_IMAGES, Capabilities, suits
from compress.tasks.task import Task

_MEMBERS = (*Task.__annotations__, *sorted(Task.__abstractmethods__))
BUILT_IN: tuple[Task, ...] = (
    text_classification.TASK,
    text_generation.TASK,
    image_classification.TASK,
    feature_extraction.TASK,
    automatic_speech_recognition.TASK,
    token_classification.TASK,
    text_ranking.TASK,
    fill_mask.TASK,
    question_answering.TASK,
    audio_classification.TASK,
    text2text_generation.TASK,
    image_feature_extraction.TASK,
    zero_shot_image_classification.TASK,
    object_detection.TASK,
    image_segmentation.TASK,
    image_text_to_text.TASK,
    graph_agreement.TASK,
)
"""Tasks in the order in which messages list them."""


def _accept(found: Any) -> Task:
    """Return the object as a task. Raises `UnusablePluginError` if it lacks a member of `Task`."""
    if isinstance(found, type):
        raise UnusablePluginError(f"{found.__name__} is a class; expected an object, such as {found.__name__}()")
    missing = [name for name in _MEMBERS if not hasattr(found, name)]
    if missing:
        raise UnusablePluginError(f"it has no {', '.join(missing)}; expected what compress.tasks.task.Task has")
    task: Task = found
    return task


def _registered() -> dict[str, Task]:
    built_in = {task.name: task for task in BUILT_IN}
    return built_in | load_extensions("tasks", built_in, _accept, lambda task: task.name)


TASKS: Mapping[str, Task] = _registered()
TASK_NAMES = tuple(TASKS)


def tasks_with(requires: Capabilities, excludes: Capabilities = frozenset()) -> tuple[str, ...]:
    """Return the names of the tasks that have all of ``requires`` and none of ``excludes``."""
    return tuple(name for name, task in TASKS.items() if suits(task.capabilities, requires, excludes))


def infer_task(config: Mapping[str, Any], has_preprocessor: bool) -> str | None:
    """Return the task that a model's config.json indicates, or None. ``has_preprocessor`` is as in `task_of`."""
    explicit = next((name for name, task in TASKS.items() if task.matches_config(config)), None)
    architectures = config.get("architectures")
    if explicit is not None or not isinstance(architectures, list) or not architectures:
        return explicit
    return task_of(str(architectures[0]), has_preprocessor)


def task_of(architecture: str, has_preprocessor: bool) -> str | None:
    """Return the task for the class name of a model, by its longest known suffix, or None.

    ``has_preprocessor``: the model's folder has a preprocessor_config.json, as models of images and audio do.
    """
    endings = {
        ending: name
        for name, task in TASKS.items()
        for ending in task.architectures
        if bool(task.capabilities & {TAKES_IMAGES, TAKES_AUDIO}) == has_preprocessor and architecture.endswith(ending)
    }
    return endings[max(endings, key=len)] if endings else None
