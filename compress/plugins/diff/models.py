"""Comparison of two models at every depth that both have, and the first thing to examine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from compress.data.config import DataConfig
from compress.evaluation.evaluate import artifact_labels
from compress.plugins.diff.activations import compare_files, compare_modules
from compress.plugins.diff.answers import (
    check_memory,
    compare_on_random_inputs,
    compare_on_rows,
    compare_without_timing,
    draw_inputs,
    open_session,
)
from compress.plugins.diff.files import RECIPE, TOKENIZER, compare_folders, compare_recipes, compare_report_fields
from compress.plugins.diff.record import (
    Activations,
    AnswersDiff,
    Diff,
    FieldChange,
    How,
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
from compress.tasks.registry import TASKS
from compress.utils.errors import CompressError, InputError, nearest_name
from compress.utils.progress import Progress

LIMITS = ("fields", "weights", "rounding", "tensors", "flips", "divergence", "activations")
"""Names of the limits: the quantities that `_limited_value` reads from a diff."""
CONFIG = "config.json"
_OTHER_MODEL = 0.5
"""Share of changed matrices from which both models count as trained separately."""
_CAUSES = ("seed", "data.", "task", "model")
"""Recipe fields that change all weights of a model."""
_STORAGE_FIELDS = (
    *("dtype", "torch_dtype", "transformers_version", "quantization_config", "architectures", "use_cache"),
    *("transformers.js_config", "truncation", "padding"),
)
"""Settings that describe only storage or the program that reads the model."""


def read_limits(texts: Iterable[str]) -> dict[str, float]:
    """Parse limits of the form `NAME=NUMBER`.

    Raises:
        InputError: The name is unknown, or the number is invalid.
    """
    limits, where = {}, "--at-most"
    for text in texts:
        name, _, number = text.partition("=")
        name = name.strip()
        if name not in LIMITS:
            suggestion = nearest_name(name, LIMITS)
            hint = f"did you mean {suggestion!r}?" if suggestion else None
            raise InputError(
                f"There is no limit {name!r}.", where=where, expected=f"one of {', '.join(LIMITS)}", hint=hint
            )
        try:
            limits[name] = float(number)
        except ValueError:
            raise InputError(f"{number!r} is no number.", where=where, expected=f"such as {name}=0.01") from None
    return limits


def check_limits(diff: Diff, limits: dict[str, float]) -> tuple[LimitFound, ...]:
    """Return the state of each limit."""
    states = []
    for name, bound in limits.items():
        value, low = _limited_value(diff, name)
        state = "kept" if value is not None and value <= bound else "missed" if low > bound else "cannot tell"
        states.append(LimitFound(name=name, bound=bound, value=value, state="not measured" if value is None else state))
    return tuple(states)


def _limited_value(diff: Diff, name: str) -> tuple[float | None, float]:
    """Return a quantity, or None if it was not measured, and the lower end of its confidence interval.

    `fields` counts different fields. `weights` is the largest change beyond rounding, `rounding` the largest change.
    `tensors` counts changed tensors. `flips` is the share of changed predictions, `divergence` their mean KL divergence
    in nats. `activations` is the largest error of a module's output.
    """
    if name in ("flips", "divergence"):
        row = diff.answers.find("agreement" if name == "flips" else "kl_divergence") if diff.answers else None
        if row is None:
            return None, 0.0
        if name == "flips":
            return 1 - row.value, 1 - (row.value if row.high is None else row.high)
        return row.value, row.value if row.low is None else row.low
    values: list[float] | None = None
    if name == "fields":
        values = [float(len(diff.fields))]
    elif name == "activations":
        values = None if diff.activations is None else [module.error for module in diff.activations.modules]
    elif (weights := diff.weights) is not None:
        # A tensor without a counterpart counts as changed by its whole size.
        values = {
            "rounding": [tensor.relative for tensor in weights.tensors],
            "tensors": [float(len(weights.having("changed")) + len(weights.unmatched))],
            "weights": [tensor.unexplained for tensor in weights.tensors] + [1.0] * len(weights.unmatched),
        }[name]
    value = None if values is None else max(values, default=0.0)
    return value, value or 0.0


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
    fields, not_compared = compare_recipes(before.recipe, after.recipe)
    reports = before.report(), after.report()
    if reports[0] is not None and reports[1] is not None:
        fields += compare_report_fields(reports[0], reports[1])
    fields += compare_folders(before.folder, after.folder)
    weights = None if request.depth == "files" else compare_weights(before.model, after.model, progress)
    not_compared += [] if weights is None else weights.unread
    answers, activations = None, None
    if request.depth == "answers":
        answers, activations = _answers(before, after, request, not_compared, progress)
    # The models compute different results with other settings, or with weights or metrics beyond noise.
    metrics = [change.verdict for change in answers.comparison.changes] if answers and answers.comparison else []
    is_changed = any(map(_is_setting, fields)) or "worse" in metrics or "better" in metrics
    verdict = "identical" if weights is None else weights.verdict
    result = Diff(
        before=before.name,
        after=after.name,
        verdict="changed" if is_changed else "same" if verdict == "rounded" else verdict,
        first=_first(fields, weights),
        summary=tuple(_summary(fields, weights, answers, activations)),
        fields=tuple(fields),
        weights=weights,
        answers=answers,
        activations=activations,
        not_compared=tuple(not_compared),
    )
    return result.model_copy(update={"limits": check_limits(result, dict(request.limits))})


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
    random_answers, row_answers, activations = None, None, None
    try:
        inputs = draw_inputs(before.folder, after.folder)
        check_memory((before.model, after.model))
        sessions = [open_session(side.model) for side in (before, after)]
        # Activations need few inputs: two batches show where values start to differ.
        batches = inputs.batches[:2]
        activations = compare_modules(sessions, batches)
        if activations is None:
            activations = compare_files(before.model, after.model, batches, progress)
            if activations is None:
                not_compared.append(
                    "activations: they are seen where both are weights that transformers runs, or A is a graph of "
                    "floats; `compress doctor FILE --target T --against WEIGHTS` compares a file with weights"
                )
        elif not activations.modules:
            activations = None
            not_compared.append("activations: the models have no module of the same name and shape")
        random_answers = compare_on_random_inputs(before.model, after.model, inputs, sessions, progress)
    except CompressError as error:
        not_compared.append(f"answers to random inputs: {error.what}")
    try:
        row_answers = _on_rows(before, after, request, progress)
    except CompressError as error:
        not_compared.append(f"answers to rows: {error}")
    not_compared += [f"answers: {note}" for note in (random_answers.notes if random_answers else ())]
    return row_answers or random_answers, activations


def _on_rows(before: Side, after: Side, request: DiffRequest, progress: Progress) -> AnswersDiff | None:
    """Run both models on the rows that the request names, else compare the reports of their runs."""
    from compress.formats.safetensors.folder import task_of_folder

    # The second model's recipe is preferred: it names the data of the newer run.
    recipe = request.recipe or after.recipe or before.recipe
    if request.data is None and request.recipe is None:
        reports = before.report(), after.report()
        if reports[0] is None or reports[1] is None:
            return None
        compared = compare_without_timing((reports[0], reports[1]), comparison_policy(), (before.run, after.run))
        return AnswersDiff(inputs="the test rows of both runs, as their reports have them", comparison=compared)
    if recipe is not None:
        resolved = read_recipe(recipe)
    else:
        # A recipe for the task in the model's config. It needs a stage, which is never run.
        labels = artifact_labels(after.folder)
        config = DataConfig(splits={"test": str(request.data)}, labels=labels if labels and len(labels) > 1 else None)
        fields = {"name": "diff", "task": task_of_folder(after.folder).name, "model": str(after.folder.resolve())}
        resolved = Recipe.model_validate({**fields, "data": config.model_dump(), "stages": ["onnx"]})
    if request.data is not None:
        path = str(request.data.resolve())
        data = resolved.data.model_copy(update={"splits": {"test": path}, "unlabeled": (), "hold_out": None})
        resolved = resolved.model_copy(update={"data": data})
    task = TASKS[resolved.task]
    folder = recipe.parent if recipe is not None else Path()
    return compare_on_rows(before.model, after.model, resolved, folder, task, progress)


def _is_setting(change: FieldChange) -> bool:
    """Return True for a field of the tokenizer or the config that affects what the model computes."""
    return change.file in (TOKENIZER, CONFIG) and not change.field.startswith(_STORAGE_FIELDS)


def _first(fields: Sequence[FieldChange], weights: WeightsDiff | None) -> str:
    """Return the first thing to examine: a recipe field that changes all weights, else a layer, else a setting."""
    layers = weights.layers if weights is not None else ()
    matrices = [tensor.how for tensor in weights.tensors if len(tensor.shape) > 1] if weights is not None else []
    # A different seed or data set explains separately trained weights, and comes first.
    causes = [entry for entry in fields if entry.file == RECIPE and entry.field.startswith(_CAUSES)]
    if causes and matrices and matrices.count("changed") >= _OTHER_MODEL * len(matrices):
        return f"{causes[0].file}: {describe_field(causes[0])}"
    if not layers or layers[0].unexplained == 0:
        if weights is not None and weights.unmatched:
            return weights.unmatched[0]
        settings = sorted(filter(_is_setting, fields), key=lambda entry: entry.file == CONFIG)
        entries = [*settings, *causes] or ([] if layers else fields)
        if entries:
            return f"{entries[0].file}: {describe_field(entries[0])}"
    if weights is None or not layers:
        return "nothing differs"
    # Describe the layer by its most changed tensor and that tensor's cause.
    layer = layers[0]
    worst = next(tensor for tensor in weights.tensors if tensor.name == layer.worst)
    title = layer.name if layer.worst.rpartition(".")[0].endswith(layer.name) else f"{layer.name} ({layer.worst})"
    change = percent(layer.relative)
    cause = f"changed by {change}" if layer.unexplained else f"{change} by rounding"
    return f"{title}: {worst.causes[0] if worst.causes else cause}"


def describe_field(change: FieldChange) -> str:
    """Return a change such as `seed 0 -> 1`, with an arrow."""
    before, after = ("none" if value is None else value for value in (change.before, change.after))
    return f"{change.field} {before} \u2192 {after}" if change.field else f"{before} \u2192 {after}"


def percent(value: float) -> str:
    """Format a share as a percentage. A share of almost 0 has no meaning beyond being large."""
    return f"{format_number(value * 100, 3)}%" if value < 100 else "over 10,000%"


def _summary(
    fields: Sequence[FieldChange],
    weights: WeightsDiff | None,
    answers: AnswersDiff | None,
    activations: Activations | None,
) -> Iterator[str]:
    """Yield one sentence for each depth of the comparison."""
    files = Counter(change.file for change in fields)
    counts = ", ".join(f"{count} in {name}" for name, count in files.most_common())
    yield f"files and recipe: {counts or 'nothing differs'}"
    if weights is not None:
        yield f"weights: {describe_weights(weights)}"
    if activations is not None and activations.first:
        error = format_number(activations.error, 2)
        yield f"activations: differ first in {activations.first}, by {error} of the value's spread"
    elif activations is not None:
        yield f"activations: {'; '.join(activations.notes) or 'the same in all modules'}"
    if answers is not None and answers.rows:
        rows = [row for row in answers.rows if "[" not in row.metric]
        yield f"answers to {answers.inputs}: {', '.join(f'{row.metric} {format_measurement(row)}' for row in rows)}"


def describe_weights(weights: WeightsDiff) -> str:
    """Return the number of tensors for each kind of change, and the size of rounding errors."""
    sizes = {how: len(weights.having(how)) for how in get_args(How)}
    sizes |= {how: len(getattr(weights, how)) for how in ("added", "removed", "resized")}
    counts = ", ".join(f"{size} {how}" for how, size in sizes.items() if size)
    text = f"{counts} of {len(weights.tensors)} tensors"
    rounded = weights.having("rounded")
    if rounded:
        text += f"; rounding moved one by {percent(max(tensor.relative for tensor in rounded))} of its size"
    times = [tensor.times_rounding for tensor in rounded if tensor.times_rounding is not None]
    return text + (f", {format_number(max(times), 2)} times what the stored bits explain at most" if times else "")
