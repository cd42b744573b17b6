"""An invented report of an image generation recipe, with gray squares as images."""

from __future__ import annotations

import numpy as np

from compress.plugins.diffusion.evals import encode_difference_png, encode_png
from compress.results.report import DriftRecord, Measurement, PictureRecord, Report, StageRecord

PROMPTS = ("a photo of a coat", "a bag in a catalogue", "the shop has <b>boots</b>")
# Model: (gray levels added to the baseline, steps, latency in ms, Fréchet distance, recognized prompts of 200).
MODELS = {
    "baseline": (0, 50, 412.0, 3.1, 188),
    "faster": (4, 25, 207.0, 3.2, 188),
    "distill": (24, 4, 21.0, 3.6, 186),
    "quantize": (40, 4, 11.0, 3.8, 184),
    "final": (40, 4, 11.0, 3.8, 184),
}
TIMES = (999.0, 749.0, 499.0, 249.0, -1.0)


def squares(row: int, more: int, side: int = 32) -> np.ndarray:
    """Return a uint8 image [side, side, 1] of a gray square whose position depends on ``row``.

    The upper half of the square is lighter by ``more`` levels and the lower half darker by as many.
    """
    levels = np.zeros((side, side, 1), np.int64)
    levels[8:24, 4 + 4 * row : 20 + 4 * row] = 120
    levels[8:16, 4 + 4 * row : 20 + 4 * row] += more
    levels[16:24, 4 + 4 * row : 20 + 4 * row] -= more
    return levels.astype(np.uint8)


def picture_report() -> Report:
    """Return a report with a baseline, three stages and a final model that equals the last stage."""
    rows, pictures, drift = [], [], []
    for model, (more, steps, latency, distance, seen) in MODELS.items():
        known = {"model": model, "target": "cpu"}
        raw = tuple(float(row < seen) for row in range(200))
        share = seen / 200
        values = (
            ("prompt_accuracy", share, "ratio", 0.03, raw),
            ("frechet_distance", distance, "", 0.2, None),
            ("latency_ms", latency, "ms", 0.02 * latency, None),
        )
        for name, value, unit, half, per_example in values:
            measurement = {"metric": name, "value": value, "unit": unit, "low": value - half, "high": value + half}
            rows.append(Measurement(**known, **measurement, n=200, raw=per_example))
        rows.append(Measurement(**known, metric="size_bytes", value=30_000 * steps, unit="bytes"))
        rows.append(Measurement(**known, metric="sampling_steps", value=steps, unit="count"))
        for row, prompt in enumerate(PROMPTS):
            levels, usual, apart = squares(row, more), squares(row, 0), {}
            if model != "baseline":
                apart = {"difference": encode_difference_png(levels, usual), "levels": more / 4}
            pictures.append(PictureRecord(**known, prompt=prompt, seed=row, png=encode_png(levels), **apart))
        if model != "baseline":
            typical = tuple(more / 100 * step / 4 for step in range(5))
            parted = next((time for time, level in zip(TIMES, typical, strict=True) if level > 0.1), None)
            high = tuple(1.2 * level for level in typical)
            low = tuple(0.8 * level for level in typical)
            drift.append(
                DriftRecord(**known, steps=steps, times=TIMES, typical=typical, low=low, high=high, parted=parted)
            )
    stages = tuple(StageRecord(name=name, key="0" * 64, seconds=1.0, cached=False) for name in list(MODELS)[1:-1])
    return Report(recipe="pictures", measurements=rows, pictures=pictures, drift=drift, stages=stages)
