"""The sections of the page; each is empty where the report holds nothing for it."""

from __future__ import annotations

from collections.abc import Sequence

from compress.measurement import Measurement
from compress.metrics import Metric, format_bytes, format_interval, format_value, improvement, quality_metric
from compress.report.charts import cost_metrics, trade_off
from compress.report.distribution import latency_by_length, latency_curves
from compress.report.layers import Group, group_by_module, largest, union
from compress.report.markup import element, escape, tag
from compress.report.reliability import reliability_diagram
from compress.report.rows import (
    environment_rows,
    format_cell,
    limit_bound,
    limit_found,
    limit_state,
    stage_cells,
    stage_remarks,
    stage_tables,
    words_of,
)
from compress.report.schema import BASELINE, FINAL, LayerBytes, Report
from compress.report.slices import SliceFigures, format_change, slice_figures, slice_plot
from compress.stage.record import StageRecord, StageTable

SIGNS = {"passed": "\u2713 passed", "missed": "\u2717 missed", "skipped": "not judged", "unknown": "? not told"}


def section(heading: str, *children: str) -> str:
    """A section with its heading, or nothing if it has no content."""
    content = [child for child in children if child]
    return tag("section", "", tag("h2", "", escape(heading)), *content) if content else ""


def table(heads: Sequence[str], rows: Sequence[str], css_class: str = "", left: Sequence[int] = ()) -> str:
    """A table in a card that scrolls sideways where it is too wide. ``left``: columns set flush left."""
    cells = [
        element("th", {"scope": "col", "class": "left" if place in left else None}, escape(head))
        for place, head in enumerate(heads)
    ]
    body = tag("table", css_class, tag("thead", "", tag("tr", "", *cells)), tag("tbody", "", *rows))
    return tag("div", "card scroll", body)


def cell(content: str, value: float | str | None = None, css_class: str | None = None) -> str:
    """A cell of markup, sorted by ``value`` if that is given."""
    key = None if value is None else value if isinstance(value, str) else repr(value)
    return element("td", {"data-value": key, "class": css_class}, content)


def row_head(content: str) -> str:
    """The first cell of a row."""
    return element("th", {"scope": "row"}, escape(content))


def meter(share: float, css_class: str, label: str) -> str:
    """A bar filled to ``share``."""
    width = f"{min(max(share, 0.0), 1.0) * 100:.2f}%"
    track = element("rect", {"width": "100%", "height": "100%", "rx": 3, "class": "track"})
    fill = element("rect", {"width": width, "height": "100%", "rx": 3, "class": "fill"})
    return element("svg", {"class": f"meter {css_class}", "role": "img", "aria-label": label}, track, fill)


def notes_section(report: Report) -> str:
    """What a reader must know before the figures: notes, skipped targets, failed checks."""
    lines = [*report.notes, *(f"Target {skip.target} was skipped: {skip.reason}" for skip in report.skipped)]
    lines += [f"{check.stage}: {check.check}: {check.found}" for check in report.integrity if not check.passed]
    items = [tag("li", "", escape(line)) for line in lines]
    return tag("ul", "card notes", *items) if items else ""


def limits_section(report: Report) -> str:
    """Each limit with what was found."""
    rows = []
    for limit in report.limits:
        state = limit_state(limit)
        chip = tag("span", f"chip {state}", SIGNS[state])
        texts = (("on", limit.target), ("limit", limit_bound(limit)), ("found", limit_found(report, limit)))
        words = [element("td", {"class": "left wrap", "data-head": head}, escape(text)) for head, text in texts]
        rows.append(tag("tr", "", row_head(limit.metric), *words, cell(chip)))
    heads = ("Metric", "Target", "Limit", "Found on the final model", "Verdict")
    return section("Limits", table(heads, rows, "stack", left=(1, 2, 3))) if rows else ""


def panel(heading: str, caption: str, drawing: str | None) -> str:
    """A chart in its card, or nothing."""
    if drawing is None:
        return ""
    words = [tag("h3", "", escape(heading)), element("figcaption", {"class": "quiet"}, escape(caption))]
    return tag("figure", "card panel", *words, drawing)


def charts_section(report: Report, target: str, place: str) -> str:
    """Quality against size and against latency."""
    quality = quality_metric(report.metrics(target))
    if quality is None:
        return ""
    caption = "Bars are 95% intervals; the dotted line joins the models that no other beats in both."
    panels = [
        panel(f"{quality.title} against {cost.title.lower()}", caption, trade_off(report, target, quality, cost))
        for cost in cost_metrics(report, target)
    ]
    return section(f"What each stage cost and saved{place}", _pair(panels))


