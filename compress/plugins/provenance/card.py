"""The model card, README.md: front matter that the Hugging Face Hub reads, with results in `model-index`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from compress.formats.model_file import format_of
from compress.formats.registry import FORMATS
from compress.pipeline.licence_rules import canonical, hub_name
from compress.pipeline.licences import data_names
from compress.plugins.provenance.run_view import RunView, plain_name
from compress.recipe.recipe import Recipe
from compress.report.run_folder import MODEL
from compress.results.formatting import format_interval, format_value
from compress.results.measurement import Measurement
from compress.results.metrics import describe_metric
from compress.results.report import DataRecord

_TEMPLATES = Environment(
    loader=PackageLoader("compress", ""), trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
)
_HEADS = ("what", "on", "value", "95% interval", "rows or samples")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def render_card(template: str, data: ModelCardData, rows: Sequence[Measurement], **values: Any) -> str:
    """A card from a template of `compress`, as the Hub's own library reads and writes it."""
    measured = [_cells(row) for row in rows]
    page = _TEMPLATES.get_template(template)
    return str(ModelCard(page.render(front=data.to_yaml(line_break="\n"), heads=_HEADS, measured=measured, **values)))


def card_data(licence: str, task: str, library: str, **more: Any) -> ModelCardData:
    """The front matter; a licence that the Hub has no name for is named beside `other`."""
    name = hub_name(canonical(licence))
    more = {**more, "pipeline_tag": task, "library_name": library}
    return ModelCardData(license=name or "other", license_name=None if name else licence, **more)


def run_card(run: RunView) -> str:
    """The card of a run's final model."""
    report, recipe = run.report, run.recipe
    data = card_data(
        run.licence,
        recipe.task,
        _library(run),
        base_model=_hub_ids([one.name for one in run.licences if one.binds]),
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
        licences=[(one.of, one.licence) for one in run.licences],
        remarks=run.licence_remarks,
    )


def eval_results(recipe: Recipe, rows: Sequence[Measurement], judged: DataRecord | None) -> list[EvalResult]:
    """Figures of a model for `model-index`; where one has an interval, that is among its arguments.

    A data set's type is spelled as the Hub spells ids.
    """
    name = plain_name(next(data_names(recipe.data), "the recipe's rows"))
    split = judged.split if judged is not None else "test"
    told = {"sha256": judged.digest, "rows": judged.rows} if judged is not None else None
    return [
        EvalResult(
            task_type=recipe.task,
            dataset_type=name if _HUB_ID.match(name) else re.sub(r"[^\w.-]+", "-", name).strip("-"),
            dataset_name=f"{name}, {split}",
            dataset_split=split,
            dataset_args=told,
            metric_type=describe_metric(row.metric).hub_name or row.metric,
            metric_value=row.value,
            metric_name=f"{describe_metric(row.metric, row.unit).title} on {row.target}",
            metric_args={"target": row.target, "unit": row.unit}
            | ({"low": row.low, "high": row.high, "n": row.n} if row.low is not None else {}),
        )
        for row in rows
    ]


def _library(run: RunView) -> str:
    """Return the name that the Hugging Face Hub has for the library that opens the model's file."""
    written = format_of(run.folder / MODEL)
    return FORMATS[written].library or written


def _cells(row: Measurement) -> tuple[str, ...]:
    metric = describe_metric(row.metric, row.unit)
    interval = format_interval(metric, row.low, row.high) if row.low is not None else ""
    return (metric.title, row.target, format_value(metric, row.value), interval, str(row.n) if row.n > 1 else "")


def _hub_ids(names: Sequence[str]) -> list[str] | None:
    """Those that the Hub knows, without their revision."""
    found = [name.partition("@")[0] for name in names]
    return [name for name in dict.fromkeys(found) if _HUB_ID.match(name)] or None
