"""Comparison of two models at every depth that both have, and the first thing to examine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from compress.data.config import DataConfig
from compress.formats.runtime import Session
from compress.plugins.diff.activations import compare_files, compare_modules, torch_modules
from compress.plugins.diff.answers import (
    Batches,
    check_config,
    check_memory,
    compare_on_random_inputs,
    compare_on_rows,
    compare_without_timing,
    draw_inputs,
    open_session,
)
from compress.plugins.diff.files import RECIPE, TOKENIZER, compare_folders, compare_report_fields, try_recipes
from compress.plugins.diff.record import (
    Activations,
    AnswersDiff,
    Diff,
    FieldChange,
    How,
    LayerChange,
    LimitFound,
    WeightsDiff,
)
from compress.plugins.diff.weights import compare_weights
from compress.recipe.loading import read_recipe
from compress.recipe.policy import comparison_policy
from compress.recipe.recipe import Recipe
from compress.report import run_folder
from compress.results.formatting import format_measurement, format_number
from compress.results.report import Report, load_report
from compress.tasks.registry import get_task
from compress.utils.errors import CompressError, InputError, nearest_name
from compress.utils.progress import Progress

LIMITS = ("fields", "weights", "rounding", "tensors", "flips", "divergence", "activations")
"""Names of the limits: the quantities that `_limited_value` reads from a diff."""


def read_limits(texts: Iterable[str]) -> dict[str, float]:
    """Parse limits of the form `NAME=NUMBER`.

    Raises:
        InputError: The name is unknown, or the number is invalid.
    """
    limits = {}
    for text in texts:
        name, _, number = text.partition("=")
        name = name.strip()
        if name not in LIMITS:
            suggestion = nearest_name(name, LIMITS)
            hint = f"did you mean {suggestion!r}?" if suggestion else None
            expected = f"one of {', '.join(LIMITS)}"
            raise InputError(f"There is no limit {name!r}.", where="--at-most", expected=expected, hint=hint)
        try:
            limits[name] = float(number)
        except ValueError:
            message = f"{number!r} is no number."
            raise InputError(message, where="--at-most", expected=f"such as {name}=0.01") from None
    return limits


def check_limits(diff: Diff, limits: dict[str, float]) -> tuple[LimitFound, ...]:
    """Return the state of each limit."""
    states = []
    for name, bound in limits.items():
        measured = _limited_value(diff, name)
        if measured is None:
            states.append(LimitFound(name=name, bound=bound, value=None, state="not measured"))
            continue
        value, low = measured
        state = "kept" if value <= bound else "missed" if low > bound else "cannot tell"
        states.append(LimitFound(name=name, bound=bound, value=value, state=state))
    return tuple(states)


def _limited_value(diff: Diff, name: str) -> tuple[float, float] | None:
    """Return a quantity and the lower end of its confidence interval, or None if it was not measured.

    `fields` counts different fields. `weights` is the largest change beyond rounding, `rounding` the largest change.
    `tensors` counts changed tensors. `flips` is the share of changed predictions, `divergence` their mean KL divergence
    in nats. `activations` is the largest error of a module's output.
    """
    if name == "fields":
        value = float(len(diff.fields))
    elif name in ("flips", "divergence"):
        row = diff.answers.find("agreement" if name == "flips" else "kl_divergence") if diff.answers else None
        if row is None:
            return None
        if name == "flips":
            return 1 - row.value, 1 - (row.value if row.high is None else row.high)
        return row.value, row.value if row.low is None else row.low
    elif name == "activations":
        if diff.activations is None:
            return None
        value = max((module.error for module in diff.activations.modules), default=0.0)
    elif diff.weights is None:
        return None
    else:
        value = _limited_weight_change(diff.weights, name)
    return value, value


def _limited_weight_change(weights: WeightsDiff, name: str) -> float:
    """Return the quantity of weights that a limit bounds."""
    unmatched = (*weights.added, *weights.removed, *weights.resized)
    if name == "tensors":
        return float(len(weights.having("changed")) + len(unmatched))
    if name == "rounding":
        return max((tensor.relative for tensor in weights.tensors), default=0.0)
    # A tensor without a counterpart counts as changed by its whole size.
    return max([tensor.unexplained for tensor in weights.tensors] + ([1.0] if unmatched else []), default=0.0)


CONFIG = "config.json"
_OTHER_MODEL = 0.5
"""Share of changed matrices from which both models count as trained separately."""
_CAUSES = ("seed", "data.", "task", "model")
"""Recipe fields that change all weights of a model."""


@dataclass(frozen=True)
class Side:
    """Model of a comparison: its name, its folder or file, and its run folder."""

    name: str
    model: Path
    run: Path | None = None

    @property
    def folder(self) -> Path:
        """Folder with the model's config."""
        return self.model if self.model.is_dir() else self.model.parent

    @property
    def recipe(self) -> Path | None:
        """Recipe in the run folder, or None."""
        path = None if self.run is None else self.run / run_folder.RECIPE
        return path if path is not None and path.is_file() else None

    def report(self) -> Report | None:
        """Return the report of the run, or None.

        Raises:
            InputError: The report cannot be read.
        """
        report_path = None if self.run is None else self.run / run_folder.REPORT
        return load_report(report_path) if report_path is not None and report_path.is_file() else None


