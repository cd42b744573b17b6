"""What the views know of a metric: its title, which way is better, and how a value is written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from compress.results.measurement import Measurement

Style = Literal["percent", "bytes", "count", "milliseconds", "rate", "times", "plain"]


@dataclass(frozen=True)
class Metric:
    """One metric as people read it. ``gain`` and ``loss`` are the words after a ratio: `3x smaller`.

    ``relative`` metrics compare with the baseline already, so that no ratio of theirs means anything. The value of an
    ``exponential`` one is e to the mean of its raw outcomes, which are logarithms.
    """

    name: str
    title: str
    style: Style = "plain"
    better: Literal["higher", "lower", "unknown"] = "unknown"
    gain: str = "higher"
    loss: str = "lower"
    quality: bool = False
    relative: bool = False
    exponential: bool = False
    unit: str = ""

    @property
    def timed(self) -> bool:
        """Whether another run on the same machine gives another value: a time, a rate, an energy."""
        return self.style in ("milliseconds", "rate", "times") or self.gain == "faster" or self.unit in _CONSUMED


def _quality(name: str, title: str) -> Metric:
    return Metric(name, title, "percent", "higher", quality=True)


def _error(name: str, title: str, style: Style) -> Metric:
    return Metric(name, title, style, "lower", "lower", "higher", quality=True)


def _time(name: str, title: str) -> Metric:
    return Metric(name, title, "milliseconds", "lower", "faster", "slower")


def _faster(name: str, title: str) -> Metric:
    return Metric(name, title, "times", "higher", "faster", "slower", relative=True)


_PARTS_OF_A_PICTURE = {
    "text_encoder": "Text encoder",
    "denoiser_step": "Step of the denoiser",
    "decoder": "Decoder of pictures",
    "scheduler": "Scheduler and guidance",
}
_CONSUMED = ("J", "mJ", "W", "s")
_KNOWN = {
    metric.name: metric
    for metric in (
        _quality("accuracy", "Accuracy"),
        _quality("top_1_accuracy", "Right token first"),
        _quality("zero_shot_accuracy", "Zero-shot accuracy"),
        _quality("top_5_accuracy", "Top-5 accuracy"),
        _quality("f1", "F1"),
        _quality("precision", "Precision"),
        _quality("recall", "Recall"),
        _quality("exact_match", "Exact match"),
        _quality("chrf", "chrF"),
        _quality("bleu", "BLEU"),
        _quality("rouge_l", "ROUGE-L"),
        _quality("token_accuracy", "Words right"),
        replace(_error("perplexity", "Perplexity", "plain"), exponential=True),
        Metric("bits_per_byte", "Bits a byte of text", "plain", "lower", "fewer", "more", unit="bits"),
        _quality("next_token_accuracy", "Next token right"),
        _quality("choice_accuracy", "Choices right"),
        _quality("choice_accuracy_normalized", "Choices right, by length"),
        replace(
            _error("answer_perplexity", "Perplexity of the baseline's answers", "plain"),
            exponential=True,
            quality=False,  # beside the task's own, as what is written is
        ),
        _quality("instructions_followed", "Instructions followed"),
        replace(_quality("checks_passed", "Checks of answers passed"), quality=False),
        _quality("mean_reciprocal_rank", "Mean reciprocal rank"),
        _quality("map", "mAP"),
        _quality("map_50", "mAP at IoU 0.5"),
        _quality("mean_iou", "Mean IoU"),
        _quality("pixel_accuracy", "Pixels right"),
        _error("word_error_rate", "Word error rate", "percent"),
        _error("character_error_rate", "Character error rate", "percent"),
        _quality("word_accuracy", "Words heard right"),
        replace(_error("word_error_rate_as_written", "Word error rate as written", "percent"), quality=False),
        replace(
            _error("word_error_rate_to_baseline", "Words unlike the baseline's", "percent"),
            quality=False,
            relative=True,
        ),
        Metric("word_errors", "Words wrong", "count", "lower", "fewer", "more"),
        Metric("words", "Words", "count"),
        _error("loss", "Loss", "plain"),
        Metric("calibration_error", "Calibration error", "percent", "lower", "lower", "higher"),
        Metric("brier_score", "Brier score", "plain", "lower", "lower", "higher"),
        Metric("agreement", "Agreement", "percent", "higher", relative=True),
        Metric("kl_divergence", "KL divergence", "plain", "lower", "lower", "higher", relative=True, unit="nats"),
        Metric("embedding_cosine", "Cosine to the baseline's embedding", "percent", "higher", relative=True),
        replace(_error("rms_error", "RMS difference over spread", "percent"), quality=False, relative=True),
        replace(_error("largest_error", "Largest difference over spread", "percent"), quality=False, relative=True),
        Metric("output_cosine", "Cosine to the baseline's outputs", "percent", "higher", relative=True),
        Metric("repetition", "Repeated runs of four tokens", "percent", "lower", "lower", "higher"),
        Metric("looping", "Continuations that end in a loop", "percent", "lower", "lower", "higher"),
        Metric("size_bytes", "Size on disk", "bytes", "lower", "smaller", "larger"),
        Metric("psnr_to_baseline", "PSNR to the baseline's picture", "plain", "higher", relative=True, unit="dB"),
        Metric("ssim_to_baseline", "SSIM to the baseline's picture", "plain", "higher", relative=True),
        Metric(
            "perceptual_distance_to_baseline",
            "Distance to the baseline's picture as the judge sees them",
            "plain",
            "lower",
            "lower",
            "higher",
            relative=True,
        ),
        Metric("sampling_steps", "Steps of a picture", "count", "lower", "fewer", "more"),
        _quality("prompt_accuracy", "Prompt accuracy"),
        _error("frechet_distance", "Fr\u00e9chet distance", "plain"),
        _quality("picture_precision", "Precision of pictures"),
        _quality("picture_recall", "Recall of pictures"),
        Metric("prompt_diversity", "Diversity for one prompt", "plain", "higher", quality=True),
        Metric("picture_contrast", "Spread of a picture's levels", unit="levels"),
        Metric("shipped_bytes", "Model and runtime", "bytes", "lower", "smaller", "larger"),
        Metric("parameters", "Parameters", "count", "lower", "fewer", "more"),
        Metric("bits_per_parameter", "Bits a parameter", "plain", "lower", "fewer", "more", unit="bits"),
        _time("latency_ms", "Latency"),
        _time("latency_p90_ms", "Latency p90"),
        _time("latency_p99_ms", "Latency p99"),
        Metric("real_time_factor", "Real-time factor", "plain", "lower", "faster", "slower"),
        Metric("throughput", "Throughput", "rate", "higher", "more", "less", unit="examples/s"),
        _time("startup_ms", "Start-up"),
        _time("session_load_ms", "Session load"),
        Metric("peak_memory_bytes", "Peak memory", "bytes", "lower", "less", "more"),
        _time("cpu_ms", "Processor time a call"),
        Metric("energy_mj", "Energy a call", "plain", "lower", "less", "more", unit="mJ"),
        _time("reference_matmul_ms", "Reference product"),
        _time("reference_copy_ms", "Reference copy"),
        _faster("speedup", "Speed-up"),
        _time("first_picture_ms", "First picture"),
        *(_time(f"{part}_ms", title) for part, title in _PARTS_OF_A_PICTURE.items()),
        *(
            _faster(f"speedup_{part}", f"Speed-up of the {title.lower()}")
            for part, title in _PARTS_OF_A_PICTURE.items()
        ),
    )
}
_GENERATION = {
    metric.name: metric
    for metric in (
        _time("time_to_first_token_ms", "Time to first token"),
        _time("time_per_output_token_ms", "Time per output token"),
        Metric("tokens_per_second", "Tokens per second", "rate", "higher", "more", "less", unit="tokens/s"),
        Metric(
            "prefill_tokens_per_second", "Prompt tokens per second", "rate", "higher", "more", "less", unit="tokens/s"
        ),
        replace(_KNOWN["speedup"], name="speedup_time_to_first_token", title="Speed-up to the first token"),
        replace(_KNOWN["speedup"], name="speedup_time_per_output_token", title="Speed-up per output token"),
    )
}
"""Text generation, each after a prompt of N tokens: `tokens_per_second_context_512`."""
_LENGTH = re.compile(r"^latency_ms_length_(\d+)_(\d+)$")
_CONTEXT = re.compile(r"^(.+)_context_(\d+)$")
_DRAWN = re.compile(r"^(.+)_(steps|size)_(\d+)$")
_NUMBER = re.compile(r"^(-?[\d,.]+)(.*)$")
_SLICE = re.compile(r"^([^\[\]]+)\[(.+)\]$")
_TO_BASELINE = " to the baseline's embedding"
_AGAINST = re.compile(r"^(.+)_against_([^_]+)$")
_ON = re.compile(r"^(.+)_on_([A-Za-z0-9-]+)$")
_NUMBERED = (
    (re.compile(r"^size_bytes_(.+)$"), _KNOWN["size_bytes"], "Size on disk of {0}"),
    (_LENGTH, _KNOWN["latency_ms"], "Latency, {0}\u2013{1} tokens"),
    (re.compile(r"^latency_ms_batch_(\d+)$"), _KNOWN["latency_ms"], "Latency, batch {0}"),
    (re.compile(r"^latency_ms_rate_([\d.e+]+)$"), _KNOWN["latency_ms"], "Latency at {0}/s"),
    (re.compile(r"^latency_p99_ms_rate_([\d.e+]+)$"), _KNOWN["latency_ms"], "Latency p99 at {0}/s"),
    (re.compile(r"^speedup_batch_(\d+)$"), _KNOWN["speedup"], "Speed-up, batch {0}"),
    (re.compile(r"^ndcg_at_(\d+)$"), _quality("", ""), "NDCG at {0}"),
    (re.compile(r"^f1_(.+)$"), replace(_KNOWN["f1"], quality=False), "F1 of {0}"),
    (re.compile(r"^map_(75)$"), replace(_KNOWN["map"], quality=False), "mAP at IoU 0.{0}"),
    (re.compile(r"^map_(small|medium|large)$"), replace(_KNOWN["map"], quality=False), "mAP of {0} objects"),
    (re.compile(r"^mar_(\d+)$"), replace(_KNOWN["recall"], quality=False), "Mean recall of {0} boxes"),
    (re.compile(r"^ap_(.+)$"), replace(_KNOWN["map"], quality=False), "AP of {0}"),
    (re.compile(r"^iou_(.+)$"), replace(_KNOWN["mean_iou"], quality=False), "IoU of {0}"),
    (re.compile(r"^recall_at_(\d+)$"), _KNOWN["recall"], "Recall at {0}"),
    (re.compile(r"^recall_at_(\d+)_image_to_text$"), _KNOWN["recall"], "Text in the first {0} of an image"),
    (re.compile(r"^recall_at_(\d+)_text_to_image$"), _KNOWN["recall"], "Image in the first {0} of a text"),
    (re.compile(r"^precision_at_(\d+)$"), _KNOWN["precision"], "Precision at {0}"),
    (re.compile(r"^recall_at_(\d+)_(int8|binary)$"), replace(_KNOWN["recall"], quality=False),
     "Recall at {0}, {1} embeddings"),
    (re.compile(r"^spearman_(.+)$"), Metric("", "", "plain", "higher"), "Spearman correlation, {0}"),
    (re.compile(r"^pearson_(.+)$"), Metric("", "", "plain", "higher"), "Pearson correlation, {0}"),
)  # fmt: skip
"""What metrics are like whose names hold a number or a name, and their titles."""


def describe_metric(name: str, unit: str = "") -> Metric:
    """The known metric of that name, or one derived from its name's ending and its unit."""
    if name in _KNOWN:
        return replace(_KNOWN[name], unit=unit or _KNOWN[name].unit)
    if part := slice_of(name):
        whole = describe_metric(part[0], unit)
        return replace(whole, name=name, title=f"{whole.title}, {part[1]}", quality=False)
    if match := _AGAINST.match(name):
        near = describe_metric(match[1], unit)
        title = f"{near.title.removesuffix(_TO_BASELINE)} against {match[2]}"
        return replace(near, name=name, title=title, quality=False, relative=True)
    if elsewhere := elsewhere_of(name):
        near = describe_metric(elsewhere[0], unit)
        return replace(near, name=name, title=f"{near.title} on {elsewhere[1]}", quality=False)
    for pattern, known, title in _NUMBERED:
        if match := pattern.match(name):
            return replace(known, name=name, title=title.format(*match.groups()), unit=unit)
    if (drawn := _DRAWN.match(name)) and drawn[1] in _KNOWN:
        known, words = _KNOWN[drawn[1]], {"steps": "{0} steps", "size": "{0} pixels a side"}[drawn[2]]
        return replace(known, name=name, title=f"{known.title}, {words.format(drawn[3])}", unit=unit or known.unit)
    if generated := context_of(name):
        known = _GENERATION[generated[0]]
        return replace(known, name=name, title=f"{known.title}, context {generated[1]}", unit=unit or known.unit)
    title = name.replace("_", " ").strip().capitalize() or name
    if name.endswith("_bytes") or unit in {"byte", "bytes", "B"}:
        return Metric(name, title.removesuffix(" bytes"), "bytes", "lower", "smaller", "larger", unit=unit)
    if name.endswith("_ms") or unit == "ms":
        return replace(_time(name, title.removesuffix(" ms")), unit=unit)
    if unit in {"x", "times"}:
        return Metric(name, title, "times", "higher", unit=unit)
    if unit in {"fraction", "ratio", "share", "%"}:
        wrong = any(word in name for word in ("error", "loss", "miss"))
        return replace(_error(name, title, "percent") if wrong else _quality(name, title), unit=unit)
    return Metric(name, title, unit=unit)


