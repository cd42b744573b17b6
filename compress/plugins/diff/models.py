"""Comparison of two models at every depth that both have, and the first thing to examine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from compress.data.config import DataConfig
from compress.formats.runtime import Session
from compress.plugins.diff.activations import compare_files, compare_modules, modules_of
from compress.plugins.diff.answers import Batches, beside, check_config_there, check_memory, on_rows, opened
from compress.plugins.diff.drawn import draw, on_drawn
from compress.plugins.diff.files import RECIPE, TOKENIZER, compare_folders, compare_reports_beside, try_recipes
from compress.plugins.diff.limits import judged
from compress.plugins.diff.record import Activations, AnswersDiff, Diff, FieldChange, How, LayerChange, WeightsDiff
from compress.plugins.diff.weights import compare_weights
from compress.recipe.loading import read_recipe
from compress.recipe.policy import comparison_policy
from compress.recipe.recipe import Recipe
from compress.report import run_folder
from compress.results.formatting import format_measurement, format_number
from compress.results.report import Report, load_report
from compress.tasks.registry import get_task
from compress.utils.errors import CompressError
from compress.utils.progress import Progress

CONFIG = "config.json"
_OTHER_MODEL = 0.5
"""Share of the tensors changed by as much as this of their size from which both were trained apart."""
_CAUSES = ("seed", "data.", "task", "model")
"""Fields of a recipe that make weights others as a whole."""


@dataclass(frozen=True)
class Side:
    """One of the two models: its name, its folder or file, and its run, if any."""

    name: str
    model: Path
    run: Path | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of its config."""
        return self.model if self.model.is_dir() else self.model.parent

    @property
    def recipe(self) -> Path | None:
        """Return the recipe beside it, or None."""
        path = None if self.run is None else self.run / run_folder.RECIPE
        return path if path is not None and path.is_file() else None

    def report(self) -> Report | None:
        """Return the report beside it, or None. Raises `InputError` if it cannot be read."""
        path = None if self.run is None else self.run / run_folder.REPORT
        return load_report(path) if path is not None and path.is_file() else None


@dataclass(frozen=True)
class Wanted:
    """Request for a comparison: its depth (`files`, `weights` or `answers`), ``data``, and their ``recipe``."""

    depth: str = "answers"
    data: Path | None = None
    recipe: Path | None = None
    limits: Mapping[str, float] = field(default_factory=dict)


def compare_models(before: Side, after: Side, wanted: Wanted, progress: Progress) -> Diff:
    """Compare two models.

    Args:
        before: First model.
        after: Second model.
        wanted: Depth, data and limits of the comparison.
        progress: Shows the comparison.

    Returns:
        The differences, and what could not be compared.

    Raises:
        ModelError: Weights cannot be read.
    """
    lacking: list[str] = []
    fields = list(_fields(before, after, lacking))
    weights = None if wanted.depth == "files" else compare_weights(before.model, after.model, progress)
    lacking += [] if weights is None else weights.unread
    answers, activations = None, None
    if wanted.depth == "answers":
        answers, activations = _answers(before, after, wanted, lacking, progress)
    verdict = "changed" if _changed(fields, weights, answers) else "identical" if _identical(weights) else "same"
    found = Diff(
        before=before.name,
        after=after.name,
        verdict=verdict,
        first=_first(fields, weights),
        summary=tuple(_summary(fields, weights, answers, activations)),
        fields=tuple(fields),
        weights=weights,
        answers=answers,
        activations=activations,
        not_compared=tuple(lacking),
    )
    return found.model_copy(update={"limits": judged(found, dict(wanted.limits))})


def _fields(before: Side, after: Side, lacking: list[str]) -> Iterator[FieldChange]:
    found, why = try_recipes(before.recipe, after.recipe)
    lacking += why
    yield from found
    reports = before.report(), after.report()
    if reports[0] is not None and reports[1] is not None:
        yield from compare_reports_beside(reports[0], reports[1])
    yield from compare_folders(before.folder, after.folder)


