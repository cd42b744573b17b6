"""Metrics table: title, direction, unit, margins and use in views of every metric, one row each.

A new metric is one row of the table below, and a function that measures it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from compress.plugins import find_extensions, load_extension

Style = Literal["percent", "bytes", "count", "milliseconds", "rate", "times", "plain"]
Direction = Literal["higher", "lower", "unknown"]
Part = Literal[
    "task",
    "always",
    "calls",
    "batches",
    "requests",
    "images",
    "generation",
    "continuations",
    "questions",
    "instructions",
    "similarity",
    "index",
]
"""Part of a run that measures a metric: the task's own functions, every run, or the part of that name."""
Aggregation = Literal["by task", "mean", "exp of mean", "ratio of sums", "all examples", "median", "exact"]


@dataclass(frozen=True)
class Metric:
    """Row of the metrics table, or one metric that `describe_metric` derived from a row.

    Attributes:
        name: Name in `report.json`. A placeholder stands for a number or a word in it: `recall_at_{number}`.
        title: Heading in views. It may use the placeholders of ``name``.
        style: Notation of a value.
        better: Direction that is an improvement.
        unit: Unit of values, where a measurement states none.
        quality: Whether it measures how well a model does its task. Such metrics are the first columns of tables.
        relative: Whether it compares with the baseline already, so that a ratio to the baseline has no meaning.
        aggregation: Computation of the value from raw samples. The samples of `exp of mean` are logarithms.
        from_file: Whether it is read from the model's files, so that nothing has to run.
        margin: Smallest regression that matters in a comparison, as a policy writes it: `5%` or `0.5 points`. Without
            one it is half a point of a percentage and 1% of anything else.
        gate_margin: The same for a gate without a policy of its own. Without one, the gate doesn't judge the metric.
        column: Whether tables show it beside the quality. Columns have the order of the table.
        on_card: Whether model cards show it.
        hub_name: Name of the metric on the Hugging Face Hub, where it differs.
        words: Words after a ratio that is an improvement or a loss, as in `3x smaller`. Default: by style.
        measured_by: Part of a run that measures it.
    """

    name: str
    title: str
    style: Style = "plain"
    better: Direction = "unknown"
    unit: str = ""
    quality: bool = False
    relative: bool = False
    aggregation: Aggregation = "by task"
    from_file: bool = False
    margin: str | None = None
    gate_margin: str | None = None
    column: bool = False
    on_card: bool = False
    hub_name: str = ""
    words: tuple[str, str] | None = None
    measured_by: Part = "task"

    @property
    def gain(self) -> str:
        """Word after a ratio that is an improvement."""
        return self._ratio_words()[0]

    @property
    def loss(self) -> str:
        """Word after a ratio that is a regression."""
        return self._ratio_words()[1]

    def _ratio_words(self) -> tuple[str, str]:
        default = ("lower", "higher") if self.better == "lower" else ("higher", "lower")
        return self.words or _RATIO_WORDS.get(self.style, default)

    @property
    def timed(self) -> bool:
        """Return whether another run on the same machine gives another value, as for times, rates and energy."""
        return self.style in ("milliseconds", "rate", "times") or self.gain == "faster" or self.unit in _CONSUMED

    @property
    def exponential(self) -> bool:
        """Return whether the value is e to the mean of the raw samples, which are logarithms."""
        return self.aggregation == "exp of mean"

    @property
    def pattern(self) -> str:
        """Pattern that covers the names of this row, as the rules of a policy write it: `recall_at_*`."""
        return _PLACEHOLDER.sub("*", self.name)


_RATIO_WORDS: dict[str, tuple[str, str]] = {
    "bytes": ("smaller", "larger"),
    "count": ("fewer", "more"),
    "milliseconds": ("faster", "slower"),
    "rate": ("more", "less"),
    "times": ("faster", "slower"),
}
_COUNTED = ("fewer", "more")
_OF_FILE: dict[str, Any] = {"from_file": True, "margin": "0%", "column": True, "on_card": True}
"""Columns of the main metrics that are read from a model's files."""
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_CONSUMED = ("J", "mJ", "W", "s")
_PLACEHOLDERS = {
    "number": r"\d+",
    "low": r"\d+",
    "high": r"\d+",
    "context": r"\d+",
    "rate": r"[\d.e+]+",
    "label": r".+",
    "object_size": r"small|medium|large",
    "embedding": r"int8|binary",
}
"""Regular expression of each placeholder that names may have."""


