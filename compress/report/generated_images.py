"""What the models of a run draw for the same prompts and seeds, side by side."""

from __future__ import annotations

from typing import NamedTuple

from compress.numerics.sampling_drift import PARTED
from compress.report.plot import SMALL, Plot, Scale, element, line, nice_ticks, scale_around, text
from compress.results.report import DriftRecord, PictureRecord, Report

_NAMED = 6
"""Models that the chart of drift names, the last ones."""


class Row(NamedTuple):
    """The pictures of one prompt, one a column; None where a model drew none."""

    prompt: str
    seed: int
    pictures: tuple[PictureRecord | None, ...]


def columns(report: Report, target: str) -> list[tuple[str, ...]]:
    """The models that drew on a target, those with the same pictures together: `quantize` and `final`."""
    drawn: dict[str, list[str]] = {}
    for record in report.pictures:
        if record.target == target:
            drawn.setdefault(record.model, []).append(record.png)
    found: list[tuple[str, ...]] = []
    for model in (one for one in report.models if one in drawn):
        # `final` repeats the last stage's; what an earlier one drew the same is still a stage of its own.
        if found and drawn[found[-1][-1]] == drawn[model] and model == report.models[-1]:
            found[-1] = (*found[-1], model)
        else:
            found.append((model,))
    return found


def grid(report: Report, target: str) -> list[Row]:
    """A row for each prompt, in their order, with a picture for each of `columns`."""
    mine = {(one.seed, one.model): one for one in report.pictures if one.target == target}
    prompts = {one.seed: one.prompt for one in mine.values()}
    models = [names[0] for names in columns(report, target)]
    return [
        Row(prompt, seed, tuple(mine.get((seed, model)) for model in models))
        for seed, prompt in sorted(prompts.items())
    ]


def paths(report: Report, target: str) -> list[tuple[tuple[str, ...], DriftRecord]]:
    """The drift of each model on a target with its names: `quantize` and `final` where they are the same file."""
    found: list[tuple[tuple[str, ...], DriftRecord]] = []
    for one in (record for record in report.drift if record.target == target):
        if found and one.model == report.models[-1] and one.typical == found[-1][1].typical:
            found[-1] = ((*found[-1][0], one.model), one)
        else:
            found.append(((one.model,), one))
    return found


def parting_words(report: Report, target: str) -> list[tuple[str, str, str, str]]:
    """Of each model: its name, steps, how far it is from the baseline at the end, and where their paths part."""
    return [
        (
            " = ".join(names),
            f"{one.steps:,}",
            f"{one.typical[-1]:.1%}",
            "nowhere" if one.parted is None else "at the end" if one.parted < 0 else f"timestep {one.parted:,.0f}",
        )
        for names, one in paths(report, target)
    ]


def drift_curves(report: Report, target: str) -> str | None:
    """How far each model's latents are from the baseline's at each timestep; None where nothing was drawn."""
    found = paths(report, target)
    if not found:
        return None
    times = [time for _, one in found for time in one.times]
    # A sampler runs from noise, at the largest timestep, to the picture.
    x = Scale(min(times), max(times), SMALL.right, SMALL.left)
    plot = Plot(
        SMALL,
        x,
        scale_around([0.0, PARTED, *(value for _, one in found for value in one.high)], SMALL.bottom, SMALL.top),
    )
    for tick in nice_ticks(max(min(times), 0.0), max(times)):
        plot.add(line(x(tick), SMALL.top, x(tick), SMALL.bottom, "grid"))
        plot.add(text(x(tick), SMALL.bottom + 18, f"{tick:g}", "tick"))
    plot.floor()
    plot.add(text((SMALL.left + SMALL.right) / 2, SMALL.bottom + 38, "Timestep, from noise to picture", "axis-title"))
    plot.y_axis("Distance over the baseline's own size", lambda value: f"{value:.0%}")
    plot.add(plot.line([(max(times), PARTED), (min(times), PARTED)], "front"))
    named = []
    for names, one in found:
        points = list(zip(one.times, one.typical, strict=True))
        marks = [
            plot.mark(
                one.model, at, f"{one.model}, timestep {at[0]:g}\n{at[1]:.1%} (quartiles {a:.1%} to {b:.1%})", 3.5
            )
            for at, a, b in zip(points, one.low, one.high, strict=True)
        ]
        plot.add(element("g", {"class": f"series {one.model}"}, plot.line(points, "curve"), *marks))
        named.append((points[-1], f"{' = '.join(names)}, {one.steps} steps", f"label {one.model}"))
    plot.labels(named[-_NAMED:])
    return plot.svg(f"Distance of the latents of {len(found)} models from the baseline's by timestep")