@dataclass(frozen=True)
class DiffRequest:
    """Request for a comparison: its depth (`files`, `weights` or `answers`), ``data``, and their ``recipe``."""

    depth: str = "answers"
    data: Path | None = None
    recipe: Path | None = None
    limits: Mapping[str, float] = field(default_factory=dict)


def compare_models(before: Side, after: Side, request: DiffRequest, progress: Progress) -> Diff:
    """Compare two models.

    Args:
        before: First model.
        after: Second model.
        request: Depth, data and limits of the comparison.
        progress: Shows the comparison.

    Returns:
        The differences, and reasons for parts that could not be compared.

    Raises:
        ModelError: Weights cannot be read.
    """
    not_compared: list[str] = []
    fields = list(_fields(before, after, not_compared))
    weights = None if request.depth == "files" else compare_weights(before.model, after.model, progress)
    not_compared += [] if weights is None else weights.unread
    answers, activations = None, None
    if request.depth == "answers":
        answers, activations = _answers(before, after, request, not_compared, progress)
    is_identical = weights is None or weights.verdict == "identical"
    verdict = "changed" if _is_changed(fields, weights, answers) else "identical" if is_identical else "same"
    result = Diff(
        before=before.name,
        after=after.name,
        verdict=verdict,
        first=_first(fields, weights),
        summary=tuple(_summary(fields, weights, answers, activations)),
        fields=tuple(fields),
        weights=weights,
        answers=answers,
        activations=activations,
        not_compared=tuple(not_compared),
    )
    return result.model_copy(update={"limits": check_limits(result, dict(request.limits))})


def _fields(before: Side, after: Side, not_compared: list[str]) -> Iterator[FieldChange]:
    """Yield the differences of recipes, reports and files."""
    changes, reasons = try_recipes(before.recipe, after.recipe)
    not_compared += reasons
    yield from changes
    reports = before.report(), after.report()
    if reports[0] is not None and reports[1] is not None:
        yield from compare_report_fields(reports[0], reports[1])
    yield from compare_folders(before.folder, after.folder)


def _answers(
    before: Side, after: Side, request: DiffRequest, not_compared: list[str], progress: Progress
) -> tuple[AnswersDiff | None, Activations | None]:
    """Compare the models on labelled rows, else by their reports, else on random inputs. Compare activations too.

    Args:
        before: First model.
        after: Second model.
        request: Data and recipe of the comparison.
        not_compared: Reasons for parts that could not be compared. This function appends to it.
        progress: Shows the comparison.
    """
    random_answers, activations = None, None
    try:
        for side in (before, after):
            check_config(side.folder)
        check_memory((before.model, after.model))
        # Activations need few inputs: two batches show where values start to differ.
        inputs = draw_inputs(before.folder, after.folder)
        sessions = [open_session(side.model) for side in (before, after)]
        activations = _compare_activations(before, after, inputs.batches[:2], sessions, not_compared, progress)
        random_answers = compare_on_random_inputs(before.model, after.model, inputs, sessions, progress)
    except CompressError as error:
        not_compared.append(f"answers to random inputs: {error.what}")
    try:
        row_answers = _on_rows(before, after, request, progress)
    except CompressError as error:
        not_compared.append(f"answers to rows: {error}")
        row_answers = None
    not_compared += [f"answers: {note}" for note in (random_answers.notes if random_answers else ())]
    return row_answers or random_answers, activations