def share(name: str, title: str, **columns: Any) -> Metric:
    """Return the row of a quality that is a share: a percentage of which more is better."""
    return replace(Metric(name, title, "percent", "higher", quality=True), **columns)


def milliseconds(name: str, title: str, **columns: Any) -> Metric:
    """Return the row of a time in milliseconds."""
    row = Metric(name, title, "milliseconds", "lower", aggregation="median", measured_by="calls")
    return replace(row, **columns)


def speedup(name: str, title: str, **columns: Any) -> Metric:
    """Return the row of a ratio of times to the baseline's."""
    return replace(Metric(name, title, "times", "higher", relative=True, measured_by="calls"), **columns)


def cost(name: str, title: str, style: Style = "plain", **columns: Any) -> Metric:
    """Return the row of a quantity of which less is better."""
    return replace(Metric(name, title, style, "lower"), **columns)


def error_rate(name: str, title: str, **columns: Any) -> Metric:
    """Return the row of a percentage of wrong words or characters."""
    return cost(name, title, "percent", aggregation="ratio of sums", **columns)


def stored(name: str, title: str, style: Style = "plain", **columns: Any) -> Metric:
    """Return the row of a quantity that is read from files."""
    return cost(name, title, style, aggregation="exact", measured_by="always", **columns)


def memory(name: str, title: str, **columns: Any) -> Metric:
    """Return the row of a resident memory in bytes."""
    row = cost(name, title, "bytes", aggregation="median", margin="2%", measured_by="always")
    return replace(row, **columns)


def tokens_rate(name: str, title: str) -> Metric:
    """Return the row of a number of tokens per second, which tables show."""
    row = Metric(name, title, "rate", "higher", "tokens/s", aggregation="median", column=True)
    return replace(row, measured_by="generation")