def _answers(
    before: Side, after: Side, wanted: Wanted, lacking: list[str], progress: Progress
) -> tuple[AnswersDiff | None, Activations | None]:
    """On the rows that were given, else as two reports have them, else on drawn inputs; and the values within."""
    found, inside = None, None
    try:
        for side in (before, after):
            check_config_there(side.folder)
        check_memory((before.model, after.model))
        drawn = draw(before.folder, after.folder)
        sessions = [opened(side.model) for side in (before, after)]
        inside = _inside(before, after, drawn.batches[:2], sessions, lacking, progress)
        found = on_drawn(before.model, after.model, drawn, sessions, progress)
    except CompressError as error:
        lacking.append(f"answers to drawn inputs: {error.what}")
    try:
        own = _on_rows(before, after, wanted, progress)
    except CompressError as error:
        lacking.append(f"answers to rows: {error}")
        own = None
    lacking += [f"answers: {note}" for note in (found.notes if found else ())]
    return own or found, inside


def _inside(
    before: Side, after: Side, batches: Batches, sessions: Sequence[Session], lacking: list[str], progress: Progress
) -> Activations | None:
    """The values within both, where they can be seen."""
    modules = modules_of(sessions)
    if modules is not None:
        found = compare_modules(modules, sessions, batches)
        lacking += [] if found.modules else ["activations: the two have no module of one name and shape"]
        return found if found.modules else None
    inside = compare_files(before.model, after.model, batches, progress)
    if inside is None:
        lacking.append(
            "activations: they are seen where both are weights that transformers runs, or A is a graph of floats; "
            "`compress doctor FILE --target T --against WEIGHTS` compares a file with weights"
        )
    return inside


def _on_rows(before: Side, after: Side, wanted: Wanted, progress: Progress) -> AnswersDiff | None:
    """Asked now where rows were named; else what two runs have measured on the same ones."""
    recipe = wanted.recipe or after.recipe or before.recipe
    if wanted.data is None and wanted.recipe is None:
        reports = before.report(), after.report()
        if reports[0] is None or reports[1] is None:
            return None
        compared = beside(reports[0], reports[1], comparison_policy(), (before.run, after.run))
        return AnswersDiff(inputs="the test rows of both runs, as their reports have them", comparison=compared)
    read = _recipe_for(after, wanted.data) if recipe is None else read_recipe(recipe)
    if wanted.data is not None:
        place = str(wanted.data.resolve())
        data = read.data.model_copy(update={"splits": {"test": place}, "unlabeled": (), "hold_out": None})
        read = read.model_copy(update={"data": data})
    task = get_task(read.task)
    folder = recipe.parent if recipe is not None else Path()
    return on_rows(before.model, after.model, read, folder, task, progress)


def _recipe_for(side: Side, data: Path | None) -> Recipe:
    """Nobody's recipe, for the task that the model's config tells."""
    from compress.evaluation.evaluate import artifact_labels
    from compress.formats.safetensors.folder import task_of_folder

    labels = artifact_labels(side.folder)
    config = DataConfig(splits={"test": str(data)}, labels=labels if labels and len(labels) > 1 else None)
    fields = {"name": "diff", "task": task_of_folder(side.folder).name, "model": str(side.folder.resolve())}
    return Recipe.model_validate({**fields, "data": config.model_dump(), "stages": ["onnx"]})


def _identical(weights: WeightsDiff | None) -> bool:
    return weights is None or weights.verdict == "identical"


def _changed(fields: Sequence[FieldChange], weights: WeightsDiff | None, answers: AnswersDiff | None) -> bool:
    """Whether more than a file's form is another: what a tokenizer or a config says, weights beyond rounding, rows."""
    says = [one for one in fields if one.file in (TOKENIZER, CONFIG) and _bears(one.field)]
    compared = answers.comparison if answers else None
    worse = compared is not None and any(change.verdict in ("worse", "better") for change in compared.changes)
    return bool(says) or worse or (weights is not None and weights.verdict == "changed")


_FORM = (
    *("dtype", "torch_dtype", "transformers_version", "quantization_config", "architectures", "use_cache"),
    *("transformers.js_config", "truncation", "padding"),
)


def _bears(name: str) -> bool:
    """Whether a field says what the model computes, and not only how it is stored or by what it is read."""
    return not name.startswith(_FORM)