def latency_section(report: Report, target: str, place: str) -> str:
    """Latency over single calls and over lengths."""
    curves = panel(
        "Every call, sorted", "How many of the calls, one sentence each, were answered within a time.",
        latency_curves(report, target),
    )  # fmt: skip
    lengths = panel(
        "By sentence length", "Medians with 95% intervals; below each range, how many times faster.",
        latency_by_length(report, target),
    )  # fmt: skip
    return section(f"Latency{place}", _pair([curves, lengths]))


def slices_section(report: Report, target: str, place: str) -> str:
    """Quality in each slice of the test data, and whether probabilities hold what they promise."""
    found = slice_figures(report, target)
    diagram = panel(
        "Right as often as said", "Larger marks stand for more answers; on the dotted line, probabilities are right.",
        reliability_diagram(report, target),
    )  # fmt: skip
    if found is None:
        return section(f"Calibration{place}", _pair([diagram]))
    metric, figures = found
    caption = "Squares are the baseline, diamonds the final model; bars are 95% intervals."
    plot = panel(f"{metric.title} by slice", caption, slice_plot(report, target))
    heads = ("Slice", "Rows", "Baseline", "Final", "Change")
    body = table(heads, [_slice_row(each, metric) for each in figures], "sortable slices")
    hint = (
        "Changes are paired row by row, each with its own 95% interval. Of many slices one looks bad by chance: "
        "compress compare judges them together."
    )
    return section(f"By slice{place}", tag("p", "quiet", escape(hint)), _pair([plot, diagram]), body)


def _slice_row(each: SliceFigures, metric: Metric) -> str:
    about = tag("small", "", escape(each.about)) if each.about else ""
    head = element("th", {"scope": "row", "class": "wrap"}, escape(each.name) + about)
    values = []
    for model in (BASELINE, FINAL):
        row = each.measured.get(model)
        values.append(cell("", "") if row is None else cell(_valued(metric, row), row.value))
    change, _, interval = format_change(each.change).partition(" (")
    words = escape(change) + (tag("small", "", escape(interval.removesuffix(")"))) if interval else "")
    key = "" if each.change is None else each.change.value
    return tag("tr", "", head, cell(f"{each.rows:,}", each.rows), *values, cell(words, key))


def _valued(metric: Metric, row: Measurement) -> str:
    interval = format_interval(metric, row.low, row.high)
    return escape(format_value(metric, row.value)) + (tag("small", "", escape(interval)) if interval else "")


def _pair(panels: Sequence[str]) -> str:
    shown = [panel for panel in panels if panel]
    return tag("div", "pair", *shown) if shown else ""


def measurements_section(report: Report, target: str, heading: str, metrics: Sequence[Metric]) -> str:
    """A row for each model, a column for each metric: value, interval, and against the baseline."""
    models = [m for m in report.models if any(report.find(m, metric.name, target) for metric in metrics)]
    if not models:
        return ""
    rows = [
        tag("tr", model if model in (BASELINE, FINAL) else "", row_head(model),
            *(_measured(report, model, metric, target) for metric in metrics))
        for model in models
    ]  # fmt: skip
    return section(heading, table(["Model", *(metric.title for metric in metrics)], rows, "sortable"))


def _measured(report: Report, model: str, metric: Metric, target: str) -> str:
    row, before = report.find(model, metric.name, target), report.find(BASELINE, metric.name, target)
    if row is None:
        return cell("", "")
    lines = [_valued(metric, row)]
    gain = improvement(metric, row.value, before.value) if before and model != BASELINE else ""
    if gain and metric.style == "percent":
        gain = f"{gain} of baseline"
    lines += [tag("small", "gain", escape(gain))] if gain else []
    return cell("".join(lines), row.value)