METRICS = (
    # Classification, ranking and retrieval.
    share("accuracy", "Accuracy", aggregation="mean", gate_margin="0.5 points", on_card=True),
    share("zero_shot_accuracy", "Zero-shot accuracy", aggregation="mean"),
    share("top_1_accuracy", "Right token first", aggregation="mean"),
    share("top_5_accuracy", "Top-5 accuracy", aggregation="mean"),
    share("f1", "F1", on_card=True),
    share("f1_{label}", "F1 of {label}", quality=False),
    share("precision", "Precision"),
    share("recall", "Recall"),
    share("precision_at_{number}", "Precision at {number}", aggregation="mean"),
    share("recall_at_1", "Recall at 1", aggregation="mean", on_card=True),
    share("recall_at_10", "Recall at 10", aggregation="mean", on_card=True),
    share("recall_at_{number}", "Recall at {number}", aggregation="mean", gate_margin="0.5 points"),
    share("recall_at_{number}_image_to_text", "Text in the first {number} of an image", aggregation="mean"),
    share("recall_at_{number}_text_to_image", "Image in the first {number} of a text", aggregation="mean"),
    share("recall_at_{number}_{embedding}", "Recall at {number}, {embedding} embeddings", quality=False),
    share("index_recall_at_{number}", "Recall at {number}, index", aggregation="mean", measured_by="index"),
    share(
        "index_recall_at_{number}_{embedding}",
        "Recall at {number}, {embedding} index",
        quality=False,
        measured_by="index",
    ),
    share("index_ndcg_at_{number}", "NDCG at {number}, index", aggregation="mean", measured_by="index"),
    share("mean_reciprocal_rank", "Mean reciprocal rank", aggregation="mean"),
    share("ndcg_at_{number}", "NDCG at {number}", aggregation="mean"),
    Metric(
        "spearman_{label}",
        "Spearman correlation, {label}",
        better="higher",
        aggregation="all examples",
        measured_by="similarity",
    ),
    Metric(
        "pearson_{label}",
        "Pearson correlation, {label}",
        better="higher",
        aggregation="all examples",
        measured_by="similarity",
    ),
    Metric("loss", "Loss", better="lower", quality=True, aggregation="mean", gate_margin="1%"),
    Metric("calibration_error", "Calibration error", "percent", "lower", aggregation="all examples", on_card=True),
    Metric("brier_score", "Brier score", better="lower", aggregation="mean"),
    # Detection and segmentation.
    share("map", "mAP", aggregation="all examples"),
    share("map_50", "mAP at IoU 0.5", aggregation="all examples"),
    share("map_75", "mAP at IoU 0.75", quality=False, aggregation="all examples"),
    share("map_{object_size}", "mAP of {object_size} objects", quality=False, aggregation="all examples"),
    share("mar_{number}", "Mean recall of {number} boxes", quality=False, aggregation="all examples"),
    share("ap_{label}", "AP of {label}", quality=False, aggregation="all examples"),
    share("mean_iou", "Mean IoU", aggregation="ratio of sums"),
    share("iou_{label}", "IoU of {label}", quality=False, aggregation="ratio of sums"),
    share("pixel_accuracy", "Pixels right", aggregation="ratio of sums"),
    # Text.
    share("exact_match", "Exact match", aggregation="mean"),
    share("chrf", "chrF", aggregation="all examples"),
    share("bleu", "BLEU", aggregation="all examples"),
    share("rouge_l", "ROUGE-L", aggregation="mean"),
    share("token_accuracy", "Words right", aggregation="ratio of sums"),
    cost("perplexity", "Perplexity", quality=True, aggregation="exp of mean", gate_margin="1%", on_card=True),
    cost("bits_per_byte", "Bits a byte of text", unit="bits", aggregation="ratio of sums", words=_COUNTED),
    share("next_token_accuracy", "Next token right", aggregation="mean"),
    share("choice_accuracy", "Choices right", aggregation="mean", measured_by="questions"),
    share("choice_accuracy_normalized", "Choices right, by length", aggregation="mean", measured_by="questions"),
    share("instructions_followed", "Instructions followed", aggregation="mean", measured_by="instructions"),
    share("checks_passed", "Checks of answers passed", quality=False, aggregation="mean", measured_by="instructions"),
    # The task's own perplexity is the quality of a language model. This one and the next two come beside it.
    cost(
        "answer_perplexity",
        "Perplexity of the baseline's answers",
        aggregation="exp of mean",
        margin="2%",
        measured_by="continuations",
    ),
    Metric(
        "repetition",
        "Repeated runs of four tokens",
        "percent",
        "lower",
        aggregation="mean",
        margin="5 points",
        measured_by="continuations",
    ),
    Metric(
        "looping",
        "Continuations that end in a loop",
        "percent",
        "lower",
        aggregation="mean",
        margin="5 points",
        measured_by="continuations",
    ),
    # Speech.
    error_rate(
        "word_error_rate", "Word error rate", quality=True, gate_margin="0.5 points", on_card=True, hub_name="wer"
    ),
    error_rate("character_error_rate", "Character error rate", quality=True),
    share("word_accuracy", "Words heard right", aggregation="ratio of sums"),
    error_rate("word_error_rate_as_written", "Word error rate as written"),
    error_rate("word_error_rate_to_baseline", "Words unlike the baseline's", relative=True),
    Metric("word_errors", "Words wrong", "count", "lower"),
    Metric("words", "Words", "count"),
    # Nearness to the baseline's outputs.
    Metric("agreement", "Agreement", "percent", "higher", relative=True, aggregation="mean", column=True, on_card=True),
    Metric("rms_error", "RMS difference over spread", "percent", "lower", relative=True, column=True),
    Metric("largest_error", "Largest difference over spread", "percent", "lower", relative=True),
    cost("kl_divergence", "KL divergence", unit="nats", relative=True, aggregation="mean", column=True),
    share("embedding_cosine", "Cosine to the baseline's embedding", quality=False, relative=True, aggregation="mean"),
    share("output_cosine", "Cosine to the baseline's outputs", quality=False, relative=True, aggregation="mean"),
    # Files.
    stored("size_bytes", "Size on disk", "bytes", gate_margin="0%", **_OF_FILE),
    stored("size_bytes_{label}", "Size on disk of {label}", "bytes"),
    stored("shipped_bytes", "Model and runtime", "bytes"),
    stored("bits_per_parameter", "Bits a parameter", unit="bits", words=_COUNTED, **_OF_FILE),
    stored("parameters", "Parameters", "count", **_OF_FILE),
    # Times of calls on examples.
    milliseconds("latency_ms", "Latency", gate_margin="5%", column=True, on_card=True),
    milliseconds("latency_p90_ms", "Latency p90", column=True),
    milliseconds("latency_p99_ms", "Latency p99"),
    milliseconds("latency_ms_length_{low}_{high}", "Latency, {low}\u2013{high} tokens"),
    milliseconds("latency_ms_batch_{number}", "Latency, batch {number}", gate_margin="5%", measured_by="batches"),
    milliseconds("latency_ms_rate_{rate}", "Latency at {rate}/s", measured_by="requests"),
    milliseconds("latency_p99_ms_rate_{rate}", "Latency p99 at {rate}/s", measured_by="requests"),
    cost("real_time_factor", "Real-time factor", column=True, words=("faster", "slower"), measured_by="calls"),
    Metric(
        "throughput",
        "Throughput",
        "rate",
        "higher",
        "examples/s",
        aggregation="median",
        column=True,
        measured_by="batches",
    ),
    # Times of text generation, each after a prompt of so many tokens.
    milliseconds(
        "time_to_first_token_ms_context_{context}",
        "Time to first token, context {context}",
        gate_margin="5%",
        measured_by="generation",
    ),
    milliseconds(
        "time_per_output_token_ms_context_{context}",
        "Time per output token, context {context}",
        gate_margin="5%",
        measured_by="generation",
    ),
    tokens_rate("tokens_per_second_context_{context}", "Tokens per second, context {context}"),
    tokens_rate("prefill_tokens_per_second_context_{context}", "Prompt tokens per second, context {context}"),
    # Start-up, memory and energy.
    milliseconds("startup_ms", "Start-up", margin="5%", gate_margin="10%", column=True, measured_by="always"),
    milliseconds("session_load_ms", "Session load", margin="5%", measured_by="always"),
    memory("peak_memory_bytes", "Peak memory", gate_margin="5%", column=True, words=("less", "more")),
    memory(
        "peak_memory_bytes_batch_{number}",
        "Peak memory, batch {number}",
        gate_margin="5%",
        words=("less", "more"),
        measured_by="batches",
    ),
    memory("runtime_memory_bytes", "Runtime memory"),
    milliseconds("cpu_ms", "Processor time a call"),
    Metric(
        "energy_mj",
        "Energy a call",
        better="lower",
        unit="mJ",
        aggregation="median",
        words=("less", "more"),
        measured_by="calls",
    ),
    # Speed-ups over the baseline in the same session.
    speedup("speedup", "Speed-up", column=True, on_card=True),
    speedup("speedup_batch_{number}", "Speed-up, batch {number}", measured_by="batches"),
    speedup(
        "speedup_time_per_output_token_context_{context}",
        "Speed-up per output token, context {context}",
        column=True,
        measured_by="generation",
    ),
    speedup(
        "speedup_time_to_first_token_context_{context}",
        "Speed-up to the first token, context {context}",
        column=True,
        measured_by="generation",
    ),
    # Fixed work that is timed beside the models.
    milliseconds("reference_matmul_ms", "Reference product", measured_by="always"),
    milliseconds("reference_copy_ms", "Reference copy", measured_by="always"),
)
"""Metrics of the core. Plug-ins add rows at the extension point `metrics`."""
_CONTEXT = "_context_{context}"


