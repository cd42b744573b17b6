"""The task of a recipe that names none, as the config of its model tells it."""

from __future__ import annotations

from pathlib import Path

from compress.errors import InputError
from compress.recipe_source.document import Document
from compress.tasks.registry import TASK_NAMES, TASKS, task_of


def tell_task(document: Document, recipe_folder: Path) -> bool:
    """Fill in a task that is left out, if the model tells one; whether it did. Notes a problem where it does not.

    Nothing is fetched for it, and no code of the model runs.
    """
    reference = document.values.get("model")
    if "task" in document.values or not isinstance(reference, str):
        return False
    told, reason = _told(reference, recipe_folder)
    if told is None:
        document.problem(("task",), "nothing", f"one of {', '.join(TASK_NAMES)}, since {reason}")
        return False
    document.values["task"] = told
    return True


def _told(reference: str, recipe_folder: Path) -> tuple[str | None, str]:
    """The task, or else why there is none."""
    from compress.checkpoints.json_file import read_json
    from compress.checkpoints.processor import PREPROCESSOR
    from compress.data.source import find
    from compress.sources.source import already_here

    try:
        folder = already_here(str(find(reference, recipe_folder) or reference))
        if folder is None:
            return None, f"the model {reference!r} is not here yet to tell it"
        config = read_json(folder / "config.json")
    except InputError as error:
        return None, f"the model cannot tell it: {error.what}"
    except OSError as error:
        return None, f"the model cannot be read: {error.strerror or error}"
    named = next((name for name, task in TASKS.items() if task.told_by(config)), None)
    if named is not None:
        return named, ""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return None, "the model's config.json names no architectures that tell it"
    told = task_of(str(architectures[0]), (folder / PREPROCESSOR).is_file())
    return told, f"the model's architecture {architectures[0]!r} tells none"
