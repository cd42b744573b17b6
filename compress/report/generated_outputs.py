"""Texts that the baseline and the final model generate after the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import NamedTuple

from compress.report.plot import SMALL, Plot, Scale, element, line, nice_ticks, scale_around, text
from compress.results.report import (
    BASELINE,
    FINAL,
    PARTED,
    ContinuationRecord,
    DriftRecord,
    GeneratedToken,
    PictureRecord,
    Report,
)

REPEATING = 0.5
"""Share of repeated 4-grams from which on a reader sees that a text repeats itself."""


class ContinuationPair(NamedTuple):
    """One prompt with two models' continuations, their common characters, and a sentence on where they differ."""

    prompt: str
    baseline: ContinuationRecord
    final: ContinuationRecord
    same: int
    parting: str


def continuation_pairs(report: Report, target: str) -> list[ContinuationPair]:
    """Return the prompts of one target, in their order."""
    records = [record for record in report.continuations if record.target == target]
    return pair_by_prompt(*([record for record in records if record.model == model] for model in (BASELINE, FINAL)))


def pair_by_prompt(old: Iterable[ContinuationRecord], new: Iterable[ContinuationRecord]) -> list[ContinuationPair]:
    """Return the prompts that both models have, in the order of ``old``."""
    others, pairs = {record.prompt: record for record in new}, []
    for baseline in old:
        if final := others.get(baseline.prompt):
            shared = takewhile(lambda pair: pair[0] == pair[1], zip(baseline.text, final.text, strict=False))
            # The first token that differs, with both models' probabilities, or nothing if it is unknown.
            steps = enumerate(zip(baseline.steps, final.steps, strict=False), 1)
            differing = ((number, pair) for number, pair in steps if pair[0].token != pair[1].token)
            parting = next(
                (f"They diverge at token {n}: {_choice(a)} before, {_choice(b)} now" for n, (a, b) in differing), ""
            )
            pairs.append(ContinuationPair(baseline.prompt, baseline, final, len(list(shared)), parting))
    return pairs


def _choice(step: GeneratedToken) -> str:
    return f"\u201c{step.token}\u201d {step.probability:.0%} over \u201c{step.other}\u201d {step.other_probability:.0%}"


def repetition_note(record: ContinuationRecord) -> str:
    """Return that a text repeats itself, if it does."""
    return f"repeats itself: {record.repeated:.0%}" if record.repeated >= REPEATING else ""


def cells(pairs: list[ContinuationPair]) -> list[tuple[str, str, str, str]]:
    """Return prompt, the baseline's text, the final model's text, and where they differ."""
    return [(pair.prompt, pair.baseline.text, pair.final.text, pair.parting) for pair in pairs]


def lost_tokens(report: Report, target: str) -> list[tuple[str, str, str, str]]:
    """Return the text before a token, the token, and its probabilities by the baseline and the final model."""
    return [
        (record.before.replace("\n", " "), record.token, f"{record.baseline:.1%}", f"{record.final:.1%}")
        for record in report.lost_tokens
        if record.target == target
    ]


def equal_texts(pairs: list[ContinuationPair]) -> str:
    """Return `2 of 8 continuations are the same to the end`."""
    same = sum(pair.baseline.text == pair.final.text for pair in pairs)
    return f"{same} of {len(pairs)} continuations are the same to the end"


def differing_answers(report: Report, target: str) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """Return the instructions that only one of baseline and final model followed.

    Each has both answers with heading, colour, text and note.
    """
    answers = [answer for answer in report.answers if answer.target == target]
    finals = {answer.prompt: answer for answer in answers if answer.model == FINAL}
    prompts = []
    for old in (answer for answer in answers if answer.model == BASELINE):
        new = finals.get(old.prompt)
        if new is not None and bool(old.missed) != bool(new.missed):
            sides = [(answer.model, "plain", answer.text, f"not {', '.join(answer.missed)}" if answer.missed else "")
                     for answer in (old, new)]  # fmt: skip
            prompts.append((old.prompt, sides))
    return prompts


_NAMED = 6
"""Number of models, from the last, that the chart of drift labels."""


class PromptImages(NamedTuple):
    """Images of one prompt, one for each column, or None if a model generated none."""

    prompt: str
    seed: int
    pictures: tuple[PictureRecord | None, ...]