@dataclass(frozen=True)
class MetricsTable:
    """Rows of the core and of all plug-ins: those with a fixed name, and those whose name has placeholders."""

    rows: tuple[Metric, ...]
    fixed: dict[str, Metric]
    patterns: tuple[tuple[re.Pattern[str], Metric], ...]


@cache
def metrics_table() -> MetricsTable:
    """Return the metrics table with the rows of the core and of all plug-ins."""
    rows = list(METRICS)
    for extension in find_extensions("metrics").values():
        rows += load_extension(extension, lambda metrics: metrics) or ()
    # The regular expression of the names that a row with placeholders covers.
    patterns = tuple(
        (re.compile(_PLACEHOLDER.sub(lambda match: f"(?P<{match[1]}>{_PLACEHOLDERS[match[1]]})", f"^{row.name}$")), row)
        for row in rows
        if "{" in row.name
    )
    return MetricsTable(tuple(rows), {row.name: row for row in rows if "{" not in row.name}, patterns)


def _match_pattern(name: str) -> tuple[Metric, dict[str, str]] | None:
    """Return the first row with placeholders that covers ``name``, and the values of its placeholders."""
    for pattern, row in metrics_table().patterns:
        if match := pattern.match(name):
            return row, match.groupdict()
    return None


_SLICE = re.compile(r"^([^\[\]]+)\[(.+)\]$")
_AGAINST = re.compile(r"^(.+)_against_([^_]+)$")
_ON_SPLIT = re.compile(r"^(.+)_on_([A-Za-z0-9-]+)$")
_SAMPLING = re.compile(r"^(.+)_(steps|size)_(\d+)$")
_SAMPLING_TITLES = {"steps": "{} steps", "size": "{} pixels a side"}
_TO_BASELINE = " to the baseline's embedding"