def against_metric(metric: str, target: str) -> str:
    """The name of a metric of nearness to the same model on another target: `agreement_against_torch`."""
    return f"{metric.removesuffix('_to_baseline')}_against_{target}"


def length_bucket(name: str) -> tuple[int, int] | None:
    """`latency_ms_length_9_16` -> (9, 16); None for any other metric."""
    match = _LENGTH.match(name)
    return (int(match[1]), int(match[2])) if match else None


def context_of(name: str) -> tuple[str, int] | None:
    """`tokens_per_second_context_512` -> (tokens_per_second, 512); None for what is not of text generation."""
    match = _CONTEXT.match(name)
    return (match[1], int(match[2])) if match and match[1] in _GENERATION else None


def slice_metric(metric: str, name: str) -> str:
    """The name of a metric on a slice of the data: `accuracy[label=positive]`."""
    return f"{metric}[{name}]"


def slice_of(name: str) -> tuple[str, str] | None:
    """`accuracy[label=positive]` -> (accuracy, label=positive); None for a metric of all rows."""
    match = _SLICE.match(name)
    return (match[1], match[2]) if match else None


def elsewhere_metric(metric: str, split: str) -> str:
    """The name of a metric on a split that is judged beside the test split: `perplexity_on_code`."""
    return f"{metric}_on_{split}"


