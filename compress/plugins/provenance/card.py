"""Model card, README.md: front matter for the Hugging Face Hub with results in `model-index`, and text for readers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from compress.formats.model_file import format_of
from compress.formats.registry import FORMATS
from compress.pipeline.licence_detection import canonical, hub_name
from compress.pipeline.licences import data_names
from compress.plugins.provenance.run_view import RunView, plain_name
from compress.recipe.recipe import Recipe
from compress.report.run_folder import MODEL
from compress.results.formatting import format_interval, format_value
from compress.results.metrics import describe_metric
from compress.results.report import DataRecord, Measurement

_TEMPLATES = Environment(
    loader=PackageLoader("compress", ""), trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def render_card(template: str, data: ModelCardData, rows: Sequence[Measurement], **values: object) -> str:
    """Render a template of `compress` with the front matter and a table of measurements.

    Args:
        template: Path of the Jinja template below the package.
        data: Front matter.
        rows: Measurements for the table.
        **values: Further variables of the template.
    """
    measured = []
    for row in rows:
        metric = describe_metric(row.metric, row.unit)
        interval = format_interval(metric, row.low, row.high) if row.low is not None else ""
        count = str(row.n) if row.n > 1 else ""
        measured.append((metric.title, row.target, format_value(metric, row.value), interval, count))
    heads = ("what", "on", "value", "95% interval", "rows or samples")
    front = data.to_yaml(line_break="\n")
    page = _TEMPLATES.get_template(template).render(front=front, heads=heads, measured=measured, **values)
    return str(ModelCard(page))


def card_data(licence: str, task: str, library: str, **fields: object) -> ModelCardData:
    """Return the front matter. A licence without a name on the Hub becomes `other` with its own name beside it.

    Args:
        licence: SPDX expression, or the name of the licence.
        task: Name of the task, which is the Hub's pipeline tag.
        library: Name that the Hub has for the library that opens the model.
        **fields: Further fields of `ModelCardData`.
    """
    name = hub_name(canonical(licence))
    values: dict[str, Any] = {**fields, "pipeline_tag": task, "library_name": library}
    return ModelCardData(license=name or "other", license_name=None if name else licence, **values)


def run_card(run: RunView) -> str:
    """Return the model card of a run's final model."""
    report, recipe = run.report, run.recipe
    file_format = format_of(run.folder / MODEL)
    # The front matter is what the Hub reads, and the text below it is what people read.
    data = card_data(
        run.licence,
        recipe.task,
        FORMATS[file_format].library or file_format,
        base_model=_hub_ids([record.name for record in run.licences if record.binds]),
        datasets=_hub_ids(list(data_names(recipe.data))),
        tags=["compress", *(stage.name for stage in report.stages)],
        model_name=report.recipe,
        eval_results=eval_results(recipe, run.metrics, report.data) or None,
    )
    return render_card(
        "plugins/provenance/run_card.md",
        data,
        run.metrics,
        title=report.recipe,
        run=run,
        stages=", ".join(stage.name for stage in report.stages),
        of=plain_name(recipe.model),
        licences=[(record.of, record.licence) for record in run.licences],
        remarks=run.licence_remarks,
    )


def eval_results(recipe: Recipe, rows: Sequence[Measurement], judged: DataRecord | None) -> list[EvalResult]:
    """Return measurements as entries of `model-index`, each with its interval among the arguments of its metric.

    Args:
        recipe: Recipe, which names the task and the data.
        rows: Measurements of the model.
        judged: Rows that the model was evaluated on, if they are known.
    """
    name = plain_name(next(data_names(recipe.data), "the recipe's rows"))
    # Older reports do not record the evaluated rows.
    split = judged.split if judged is not None else "test"
    arguments = {"sha256": judged.digest, "rows": judged.rows} if judged is not None else None
    return [
        EvalResult(
            task_type=recipe.task,
            # The Hub accepts an id there, so any other name is spelled like one.
            dataset_type=name if _HUB_ID.match(name) else re.sub(r"[^\w.-]+", "-", name).strip("-"),
            dataset_name=f"{name}, {split}",
            dataset_split=split,
            dataset_args=arguments,
            metric_type=describe_metric(row.metric).hub_name or row.metric,
            metric_value=row.value,
            metric_name=f"{describe_metric(row.metric, row.unit).title} on {row.target}",
            metric_args={"target": row.target, "unit": row.unit}
            | ({"low": row.low, "high": row.high, "n": row.n} if row.low is not None else {}),
        )
        for row in rows
    ]


def _hub_ids(names: Sequence[str]) -> list[str] | None:
    """Return the names that are repositories on the Hub, without their revisions."""
    # The Hub accepts no revision here.
    repositories = [name.partition("@")[0] for name in names]
    return [name for name in dict.fromkeys(repositories) if _HUB_ID.match(name)] or None