def _compare_activations(
    before: Side,
    after: Side,
    batches: Batches,
    sessions: Sequence[Session],
    not_compared: list[str],
    progress: Progress,
) -> Activations | None:
    """Compare activations by PyTorch module, else by operator of the model files, if the formats allow it.

    Args:
        before: First model.
        after: Second model.
        batches: Inputs to run.
        sessions: Sessions of both models.
        not_compared: Reasons for parts that could not be compared. This function appends to it.
        progress: Shows the comparison.
    """
    modules = torch_modules(sessions)
    if modules is not None:
        activations = compare_modules(modules, sessions, batches)
        not_compared += [] if activations.modules else ["activations: the two have no module of one name and shape"]
        return activations if activations.modules else None
    file_activations = compare_files(before.model, after.model, batches, progress)
    if file_activations is None:
        not_compared.append(
            "activations: they are seen where both are weights that transformers runs, or A is a graph of floats; "
            "`compress doctor FILE --target T --against WEIGHTS` compares a file with weights"
        )
    return file_activations


def _on_rows(before: Side, after: Side, request: DiffRequest, progress: Progress) -> AnswersDiff | None:
    """Run both models on the rows that the request names, else compare the reports of their runs."""
    # The second model's recipe is preferred: it names the data of the newer run.
    recipe = request.recipe or after.recipe or before.recipe
    if request.data is None and request.recipe is None:
        reports = before.report(), after.report()
        if reports[0] is None or reports[1] is None:
            return None
        compared = compare_without_timing(reports[0], reports[1], comparison_policy(), (before.run, after.run))
        return AnswersDiff(inputs="the test rows of both runs, as their reports have them", comparison=compared)
    resolved = _recipe_for(after, request.data) if recipe is None else read_recipe(recipe)
    if request.data is not None:
        path = str(request.data.resolve())
        data = resolved.data.model_copy(update={"splits": {"test": path}, "unlabeled": (), "hold_out": None})
        resolved = resolved.model_copy(update={"data": data})
    task = get_task(resolved.task)
    folder = recipe.parent if recipe is not None else Path()
    return compare_on_rows(before.model, after.model, resolved, folder, task, progress)


def _recipe_for(side: Side, data: Path | None) -> Recipe:
    """Return a recipe for the task in the model's config."""
    from compress.evaluation.evaluate import artifact_labels
    from compress.formats.safetensors.folder import task_of_folder

    labels = artifact_labels(side.folder)
    config = DataConfig(splits={"test": str(data)}, labels=labels if labels and len(labels) > 1 else None)
    # A recipe needs a stage. It is never run.
    fields = {"name": "diff", "task": task_of_folder(side.folder).name, "model": str(side.folder.resolve())}
    return Recipe.model_validate({**fields, "data": config.model_dump(), "stages": ["onnx"]})


def _is_changed(fields: Sequence[FieldChange], weights: WeightsDiff | None, answers: AnswersDiff | None) -> bool:
    """Return True if the models compute different results: other settings, or weights or metrics beyond noise."""
    settings = [
        difference
        for difference in fields
        if difference.file in (TOKENIZER, CONFIG) and _affects_computation(difference.field)
    ]
    compared = answers.comparison if answers else None
    worse = compared is not None and any(change.verdict in ("worse", "better") for change in compared.changes)
    return bool(settings) or worse or (weights is not None and weights.verdict == "changed")


_STORAGE_FIELDS = (
    *("dtype", "torch_dtype", "transformers_version", "quantization_config", "architectures", "use_cache"),
    *("transformers.js_config", "truncation", "padding"),
)


def _affects_computation(name: str) -> bool:
    """Return False for fields that describe only storage or the program that reads the model."""
    return not name.startswith(_STORAGE_FIELDS)