def elsewhere_of(name: str) -> tuple[str, str] | None:
    """`perplexity_on_code`, or a slice of it, -> (perplexity, code); None for what is measured on the test split."""
    whole = slice_of(name)
    match = _ON.match(whole[0] if whole else name)
    return (match[1], match[2]) if match and match[1] in _KNOWN else None


def quality_metric(units: dict[str, str]) -> Metric | None:
    """The task's own measure among the metrics (name -> unit): the first known one, else agreement."""
    described = [describe_metric(name, unit) for name, unit in units.items()]
    own = [metric for metric in described if metric.quality]
    return next(iter(own or [metric for metric in described if metric.name == "agreement"]), None)


def significant(value: float, digits: int = 3) -> str:
    """``value`` to that many significant digits, without an exponent: 0.04123 -> 0.0412, 1234.5 -> 1,234."""
    if not math.isfinite(value):
        return "\u221e" if value == math.inf else "-\u221e" if value == -math.inf else "not a number"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{decimals}f}"


def format_value(metric: Metric, value: float) -> str:
    """``value`` with its unit, for people."""
    match metric.style:
        case "percent":
            return f"{value if metric.unit == '%' else value * 100:.2f}%"
        case "bytes":
            return format_bytes(value)
        case "count":
            return format_count(value)
        case "milliseconds":
            return format_seconds(value / 1000) if value >= 10_000 else f"{significant(value)} ms"
        case "times":
            return f"{significant(value)}x"
        case "rate" | "plain":
            return f"{significant(value)} {metric.unit}".rstrip()