def describe_metric(name: str, unit: str = "") -> Metric:
    """Return the metric of that name: a row of the table, or one derived from the name's ending and its unit.

    Args:
        name: Name of the metric in `report.json`.
        unit: Unit of its measurements, if one is known.
    """
    if row := metrics_table().fixed.get(name):
        return replace(row, unit=unit or row.unit)
    # Names that say where another metric was measured: `f1[label=a]`, `agreement_against_torch`, `perplexity_on_code`.
    if part := slice_of(name):
        whole = describe_metric(part[0], unit)
        return replace(whole, name=name, title=f"{whole.title}, {part[1]}", quality=False)
    if match := _AGAINST.match(name):
        compared = describe_metric(match[1], unit)
        title = f"{compared.title.removesuffix(_TO_BASELINE)} against {match[2]}"
        return replace(compared, name=name, title=title, quality=False, relative=True)
    if on_split := split_of(name):
        compared = describe_metric(on_split[0], unit)
        return replace(compared, name=name, title=f"{compared.title} on {on_split[1]}", quality=False)
    if matched := _match_pattern(name):
        row, values = matched
        return replace(row, name=name, title=row.title.format(**values), unit=unit or row.unit)
    # Times of one number of denoising steps, or of one image size.
    if (sampling := _SAMPLING.match(name)) and (row := metrics_table().fixed.get(sampling[1])):
        title = f"{row.title}, {_SAMPLING_TITLES[sampling[2]].format(sampling[3])}"
        return replace(row, name=name, title=title, unit=unit or row.unit)
    return _metric_by_unit(name, unit)


def row_of(name: str) -> tuple[Metric, dict[str, str]] | None:
    """Return the row of the table for a metric's name, and the values of its placeholders, or None if no row covers it.

    The row of `accuracy[label=a]`, `agreement_against_torch` and `perplexity_on_code` is that of the metric before it.
    """
    if row := metrics_table().fixed.get(name):
        return row, {}
    whole = slice_of(name) or _AGAINST.match(name) or split_of(name)
    if whole:
        return row_of(whole[0] if isinstance(whole, tuple) else whole[1])
    if matched := _match_pattern(name):
        return matched
    sampling = _SAMPLING.match(name)
    return row_of(sampling[1]) if sampling else None


def _metric_by_unit(name: str, unit: str) -> Metric:
    """Return a metric that the table doesn't have, by the ending of its name and its unit."""
    title = name.replace("_", " ").strip().capitalize() or name
    if name.endswith("_bytes") or unit in {"byte", "bytes", "B"}:
        return Metric(name, title.removesuffix(" bytes"), "bytes", "lower", unit)
    if name.endswith("_ms") or unit == "ms":
        return milliseconds(name, title.removesuffix(" ms"), unit=unit)
    if unit in {"x", "times"}:
        return Metric(name, title, "times", "higher", unit, words=("higher", "lower"))
    if unit in {"fraction", "ratio", "share", "%"}:
        is_error = any(word in name for word in ("error", "loss", "miss"))
        return Metric(name, title, "percent", "lower" if is_error else "higher", unit, quality=True)
    return Metric(name, title, unit=unit)