def _first(fields: Sequence[FieldChange], weights: WeightsDiff | None) -> str:
    """Return the first thing to examine: a recipe field that changes all weights, else a layer, else a setting."""
    layers = weights.layers if weights is not None else ()
    changed = [entry for entry in layers if entry.unexplained > 0]
    # A different seed or data set explains separately trained weights, and comes first.
    causes = [entry for entry in fields if entry.file == RECIPE and entry.field.startswith(_CAUSES)]
    if weights is not None and causes and _is_trained_separately(weights):
        return f"{causes[0].file}: {describe_field(causes[0])}"
    if changed:
        return _describe_layer(changed[0], weights)
    ranked = [
        entry
        for name in (TOKENIZER, CONFIG)
        for entry in fields
        if entry.file == name and _affects_computation(entry.field)
    ] + causes
    if weights is not None and (weights.added or weights.removed or weights.resized):
        return next(iter((*weights.resized, *(f"{name}: removed" for name in weights.removed),
                          *(f"{name}: added" for name in weights.added))))  # fmt: skip
    if ranked:
        return f"{ranked[0].file}: {describe_field(ranked[0])}"
    if layers:
        return _describe_layer(layers[0], weights)
    return f"{fields[0].file}: {describe_field(fields[0])}" if fields else "nothing differs"


def _describe_layer(layer: LayerChange, weights: WeightsDiff | None) -> str:
    """Describe a layer by its most changed tensor and that tensor's cause."""
    worst = next(tensor for tensor in weights.tensors if tensor.name == layer.worst) if weights else None
    title = layer.name if layer.worst.rpartition(".")[0].endswith(layer.name) else f"{layer.name} ({layer.worst})"
    if worst is not None and worst.causes:
        return f"{title}: {worst.causes[0]}"
    change = percent(layer.relative)
    return f"{title}: changed by {change}" if layer.unexplained else f"{title}: {change} by rounding"


def _is_trained_separately(weights: WeightsDiff) -> bool:
    """Return True if most matrices changed beyond rounding."""
    matrices = [tensor for tensor in weights.tensors if len(tensor.shape) > 1]
    changed = sum(tensor.how == "changed" for tensor in matrices)
    return bool(matrices) and changed >= _OTHER_MODEL * len(matrices)


def describe_field(change: FieldChange) -> str:
    """Return a change such as `seed 0 -> 1`, with an arrow."""
    name = f"{change.field} " if change.field else ""
    return f"{name}{'none' if change.before is None else change.before} \u2192 " + (
        "none" if change.after is None else change.after
    )


def percent(value: float) -> str:
    """Format a share as a percentage."""
    return f"{format_number(value * 100, 3)}%"


def _summary(
    fields: Sequence[FieldChange],
    weights: WeightsDiff | None,
    answers: AnswersDiff | None,
    activations: Activations | None,
) -> Iterator[str]:
    """Yield one sentence for each depth of the comparison."""
    files = Counter(change.file for change in fields)
    counts = ", ".join(f"{count} in {name}" for name, count in files.most_common())
    yield f"files and recipe: {counts}" if files else "files and recipe: nothing differs"
    if weights is not None:
        yield f"weights: {describe_weights(weights)}"
    if activations is not None:
        first_difference = (
            f"part first in {activations.first}, by {format_number(activations.error, 2)} of the value's spread"
        )
        otherwise = "; ".join(activations.notes) or "the same in all modules"
        yield f"activations: {first_difference if activations.first else otherwise}"
    if answers is not None and answers.rows:
        rows = [row for row in answers.rows if "[" not in row.metric]
        yield f"answers to {answers.inputs}: {', '.join(f'{row.metric} {format_measurement(row)}' for row in rows)}"


def describe_weights(weights: WeightsDiff) -> str:
    """Return the number of tensors for each kind of change, and the size of rounding errors."""
    counts = Counter(tensor.how for tensor in weights.tensors)
    parts = [f"{counts[how]} {how}" for how in get_args(How) if counts[how]]
    for how in ("added", "removed", "resized"):
        parts += [f"{len(getattr(weights, how))} {how}"] if getattr(weights, how) else []
    rounded = weights.having("rounded")
    if not rounded:
        return f"{', '.join(parts)} of {len(weights.tensors)} tensors"
    largest = max(tensor.relative for tensor in rounded)
    times = [tensor.times_rounding for tensor in rounded if tensor.times_rounding is not None]
    explanation = f", {format_number(max(times), 2)} times what the stored bits explain at most" if times else ""
    counted = f"{', '.join(parts)} of {len(weights.tensors)} tensors"
    return f"{counted}; rounding moved one by {percent(largest)} of its size{explanation}"
