"""Checks of a recipe's limits: each metric is one that a run of the recipe measures, and each bound can be kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from compress.models.model import TorchModel
from compress.recipe.document import Document, describe
from compress.recipe.recipe import Benchmark, Limit
from compress.recipe.validation_errors import AnyModel, validate_partly
from compress.results.metrics import Metric, describe_metric, metrics_table, row_of, slice_of
from compress.stages.base import AnyStage
from compress.tasks.capability import GENERATES, GENERATES_IMAGES
from compress.tasks.evaluation import Evaluation
from compress.tasks.task import Task
from compress.utils.errors import nearest_name

_LARGEST_ERROR_RATE = 2.0
"""Bound of an error rate above which it is taken for a percentage."""
_CHANGED, _CHANGED_BY_EXPORT = 0.1, 0.02
"""Assumed share of test rows that become right or wrong by pruning and training, and by export and quantization."""
_USUAL_ACCURACY = 0.8
"""Assumed accuracy of the baseline, which is unknown before the run."""
_Z = 1.96
"""Quantile of the normal distribution for an interval at 95%."""
_PERCENT_OF_MODEL = 10.0
"""Ratio of a share to another model's from which the bound is taken for a percentage, such as 98.5."""


def check_limits(document: Document, kinds: Sequence[Task]) -> None:
    """Record limits on metrics that no run of the recipe measures, and bounds that are always kept or always missed.

    Args:
        document: Receives the problems.
        kinds: Variants of the task that the model may be for. Without any, metrics are not checked.
    """
    values = document.values.get("limits")
    evaluation, benchmark = _section(document, "evaluation", Evaluation()), _section(document, "benchmark", Benchmark())
    for index, value in enumerate(values if isinstance(values, list) else ()):
        broken_fields = {path[2:3] for path in document.broken if path[:2] == ("limits", index)}
        name = value.get("metric") if isinstance(value, dict) and not broken_fields & {(), ("metric",)} else None
        limit = None if broken_fields else validate_partly(Limit, value)
        if not isinstance(name, str):
            continue
        if kinds and not any(_measures(kind, name, evaluation, benchmark) for kind in kinds):
            measured = measured_metrics(kinds, evaluation, benchmark)
            is_known = row_of(name) is not None
            found = f"{name!r}, which no run of this recipe measures"
            found = found if is_known else f"an unknown metric {name!r}"
            near = None if is_known else nearest_name(name, measured)
            # Few users need more than the metrics of the task and the columns of tables.
            main = [other for other, row in measured.items() if row is None or row.column]
            examples = "" if near else f", such as {', '.join(main)}"
            expected = f"a metric that this recipe measures{examples}"
            document.problem(("limits", index, "metric"), found, expected, near)
        elif limit and (row := row_of(name)) and (meant := _expected_bound(limit, row[0])):
            field = "at_least" if limit.at_least is not None else "at_most"
            document.problem(("limits", index, field), describe(limit.bound), meant)


def measured_metrics(kinds: Sequence[Task], evaluation: Evaluation, benchmark: Benchmark) -> dict[str, Metric | None]:
    """Return the names of the metrics that a run measures, with their rows of the metrics table.

    Metrics of the task come first, and have None. Some names have a placeholder, such as `f1_{label}`.

    Args:
        kinds: Variants of the task that the model may be for.
        evaluation: The recipe's `evaluation` section.
        benchmark: The recipe's `benchmark` section.
    """
    settings = {"context": benchmark.contexts, "number": [benchmark.batch_size], "rate": [benchmark.rate]}
    metrics: dict[str, Metric | None] = {name: None for kind in kinds for name in kind.metrics}
    for row in metrics_table().rows:
        if row.measured_by == "task" or not any(
            _is_part_of_run(row, {}, kind, evaluation, benchmark) for kind in kinds
        ):
            continue
        # Placeholders that stand for a benchmark setting are replaced by its values.
        names = [row.name]
        for placeholder, values in settings.items():
            if f"{{{placeholder}}}" in row.name:
                names = [row.name.replace(f"{{{placeholder}}}", f"{value:g}") for value in values if value]
        metrics |= dict.fromkeys(names, row)
    return metrics


def is_share_of_rows(metric: str) -> bool:
    """Return whether a metric is the share of the test split's rows that are right."""
    row = describe_metric(metric)
    # The mean over a slice has fewer rows, whose number is not known before the run.
    is_share = row.style == "percent" and row.better == "higher" and row.aggregation == "mean"
    return is_share and not slice_of(metric)


def tightest_bound(rows: int) -> float:
    """Return the largest bound of a share of rows, in thousandths, that one changed row does not decide."""
    return math.floor((1 - 1 / rows) * 1000) / 1000


