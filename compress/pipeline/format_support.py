"""Formats that a recipe's outputs can be written in, derived from the recipe and the starting model's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from compress.formats.model_file import check_writable
from compress.formats.onnx.model import OnnxModel
from compress.formats.registry import FORMATS, RUNTIMES
from compress.formats.target_profile import Target
from compress.models.json_file import read_json
from compress.recipe.recipe import START, Recipe
from compress.stages.protocols import SetsPrecision, starts_from
from compress.stages.registry import STAGES
from compress.tasks.capability import DESCRIBES_IMAGES, GENERATES, GENERATES_IMAGES, SINGLE_CALL, Capabilities
from compress.tasks.registry import get_task, tasks_with
from compress.utils.errors import ModelError

FLOAT = "fp32"
_ANY_ARCHITECTURE = frozenset({GENERATES, DESCRIBES_IMAGES})
"""Tasks whose models have many architectures, so that each model is checked before any work."""


def unsupported_reason(recipe: Recipe, start: Path | None, target: Target, from_graph: bool) -> str | None:
    """Return why the final model or the baseline cannot run on a target, or None if both can.

    Args:
        recipe: The recipe.
        start: Folder of the starting model, or None to skip checks of its architecture.
        target: The target.
        from_graph: True if the starting model is an ONNX file.
    """
    capabilities = _capabilities(recipe, start)
    form, runtime = target.format, RUNTIMES[target.runtime]
    spec, files = FORMATS[form], f"it runs {target.format.upper()} files"
    if runtime.one_batch_at_a_time and not {SINGLE_CALL, GENERATES_IMAGES} & capabilities:
        return f"it answers one batch at a time, and {recipe.task} goes token by token"
    if spec.written_by is None:  # what outputs are before they are in a format, the starting model at least
        return "it runs weights as transformers has them, and an ONNX graph has none" if from_graph else None
    for label in (recipe.labels()[-1], recipe.baseline):
        if (reason := _unwritable_reason(recipe, label, form, from_graph)) is not None:
            return f"{files}, {reason}"
    if from_graph and spec.own_bits and not starts_from(STAGES[spec.written_by], OnnxModel):
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


def _capabilities(recipe: Recipe, start: Path | None) -> Capabilities:
    """Return the capabilities of the recipe's task, specialized for the starting model if its config is known."""
    task = get_task(recipe.task)
    if start is not None and (start / "config.json").is_file():
        task = task.specialize(read_json(start / "config.json"))
    return task.capabilities


def _unwritable_reason(recipe: Recipe, label: str, form: str, from_graph: bool) -> str | None:
    """Return why an output cannot be written in a format, or None if it can.

    Args:
        recipe: The recipe.
        label: Label of the output.
        form: Name of the format.
        from_graph: True if the starting model is an ONNX file.
    """
    spec, output_format = FORMATS[form], format_given(recipe, label, from_graph)
    if not spec.own_bits:
        return None if leads_to(output_format, form) else f"and {label} gives {str(output_format).upper()}"
    assert spec.written_by is not None, "a stage writes every format with its own precisions"
    precision = asked_bits(recipe, label, spec.written_by)["precision"]
    if precision in get_args(STAGES[spec.written_by].model_fields["precision"].annotation):
        return None
    return f"which the stage {spec.written_by} does not write in {precision}"


def check_formats(recipe: Recipe, start: Path) -> None:
    """Check that the recipe's format stages support the model's architecture, before any other stage runs.

    Raises `ModelError`.
    """
    formats_by_stage = {spec.written_by: form for form, spec in FORMATS.items() if spec.written_by}
    for stage in recipe.stages if _ANY_ARCHITECTURE & get_task(recipe.task).capabilities else ():
        if stage.kind in formats_by_stage:
            check_writable(start, formats_by_stage[stage.kind])


def format_given(recipe: Recipe, label: str, from_graph: bool) -> str | None:
    """Return the format of a stage's output, or None for a model that any format can be written from."""
    if label == START:
        return OnnxModel.kind if from_graph else None
    kind = getattr(recipe.stages[recipe.labels().index(label)].output_type(), "kind", None)
    return kind if kind in FORMATS else None


def leads_to(found: str | None, form: str) -> bool:
    """Return True if one format can be written from another one, or from None."""
    while True:
        if found in (None, form):
            return True
        source = FORMATS[form].written_from
        if source is None:
            return False
        form = source


def asked_bits(recipe: Recipe, label: str, kind: str) -> dict[str, Any]:
    """Return the precision that the recipe's ONNX stages up to ``label`` give the weights, as fields of stage ``kind``.

    If there are several, the last one with the fewest bits counts.
    """
    labels = recipe.labels()
    stages = recipe.stages[: labels.index(label) + 1] if label != START else ()
    precisions = [stage.precision_settings() for stage in reversed(stages) if isinstance(stage, SetsPrecision)]
    lowest = min(precisions, key=lambda found: int(found["precision"].strip("fpint")), default={"precision": FLOAT})
    fields = STAGES[kind].model_fields
    return {name: value for name, value in lowest.items() if name in fields}
