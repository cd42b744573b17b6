"""Which outputs of a recipe a target's format can hold, told by the recipe and the starting model's files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from compress.formats.model_file import check_writable
from compress.formats.onnx.model import OnnxModel
from compress.formats.registry import FORMATS, RUNTIMES
from compress.formats.target_profile import Target
from compress.models.json_file import read_json
from compress.recipe.recipe import START, Recipe
from compress.stages.registry import STAGES
from compress.tasks.capability import ANSWERS_AT_ONCE, DRAWS, GENERATES, TELLS_OF_IMAGES
from compress.tasks.registry import get_task, tasks_with
from compress.utils.errors import ModelError

FLOAT = "fp32"
_ANY_ARCHITECTURE = frozenset({GENERATES, TELLS_OF_IMAGES})
"""Tasks with these take models of so many kinds that each is looked at before any work."""


def unsupported_reason(recipe: Recipe, start: Path | None, target: Target, from_graph: bool) -> str | None:
    """Why the final model, or the baseline, cannot run on a target: no file of that format is, or can be, written.

    ``start`` is the starting model's folder; what its architecture bears on is not looked at where it is None.
    ``from_graph``: it is an ONNX graph that somebody else wrote.
    """
    task = get_task(recipe.task)
    told = start is not None and (start / "config.json").is_file()
    capabilities = (task.of(read_json(start / "config.json")) if start is not None and told else task).capabilities
    form, runtime = target.format, RUNTIMES[target.runtime]
    spec, files = FORMATS[form], f"it runs {target.format.upper()} files"
    if runtime.one_batch_at_a_time and not {ANSWERS_AT_ONCE, DRAWS} & capabilities:
        return f"it answers one batch at a time, and {recipe.task} goes token by token"
    if spec.written_by is None:  # what outputs are before they are in a format, the starting model at least
        return "it runs weights as transformers has them, and an ONNX graph has none" if from_graph else None
    for label in (recipe.labels()[-1], recipe.baseline):
        found = format_given(recipe, label, from_graph)
        if not leads_to(found, form) and not spec.own_bits:
            return f"{files}, and {label} gives {str(found).upper()}"
        precision = asked_bits(recipe, label, spec.written_by)["precision"] if spec.own_bits else None
        known = STAGES[spec.written_by].model_fields
        if precision is not None and precision not in get_args(known["precision"].annotation):
            return f"{files}, which the stage {spec.written_by} does not write in {precision}"
    if from_graph and spec.own_bits and not STAGES[spec.written_by].starts_from_graph:
        return f"{files}, which the stage {spec.written_by} does not write from an ONNX graph"
    if runtime.generates_only and GENERATES not in capabilities:
        return f"{target.runtime} runs {', '.join(tasks_with(frozenset({GENERATES})))} only"
    if not STAGES[spec.written_by].supports(capabilities):
        return f"{files}, which the stage {spec.written_by} does not write for {recipe.task}"
    if _ANY_ARCHITECTURE & capabilities and start is not None:
        try:
            check_writable(start, form)
        except ModelError as error:
            return f"{files}. {error.what}"
    return None


def check_formats(recipe: Recipe, start: Path) -> None:
    """Prove that the stages which write a language model can write the one in ``start``.

    Raises `ModelError`, rather than once the stages before them are done.
    """
    written = {spec.written_by: form for form, spec in FORMATS.items() if spec.written_by}
    for stage in recipe.stages if _ANY_ARCHITECTURE & get_task(recipe.task).capabilities else ():
        if stage.kind in written:
            check_writable(start, written[stage.kind])


def format_given(recipe: Recipe, label: str, from_graph: bool) -> str | None:
    """The format that a stage's output is in for good; None for a model that any of them is written from."""
    if label == START:
        return OnnxModel.kind if from_graph else None
    kind = getattr(recipe.stages[recipe.labels().index(label)].output_type(), "kind", None)
    return kind if kind in FORMATS else None


def leads_to(found: str | None, form: str) -> bool:
    """Whether one format can be written from another, or from what is in none yet."""
    while True:
        if found in (None, form):
            return True
        source = FORMATS[form].written_from
        if source is None:
            return False
        form = source


def asked_bits(recipe: Recipe, label: str, kind: str) -> dict[str, Any]:
    """What the recipe's stages for ONNX make of the weights, up to ``label``, in fields of the stage that writes.

    Of several the last one in the fewest bits counts.
    """
    labels = recipe.labels()
    before = recipe.stages[: labels.index(label) + 1] if label != START else ()
    asked = [found for stage in reversed(before) if (found := stage.precision_settings()) is not None]
    fewest = min(asked, key=lambda found: int(found["precision"].strip("fpint")), default={"precision": FLOAT})
    known = STAGES[kind].model_fields
    return {name: value for name, value in fewest.items() if name in known}