def changed_rows_share(stages: Iterable[type[AnyStage]]) -> float:
    """Return the share of test rows that such stages usually change between right and wrong: an assumption."""
    return _CHANGED if any(stage.output_type is TorchModel for stage in stages) else _CHANGED_BY_EXPORT


def ratio_half_width(rows: int, changed: float) -> float:
    """Return half the width that the 95% interval of a ratio of two accuracies will probably have.

    With a share d of changed rows among n and the baseline's accuracy p this is 1.96 sqrt(d / n) / p: the paired
    interval of `compress.report.limits.paired_ratio_interval` at the ratio 1.

    Args:
        rows: Number of test rows, n.
        changed: Share of the rows that are right for one model and wrong for the other, d.
    """
    return _Z * math.sqrt(changed / rows) / _USUAL_ACCURACY


def decidable_bound(rows: int, changed: float) -> float:
    """Return the largest bound of a ratio, in hundredths, that a model as accurate as the baseline probably keeps."""
    return max(0.0, math.floor((1 - ratio_half_width(rows, changed)) * 100 + 1e-9) / 100)


def rows_to_decide(bound: float, changed: float) -> int:
    """Return the test rows, two digits, from which a model as accurate as the baseline probably keeps a bound."""
    rows = changed * (_Z / _USUAL_ACCURACY / (1 - bound)) ** 2
    step = 10 ** max(0, math.floor(math.log10(rows)) - 1) if rows >= 1 else 1
    return max(1, round(rows / step)) * step


def _section(document: Document, name: str, default: AnyModel) -> AnyModel:
    """Return the valid fields of a section, and defaults for the others."""
    return validate_partly(type(default), document.values.get(name, {})) or default


def _measures(task: Task, name: str, evaluation: Evaluation, benchmark: Benchmark) -> bool:
    """Return whether a run could measure a metric.

    Args:
        task: The task, or a variant of it.
        name: Name of the metric.
        evaluation: The recipe's `evaluation` section.
        benchmark: The recipe's `benchmark` section.
    """
    # A task of another package may not list its metrics.
    if name in task.metrics or not task.metrics:
        return True
    covering = row_of(name)
    if covering is None:
        return False
    row, numbers = covering
    if row.measured_by == "task":
        return row.name in task.metrics
    return _is_part_of_run(row, numbers, task, evaluation, benchmark)


def _is_part_of_run(
    row: Metric, numbers: Mapping[str, str], task: Task, evaluation: Evaluation, benchmark: Benchmark
) -> bool:
    """Return whether the part of a run that measures a row takes place.

    Args:
        row: Row of the metrics table that is not measured by the task.
        numbers: Values of the placeholders in the metric's name, if they are to be checked.
        task: The task, or a variant of it.
        evaluation: The recipe's `evaluation` section.
        benchmark: The recipe's `benchmark` section.
    """
    writes_text = GENERATES in task.capabilities
    timed_in_calls = not writes_text and GENERATES_IMAGES not in task.capabilities
    parts = {
        "always": True,
        "calls": not writes_text,
        "batches": timed_in_calls
        and benchmark.batched
        and numbers.get("number", str(benchmark.batch_size)) == str(benchmark.batch_size),
        "requests": timed_in_calls
        and benchmark.rate is not None
        and numbers.get("rate", f"{benchmark.rate:g}") == f"{benchmark.rate:g}",
        "images": GENERATES_IMAGES in task.capabilities,
        "generation": writes_text and ("context" not in numbers or int(numbers["context"]) in benchmark.contexts),
        "continuations": writes_text and evaluation.prompts > 0,
        "questions": writes_text and evaluation.questions is not None,
        "instructions": writes_text and evaluation.instructions is not None,
        "similarity": evaluation.similarity is not None,
        "index": evaluation.index is not None,
    }
    return parts[row.measured_by]


def _expected_bound(limit: Limit, row: Metric) -> str | None:
    """Return the bound that was probably meant, or None if the bound can be kept and missed."""
    bound = limit.bound
    as_share = f"; {bound:g} percent is {bound / 100:g}" if 1 < bound <= 100 else ""
    # Errors per word may be more than the words.
    largest = _LARGEST_ERROR_RATE if row.aggregation == "ratio of sums" and row.better == "lower" else 1.0
    if row.style == "percent" and limit.of is None and not row.relative and bound > largest:
        return f"a share between 0 and 1{as_share}"
    if row.style == "percent" and limit.of is not None and row.better == "higher" and bound >= _PERCENT_OF_MODEL:
        return f"a ratio to the {row.title.lower()} of {limit.of}{as_share}"
    if row.relative and row.style == "percent" and row.better == "higher" and bound > 1:
        return f"a share between 0 and 1{as_share}"
    if row.style == "bytes" and limit.of is None and bound < 1:
        return "a number of bytes, or `of: baseline` for a ratio to the baseline"
    return None