def metric_against(metric: str, target: str) -> str:
    """Return the name of a metric of nearness to the same model on another target: `agreement_against_torch`."""
    return f"{metric.removesuffix('_to_baseline')}_against_{target}"


def metric_on_slice(metric: str, name: str) -> str:
    """Return the name of a metric on a slice of the data: `accuracy[label=positive]`."""
    return f"{metric}[{name}]"


def slice_of(name: str) -> tuple[str, str] | None:
    """Return (metric, slice) of `accuracy[label=positive]`, or None for a metric of all rows."""
    match = _SLICE.match(name)
    return (match[1], match[2]) if match else None


def metric_on_split(metric: str, split: str) -> str:
    """Return the name of a metric on a split that is evaluated beside the test split: `perplexity_on_code`."""
    return f"{metric}_on_{split}"


def split_of(name: str) -> tuple[str, str] | None:
    """Return (metric, split) of `perplexity_on_code` or a slice of it, or None for a metric on the test split."""
    whole = slice_of(name)
    match = _ON_SPLIT.match(whole[0] if whole else name)
    return (match[1], match[2]) if match and match[1] in metrics_table().fixed else None


def length_range_of(name: str) -> tuple[int, int] | None:
    """Return the range of lengths (9, 16) of `latency_ms_length_9_16`, or None for any other metric."""
    matched = _match_pattern(name) if name.startswith("latency_ms_length_") else None
    return (int(matched[1]["low"]), int(matched[1]["high"])) if matched else None


def context_of(name: str) -> tuple[str, int] | None:
    """Return (`tokens_per_second`, 512) of `tokens_per_second_context_512`, or None if it's not of text generation."""
    matched = _match_pattern(name) if "_context_" in name else None
    if matched is None or not matched[0].name.endswith(_CONTEXT):
        return None
    return matched[0].name.removesuffix(_CONTEXT), int(matched[1]["context"])


def shortest_context(names: Iterable[str]) -> int | None:
    """Return the shortest context at which text generation was timed, or None."""
    return min((context[1] for name in names if (context := context_of(name))), default=None)


def file_metrics() -> frozenset[str]:
    """Return the names of the metrics that are read from a model's files, so that nothing has to run."""
    return frozenset(row.name for row in metrics_table().rows if row.from_file)


def card_metrics() -> frozenset[str]:
    """Return the names of the metrics that model cards show."""
    return frozenset(row.name for row in metrics_table().rows if row.on_card)


def quality_metric(units: dict[str, str]) -> Metric | None:
    """Return the task's own metric among metrics (name -> unit): the first known quality, else agreement."""
    described = [describe_metric(name, unit) for name, unit in units.items()]
    qualities = [metric for metric in described if metric.quality]
    return next(iter(qualities or [metric for metric in described if metric.name == "agreement"]), None)


def main_metrics(units: dict[str, str]) -> list[Metric]:
    """Return the columns of tables: the task's own metrics, then those that the metrics table marks as columns.

    Where text generation was timed at several contexts, only the shortest is a column.

    Args:
        units: Name -> unit of every measured metric.
    """
    described = [describe_metric(name, unit) for name, unit in units.items()]
    context = shortest_context(units)
    names = [row.name.replace("{context}", str(context)) for row in metrics_table().rows if row.column]
    return [metric for metric in described if metric.quality] + [
        describe_metric(name, units[name]) for name in names if name in units
    ]


def other_metrics(units: dict[str, str]) -> list[Metric]:
    """Return every measured metric (name -> unit) that is no column of tables, without those of slices."""
    columns = {metric.name for metric in main_metrics(units)}
    return [describe_metric(name, unit) for name, unit in units.items() if name not in columns and not slice_of(name)]
