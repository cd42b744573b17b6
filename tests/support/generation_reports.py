"""An invented report of a run on a language model."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from compress.recipe.recipe import Limit
from compress.report.limits import check_limits
from compress.results.report import ContinuationRecord, GeneratedToken, Measurement, Report, StageRecord

LOSSES = {
    "baseline": (3.1, 3.4, 2.9, 3.3, 3.2, 3.0, 3.6, 2.8),
    "gptq": (3.25, 3.6, 3.0, 3.4, 3.35, 3.1, 3.8, 2.9),
    "final": (3.2, 3.5, 2.95, 3.4, 3.3, 3.05, 3.75, 2.9),
}
SIZES = {"baseline": (538_000_000, 32.0, 55.0), "gptq": (90_000_000, 5.1, 12.0), "final": (78_000_000, 4.46, 11.0)}
PROMPTS = (
    "The Atlantic Ocean is the second largest of",
    "<b>Algae</b> are a diverse group of\n\norganisms",
    "Andre Agassi won",
)
TEXTS = {
    "baseline": (
        " the world's oceans, with an area of about 106,460,000 square kilometres.",
        " that live in water and feed on light. They range from single cells to kelp.",
        " his first title in 1987, and went on to win eight majors.",
    ),
    "final": (
        " the world's oceans, and covers about one fifth of the Earth's surface.",
        " that live in water and feed on light. They range from single cells to kelp.",
        " the match. He won the match. He won the match. He won the match. He won the match.",
    ),
}
LIMITS = (
    Limit(metric="perplexity", at_most=1.12, of="baseline"),
    Limit(metric="size_bytes", at_most=82_000_000),
    Limit(metric="speedup_time_per_output_token_context_128", at_least=5.5),
)


def steps(model: str, text: str) -> tuple[GeneratedToken, ...]:
    """Return one generated token for each word of a text."""
    own_share = 0.6 if model == "baseline" else 0.4
    return tuple(GeneratedToken(f" {word}", own_share, " else", own_share / 4) for word in text.split())


def perplexity(model: str, **changes: Any) -> Measurement:
    """Return the perplexity measurement that follows from the window losses of a model."""
    losses = LOSSES[model]
    value = math.exp(fmean(losses))
    fields = {"low": value * 0.9, "high": value * 1.1, "n": len(losses), "raw": losses, **changes}
    return Measurement(model=model, metric="perplexity", target="cpu", value=value, unit="", **fields)


def rows(model: str) -> list[Measurement]:
    """Return all measurements of one model."""
    size, bits, step = SIZES[model]

    def row(metric: str, value: float, unit: str, spread: float = 0.0) -> Measurement:
        ends = {"low": value * (1 - spread), "high": value * (1 + spread)} if spread else {}
        return Measurement(model=model, metric=metric, target="cpu", value=value, unit=unit, **ends)

    return [
        row("size_bytes", size, "bytes"),
        row("parameters", 134_515_008, "parameters"),
        row("bits_per_parameter", bits, "bits"),
        perplexity(model),
        row("next_token_accuracy", 0.41, "ratio", 0.05),
        row("agreement", 1.0 if model == "baseline" else 0.83, "ratio", 0.01),
        row("kl_divergence", 0.0 if model == "baseline" else 0.104, "nats", 0.05),
        row("repetition", 0.31, "ratio", 0.3),
        *(
            measurement
            for context in (512, 128)
            for measurement in (
                row(f"time_to_first_token_ms_context_{context}", step * context / 12, "ms", 0.02),
                row(f"time_per_output_token_ms_context_{context}", step, "ms", 0.02),
                row(f"tokens_per_second_context_{context}", 1000 / step, "tokens/s", 0.02),
                row(f"prefill_tokens_per_second_context_{context}", 12_000 / step, "tokens/s", 0.02),
                row(f"speedup_time_to_first_token_context_{context}", 55 / step, "x", 0.02),
                row(f"speedup_time_per_output_token_context_{context}", 55 / step, "x", 0.02),
            )
        ),
        row("startup_ms", 900, "ms", 0.05),
        row("peak_memory_bytes", 2 * size, "bytes", 0.01),
    ]


def generation_report(**changes: Any) -> Report:
    """Return a report in which two limits pass and one fails.

    One continuation of the final model repeats itself, and one equals the baseline's.
    """
    measured = [measurement for model in LOSSES for measurement in rows(model)]
    values: dict[str, Any] = {
        "recipe": "small-llm",
        "description": "A chat model in 4 bits (invented figures).",
        "started": "2026-11-25T12:00:00+00:00",
        "seconds": 412.0,
        "stages": (
            StageRecord(name="gptq", key="1" * 64, cached=False, seconds=40.0, peak_rss_bytes=10**9),
            StageRecord(name="onnx", key="2" * 64, cached=False, seconds=9.0, peak_rss_bytes=10**9),
        ),
        "measurements": tuple(measured),
        "limits": tuple(check_limits(LIMITS, measured)),
        "notes": ("evaluated on 8 of 192 windows of 512 tokens (98,770 tokens of test text)",),
        "continuations": tuple(
            ContinuationRecord(model=model, target="cpu", prompt=prompt, text=text, repeated=0.71 if "He won" in text
                               else 0.05, steps=steps(model, text))
            for model, texts in TEXTS.items() for prompt, text in zip(PROMPTS, texts, strict=True)
        ),
        **changes,
    }  # fmt: skip
    return Report(**values)