def model_columns(report: Report, target: str) -> list[tuple[str, ...]]:
    """Return the models that generated images on a target. `final` joins a stage with equal images."""
    images_by_model: dict[str, list[str]] = {}
    for record in report.pictures:
        if record.target == target:
            images_by_model.setdefault(record.model, []).append(record.png)
    groups: list[tuple[str, ...]] = []
    for model in (name for name in report.models if name in images_by_model):
        # `final` repeats the last stage's; what an earlier one drew the same is still a stage of its own.
        if groups and images_by_model[groups[-1][-1]] == images_by_model[model] and model == report.models[-1]:
            groups[-1] = (*groups[-1], model)
        else:
            groups.append((model,))
    return groups


def prompt_rows(report: Report, target: str) -> list[PromptImages]:
    """Return a row for each prompt, in their order, with an image for each of `model_columns`."""
    records = {(record.seed, record.model): record for record in report.pictures if record.target == target}
    prompts = {record.seed: record.prompt for record in records.values()}
    models = [names[0] for names in model_columns(report, target)]
    return [
        PromptImages(prompt, seed, tuple(records.get((seed, model)) for model in models))
        for seed, prompt in sorted(prompts.items())
    ]


def drift_records(report: Report, target: str) -> list[tuple[tuple[str, ...], DriftRecord]]:
    """Return the drift of each model on a target with its names: `onnx_int8` and `final` if they are the same file."""
    records: list[tuple[tuple[str, ...], DriftRecord]] = []
    for drift in (record for record in report.drift if record.target == target):
        if records and drift.model == report.models[-1] and drift.typical == records[-1][1].typical:
            records[-1] = ((*records[-1][0], drift.model), drift)
        else:
            records.append(((drift.model,), drift))
    return records


def drift_cells(report: Report, target: str) -> list[tuple[str, str, str, str]]:
    """Return name, steps, final distance to the baseline, and the timestep from which a model differs."""
    cells = []
    for names, drift in drift_records(report, target):
        timestep = "at the end" if (drift.parted or 0) < 0 else f"timestep {drift.parted or 0:,.0f}"
        parted = "nowhere" if drift.parted is None else timestep
        cells.append((" = ".join(names), f"{drift.steps:,}", f"{drift.typical[-1]:.1%}", parted))
    return cells


def drift_curves(report: Report, target: str) -> str | None:
    """Return the distance of each model's latents to the baseline's by timestep, or None without images."""
    records = drift_records(report, target)
    if not records:
        return None
    times = [time for _, drift in records for time in drift.times]
    # A sampler runs from noise, at the largest timestep, to the picture.
    x = Scale(min(times), max(times), SMALL.right, SMALL.left)
    plot = Plot(
        SMALL,
        x,
        scale_around([0.0, PARTED, *(value for _, drift in records for value in drift.high)], SMALL.bottom, SMALL.top),
    )
    for tick in nice_ticks(max(min(times), 0.0), max(times)):
        plot.add(line(x(tick), SMALL.top, x(tick), SMALL.bottom, "grid"))
        plot.add(text(x(tick), SMALL.bottom + 18, f"{tick:g}", "tick"))
    plot.x_axis_line()
    plot.add(text((SMALL.left + SMALL.right) / 2, SMALL.bottom + 38, "Timestep, from noise to image", "axis-title"))
    plot.y_axis("Distance over the baseline's own size", lambda value: f"{value:.0%}")
    plot.add(plot.line([(max(times), PARTED), (min(times), PARTED)], "front"))
    labels = []
    for names, drift in records:
        points = list(zip(drift.times, drift.typical, strict=True))
        marks = [
            plot.mark(
                drift.model,
                point,
                f"{drift.model}, timestep {point[0]:g}\n{point[1]:.1%} (quartiles {a:.1%} to {b:.1%})",
                3.5,
            )
            for point, a, b in zip(points, drift.low, drift.high, strict=True)
        ]
        plot.add(element("g", {"class": f"series {drift.model}"}, plot.line(points, "curve"), *marks))
        labels.append((points[-1], f"{' = '.join(names)}, {drift.steps} steps", f"label {drift.model}"))
    plot.labels(labels[-_NAMED:])
    return plot.svg(f"Distance of the latents of {len(records)} models from the baseline's by timestep")
