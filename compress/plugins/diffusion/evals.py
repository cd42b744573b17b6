"""Evaluations of image generators: a judge's metrics, a grid of images, and drift of the sampling path."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.membership import Part
from compress.evaluation.evaluate import slice_rows
from compress.evaluation.image_files import encode_difference_png, encode_png
from compress.formats.runtime import get_runtime
from compress.formats.target_profile import Target
from compress.pipeline.target_session import TargetSession
from compress.plugins.diffusion.judge import ImageEvaluation
from compress.plugins.diffusion.sampler import IDS, IMAGES, NOISE, SEED
from compress.plugins.diffusion.sampling_drift import SamplingPath, drift, sampling_path
from compress.plugins.diffusion.sampling_settings import Sampling
from compress.plugins.diffusion.session import DiffusionSession
from compress.results.report import BASELINE, DriftRecord, Measurement, PictureRecord
from compress.utils.progress import Progress
from compress.utils.storage import digest_directory

_JUDGE_VERSION = 1
"""Increased when a judge would compute other values from the same images."""


def judgements(session: TargetSession, parts: Sequence[Part]) -> list[Measurement]:
    """Return the metrics that the recipe's judge computes from each model's images, on all rows and each slice."""
    folder = session.runner.inputs.judge
    if folder is None:
        return []
    rows, labels = session.runner.inputs.data.split(session.split), list(session.predictions)
    classes = rows["label"].to_pylist() if "label" in rows.column_names else None
    usual = session.predictions[BASELINE].kept[IMAGES] if BASELINE in session.predictions else None
    asked = ImageEvaluation(folder, rows["text"].to_pylist(), classes, session.predictions[labels[0]].labels, usual)
    key = {
        "judge": digest_directory(folder),
        "data": session.runner.inputs.data.digest(session.split),
        "baseline": session.digests.get(BASELINE),
        "version": _JUDGE_VERSION,
    }
    measurements = []
    for label in labels:

        def compute(_: Target, threads: int, progress: Progress, text: str, label: str = label) -> list[dict[str, Any]]:
            progress.note(text)
            return [row.model_dump() for row in asked.measurements(session.predictions[label].kept[IMAGES])]

        names = (f"judgement of {label}", f"look at what {label} drew")
        stored_rows = session.cached_json("judgement", label, key, "rows.json", names, compute)
        measurements += [
            Measurement.model_validate({**row, "model": label, "target": session.target.name}) for row in stored_rows
        ]
    return measurements + slice_rows(measurements, parts)


def sampling_steps(session: TargetSession) -> list[Measurement]:
    """Return the number of sampling steps of each model."""
    return [
        Measurement(
            model=label,
            metric="sampling_steps",
            target=session.target.name,
            value=Sampling.read(folder).steps,
            unit="count",
        )
        for label, folder in session.artifacts.items()
    ]


def image_grid(session: TargetSession) -> list[PictureRecord]:
    """Return the first images of each model, with their difference from the baseline's images."""
    count = session.runner.recipe.evaluation.pictures
    if not count or BASELINE not in session.predictions:
        return []
    prompts = session.runner.inputs.data.split(session.split)["text"].slice(0, count).to_pylist()
    baseline_images = session.predictions[BASELINE].kept[IMAGES]
    records = []
    for label, predictions in session.predictions.items():
        for row, prompt in enumerate(prompts):
            levels, difference_fields = predictions.kept[IMAGES][row], dict[str, Any]()
            if label != BASELINE:
                mean_difference = np.abs(levels.astype(np.float64) - baseline_images[row]).mean()
                difference_fields = {
                    "difference": encode_difference_png(levels, baseline_images[row]),
                    "levels": round(float(mean_difference), 2),
                }
            records.append(
                PictureRecord(
                    model=label,
                    target=session.target.name,
                    prompt=prompt,
                    seed=row,
                    png=encode_png(levels),
                    **difference_fields,
                )
            )
    return records


def sampling_drifts(session: TargetSession) -> list[DriftRecord]:
    """Return how far each model's latents drift from the baseline's, over the images of the `image_grid`."""
    count = session.runner.recipe.evaluation.pictures
    if not count or BASELINE not in session.artifacts:
        return []

    def path_of(label: str, threads: int) -> SamplingPath:
        opened = _open(session.artifacts[label], session.target, threads)
        batch = session.examples(label).batch(range(min(count, len(session.examples(label)))))
        return sampling_path(opened.sampler, batch[IDS], batch[NOISE], batch[SEED].tolist())

    cached_path = cache(path_of)
    key = {
        "data": session.runner.inputs.data.digest(session.split),
        "count": count,
        "baseline": session.digests[BASELINE],
    }
    records = []
    shape = session.examples(BASELINE).inputs[0][NOISE].shape
    for label in (name for name in session.artifacts if name != BASELINE):
        if session.examples(label).inputs[0][NOISE].shape != shape:
            continue  # pictures of another size begin as other noise

        def compute(_: Target, threads: int, progress: Progress, text: str, label: str = label) -> dict[str, Any]:
            progress.note(text)
            path = path_of(label, threads)
            drift_values = drift(cached_path(BASELINE, threads), path)
            parting_index = drift_values.diverging_index()
            low, typical, high = np.quantile(drift_values.distances, [0.25, 0.5, 0.75], axis=1).round(6).tolist()
            return {
                "steps": len(path.times) - 1,
                "times": drift_values.times.tolist(),
                "typical": typical,
                "low": low,
                "high": high,
                "parted": None if parting_index is None else float(drift_values.times[parting_index]),
            }

        names = (f"drift of {label}", f"follow {label} step by step")
        stored = session.cached_json("drift", label, key, "drift.json", names, compute)
        records.append(DriftRecord.model_validate({**stored, "model": label, "target": session.target.name}))
    return records


def _open(artifact: Path, target: Target, threads: int) -> DiffusionSession:
    """Open an image session of an artifact."""
    session = get_runtime(target.runtime).open(artifact, target, threads)
    assert isinstance(session, DiffusionSession), "whatever draws is opened as such a session"
    return session