def bytes_section(report: Report) -> str:
    """Where the bytes are, by module, for the baseline and the final model."""
    shown = [model for model in (BASELINE, FINAL) if report.bytes_by_layer.get(model)]
    shown = shown or [model for model, layers in report.bytes_by_layer.items() if layers][:2]
    if not shown:
        return ""
    groups = {model: group_by_module(report.bytes_by_layer[model]) for model in shown}
    totals = {model: sum(group.bytes for group in found.values()) for model, found in groups.items()}
    largest_total = max(1, *totals.values())
    scale = [
        tag("p", "", tag("strong", "", escape(model)), tag("span", "", escape(format_bytes(total))))
        + meter(total / largest_total, model, f"{model}: {format_bytes(total)}")
        for model, total in totals.items()
    ]
    rows = [
        tag("tr", "", element("th", {"scope": "row", "class": "wrap"}, escape(name)),
            *(_share(groups[model].get(name), totals[model], model) for model in shown))
        for name in union(*groups.values())
    ]  # fmt: skip
    hint = tag("p", "quiet", "Below, by module: bytes, and the share of that model's own total.")
    body = table(["Module", *shown], rows, "sortable split", left=(1, 2))
    body = body.replace('<div class="card scroll">', '<div class="card scroll">' + tag("div", "scale", *scale, hint), 1)
    tensors = [_largest(model, report.bytes_by_layer[model]) for model in shown]
    return section("Where the bytes are", body, *tensors)


def _share(group: Group | None, total: int, model: str) -> str:
    if group is None:
        return cell("", "0", "bar left")
    share = group.bytes / total if total else 0.0
    kinds = ", ".join(group.dtypes)
    words = f"{format_bytes(group.bytes)} \u00b7 {_percent(share)}"
    bar = meter(share, model, f"{share * 100:.1f}% of {model}")
    return cell(escape(words) + bar + tag("small", "", escape(kinds)), group.bytes, "bar left")


def _percent(share: float) -> str:
    return "under 0.1%" if 0 < share < 0.001 else f"{share * 100:.1f}%"


def _largest(model: str, layers: Sequence[LayerBytes]) -> str:
    rows = [
        tag("tr", "", element("th", {"scope": "row", "class": "wrap"}, escape(layer.name)),
            cell(escape(layer.dtype), css_class="left"), cell(escape(format_bytes(layer.bytes)), layer.bytes))
        for layer in largest(layers)
    ]  # fmt: skip
    summary = tag("summary", "", escape(f"Largest tensors of {model}"))
    return tag("details", "", summary, table(("Tensor", "Type", "Bytes"), rows, "sortable", left=(1,)))


def stages_section(report: Report) -> str:
    """Each stage with time, cache state, peak memory, the checks of its output, and what it had to say."""
    longest = max((stage.seconds for stage in report.stages), default=0.0) or 1.0
    rows = [_stage(report, stage, longest) for stage in report.stages]
    heads = ("Stage", "Time", "Share of the longest", "Checks", "Cache", "Peak memory", "Integrity", "Cache key")
    said = [tag("li", "", escape(line)) for line in stage_remarks(report)]
    listed = tag("ul", "card notes remarks", *said) if said else ""
    found = [_found(heading, each) for heading, each in stage_tables(report)]
    return section("Stages", table(heads, rows, "sortable stages", left=(2, 4, 6, 7)), listed, *found) if rows else ""


def _found(heading: str, found: StageTable) -> str:
    """A table of a stage, folded away."""
    words = words_of(found)
    rows = [
        tag(
            "tr",
            "",
            *(
                cell(escape(format_cell(value)), value, "left wrap" if place in words else None)
                for place, value in enumerate(row)
            ),
        )
        for row in found.rows
    ]
    summary = tag("summary", "", escape(heading))
    return tag("details", "", summary, table(found.columns, rows, "sortable", left=words))


def _stage(report: Report, stage: StageRecord, longest: float) -> str:
    seconds, checking, state, peak = stage_cells(stage)
    checks = [check for check in report.integrity if check.stage == stage.name]
    passed = f"{sum(check.passed for check in checks)} of {len(checks)} passed" if checks else ""
    return tag(
        "tr",
        "",
        row_head(stage.name),
        cell(escape(seconds), stage.seconds),
        cell(meter(stage.seconds / longest, "", seconds), stage.seconds, "bar"),
        cell(escape(checking), stage.check_seconds),
        cell(tag("span", "chip", state), state, "left"),
        cell(escape(peak), "" if stage.peak_rss_bytes is None else stage.peak_rss_bytes),
        cell(escape(passed), passed, "left"),
        cell(tag("code", "", escape(stage.key[:12])), css_class="left"),
    )


def environment_section(report: Report) -> str:
    """The machine and the versions."""
    facts = [
        tag("div", "", tag("dt", "", escape(name)), tag("dd", "", escape(value)))
        for name, value in environment_rows(report.environment)
    ]
    return section("Environment", tag("dl", "card facts", *facts)) if facts else ""