def format_interval(metric: Metric, low: float | None, high: float | None) -> str:
    """`85.84%` to `88.76%` with a dash between and the unit once, or nothing where no interval is known."""
    if low is None or high is None:
        return ""
    first, last = format_value(metric, low), format_value(metric, high)
    number, unit = _NUMBER.match(first), _NUMBER.match(last)
    if number and unit and number[2] == unit[2]:
        first = number[1]
    return f"{first}\u2013{last}"


def format_measurement(row: Measurement) -> str:
    """Value and interval of a row."""
    metric = describe_metric(row.metric, row.unit)
    interval = format_interval(metric, row.low, row.high)
    return format_value(metric, row.value) + (f" ({interval})" if interval else "")


def format_bytes(value: float) -> str:
    """Decimal units, as disks are sold: 91,234,567 -> 91.2 MB."""
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def format_count(value: float) -> str:
    """22,713,986 -> 22.7 M."""
    return _scaled(value, ("", " K", " M", " B"))


def format_seconds(value: float) -> str:
    """45.3 s, 6 min 12 s, 2 h 05 min."""
    if value < 60:
        return f"{significant(value)} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")
_TIMES = re.compile(r"\s*(?:\d+(?:\.\d+)?\s*[smh]\s*)+")


def seconds_of(text: str) -> float:
    """`90s`, `60m`, `1h30m` in seconds. Raises `ValueError` for anything else."""
    if not _TIMES.fullmatch(text):
        raise ValueError("a time such as 90s, 60m or 1h30m")
    return sum(float(count) * _UNITS[unit] for count, unit in _TIME.findall(text))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    place = 0
    while abs(value) >= 999.5 and place < len(units) - 1:
        value /= 1000
        place += 1
    return f"{value:,.0f}{units[0]}" if place == 0 else f"{significant(value)}{units[place]}"