def _first(fields: Sequence[FieldChange], weights: WeightsDiff | None) -> str:
    """What to look at before all else: what made everything another, else the layer, else a setting."""
    layers = weights.layers if weights is not None else ()
    changed = [one for one in layers if one.unexplained > 0]
    causes = [one for one in fields if one.file == RECIPE and one.field.startswith(_CAUSES)]
    if weights is not None and causes and _trained_apart(weights):
        return f"{causes[0].file}: {field_words(causes[0])}"
    if changed:
        return _layer_words(changed[0], weights)
    ranked = [one for name in (TOKENIZER, CONFIG) for one in fields if one.file == name and _bears(one.field)] + causes
    if weights is not None and (weights.added or weights.removed or weights.resized):
        return next(iter((*weights.resized, *(f"{name}: removed" for name in weights.removed),
                          *(f"{name}: added" for name in weights.added))))  # fmt: skip
    if ranked:
        return f"{ranked[0].file}: {field_words(ranked[0])}"
    if layers:
        return _layer_words(layers[0], weights)
    return f"{fields[0].file}: {field_words(fields[0])}" if fields else "nothing differs"


def _layer_words(layer: LayerChange, weights: WeightsDiff | None) -> str:
    """The layer, its tensor that changed most, and what was done to that."""
    worst = next(one for one in weights.tensors if one.name == layer.worst) if weights else None
    where = layer.name if layer.worst.rpartition(".")[0].endswith(layer.name) else f"{layer.name} ({layer.worst})"
    if worst is not None and worst.causes:
        return f"{where}: {worst.causes[0]}"
    return f"{where}: {'changed by ' if layer.unexplained else ''}{percent(layer.relative)}{_by(layer)}"


def _by(layer: LayerChange) -> str:
    return "" if layer.unexplained else " by rounding"


def _trained_apart(weights: WeightsDiff) -> bool:
    """Whether most of the weights are others altogether."""
    matrices = [one for one in weights.tensors if len(one.shape) > 1]
    apart = sum(one.how == "changed" for one in matrices)
    return bool(matrices) and apart >= _OTHER_MODEL * len(matrices)


def field_words(change: FieldChange) -> str:
    """`seed 0 -> 1`, with an arrow."""
    name = f"{change.field} " if change.field else ""
    return f"{name}{'none' if change.before is None else change.before} \u2192 " + (
        "none" if change.after is None else change.after
    )


def percent(value: float) -> str:
    """A share in per cent."""
    return f"{format_number(value * 100, 3)}%"


def _summary(
    fields: Sequence[FieldChange],
    weights: WeightsDiff | None,
    answers: AnswersDiff | None,
    activations: Activations | None,
) -> Iterator[str]:
    files = Counter(one.file for one in fields)
    what = ", ".join(f"{count} in {name}" for name, count in files.most_common())
    yield f"files and recipe: {what}" if files else "files and recipe: nothing differs"
    if weights is not None:
        yield f"weights: {weights_words(weights)}"
    if activations is not None:
        where = f"part first in {activations.first}, by {format_number(activations.error, 2)} of the value's spread"
        same = "; ".join(activations.notes) or "the same in all modules"
        yield f"activations: {where if activations.first else same}"
    if answers is not None and answers.rows:
        rows = [row for row in answers.rows if "[" not in row.metric]
        yield f"answers to {answers.inputs}: {', '.join(f'{row.metric} {format_measurement(row)}' for row in rows)}"


def weights_words(weights: WeightsDiff) -> str:
    """Return the number of tensors of each kind, and the size of rounding errors."""
    counts = Counter(one.how for one in weights.tensors)
    parts = [f"{counts[how]} {how}" for how in get_args(How) if counts[how]]
    for how in ("added", "removed", "resized"):
        parts += [f"{len(getattr(weights, how))} {how}"] if getattr(weights, how) else []
    rounded = weights.having("rounded")
    if not rounded:
        return f"{', '.join(parts)} of {len(weights.tensors)} tensors"
    most = max(one.relative for one in rounded)
    times = [one.times_rounding for one in rounded if one.times_rounding is not None]
    by = f", {format_number(max(times), 2)} times what the stored bits explain at most" if times else ""
    return (
        f"{', '.join(parts)} of {len(weights.tensors)} tensors; rounding moved one by {percent(most)} of its size{by}"
    )