def improvement(metric: Metric, value: float, reference: float) -> str:
    """``value`` against ``reference``: `22.4x smaller`, `99.54%` for a quality, else nothing."""
    if metric.relative or reference == 0 or value == 0 or not (math.isfinite(value) and math.isfinite(reference)):
        return ""
    if metric.style == "percent":
        return f"{value / reference * 100:.2f}%"
    ratio = value / reference if metric.better != "lower" else reference / value
    if ratio <= 0:
        return ""
    if metric.better == "unknown":
        return f"{significant(ratio)}x"
    if f"{ratio:.2f}" == "1.00":
        return "same"
    return f"{significant(ratio)}x {metric.gain}" if ratio > 1 else f"{significant(1 / ratio)}x {metric.loss}"


_MAIN = ("agreement", "rms_error", "kl_divergence", "size_bytes", "bits_per_parameter", "parameters", "latency_ms",
         "latency_p90_ms", "real_time_factor", "throughput", "tokens_per_second", "prefill_tokens_per_second",
         "startup_ms", "peak_memory_bytes", "speedup", "speedup_time_per_output_token",
         "speedup_time_to_first_token")  # fmt: skip


def main_metrics(units: dict[str, str]) -> list[Metric]:
    """The columns of the comparison: the task's own metrics, then the known costs that were measured.

    Of what is measured at several contexts, the shortest.
    """
    described = [describe_metric(name, unit) for name, unit in units.items()]
    context = shortest_context(units)
    names = (f"{name}_context_{context}" if name in _GENERATION else name for name in _MAIN)
    return [metric for metric in described if metric.quality] + [
        describe_metric(name, units[name]) for name in names if name in units
    ]


def shortest_context(names: Iterable[str]) -> int | None:
    """The shortest context at which generation was timed, if it was."""
    return min((found[1] for name in names if (found := context_of(name))), default=None)


def other_metrics(units: dict[str, str]) -> list[Metric]:
    """Every measured metric that is not a column of the comparison; slices are shown by themselves."""
    main = {metric.name for metric in main_metrics(units)}
    return [describe_metric(name, unit) for name, unit in units.items() if name not in main and not slice_of(name)]
