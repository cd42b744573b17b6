"""Evaluations of image generators: a judge's metrics, a grid of images, and drift of the sampling path."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from compress.data.membership import Part
from compress.evaluation.evaluate import slice_rows
from compress.formats.runtime import Batch, get_runtime
from compress.formats.target_profile import Target
from compress.numerics.statistics import Floats
from compress.pipeline.target_session import TargetSession
from compress.plugins.diffusion.judge import ImageEvaluation
from compress.plugins.diffusion.sampler import IDS, IMAGES, NOISE, SAMPLE, SEED, TIMESTEP, DiffusionSampler
from compress.plugins.diffusion.sampling_settings import Sampling
from compress.plugins.diffusion.session import DiffusionSession
from compress.results.report import BASELINE, PARTED, DriftRecord, Measurement, PictureRecord
from compress.utils.progress import Progress
from compress.utils.storage import digest_directory

FINISHED = -1.0
"""Time of the finished latents, after the last timestep, which may be 0."""


@dataclass(frozen=True, eq=False)
class SamplingPath:
    """Latents [s + 1, n, ...] at falling timesteps ``times`` [s + 1]; the last are the finished ones."""

    times: Floats
    latents: np.ndarray

    def at(self, times: ArrayLike) -> Floats:
        """Return the latents [t, n, ...] at other timesteps [t], linearly interpolated between steps."""
        targets = np.asarray(times, dtype=np.float64)
        # Times fall, so their negatives are sorted.
        later = np.clip(np.searchsorted(-self.times, -targets), 1, len(self.times) - 1)
        start, end = self.times[later - 1], self.times[later]
        share = np.clip((start - targets) / (start - end), 0.0, 1.0).reshape(-1, *[1] * (self.latents.ndim - 1))
        return np.asarray((1 - share) * self.latents[later - 1] + share * self.latents[later], np.float64)


@dataclass(frozen=True, eq=False)
class PathDrift:
    """Distances [t, n] of two paths at ``times`` [t]: root mean square differences over the baseline's magnitude."""

    times: Floats
    distances: Floats

    @property
    def typical(self) -> Floats:
        """Median over the images, [t]."""
        return np.asarray(np.median(self.distances, axis=1), np.float64)

    @property
    def added(self) -> Floats:
        """Growth of the median at each step, [t - 1]."""
        return np.asarray(np.diff(self.typical), np.float64)

    def diverging_index(self, limit: float = PARTED) -> int | None:
        """Return the index in ``times`` from which the median stays above ``limit``, or None if it ends below."""
        within = np.flatnonzero(self.typical <= limit)
        first = int(within[-1]) + 1 if len(within) else 0
        return first if first < len(self.times) else None


def drift(baseline: SamplingPath, candidate: SamplingPath) -> PathDrift:
    """Return the drift of a candidate from the baseline, at the timesteps of the path with fewer steps.

    Raises:
        ValueError: The paths are of other images, timesteps do not fall, or latents are not finite.
    """
    for path in (baseline, candidate):
        if len(path.times) != len(path.latents) or len(path.times) < 2 or not (np.diff(path.times) < 0).all():
            raise ValueError(f"expected latents at falling timesteps, found {len(path.latents)} at {path.times}")
        if not np.isfinite(path.latents).all():
            raise ValueError("latents hold NaN or infinity")
    if baseline.latents.shape[1:] != candidate.latents.shape[1:]:
        raise ValueError(f"latents must pair: {baseline.latents.shape[1:]} and {candidate.latents.shape[1:]}")
    times = min(baseline.times, candidate.times, key=len)
    expected, actual = baseline.at(times), candidate.at(times)
    magnitude = np.maximum(_root_mean_square(expected), np.finfo(np.float64).tiny)
    return PathDrift(times, _root_mean_square(actual - expected) / magnitude)


def _root_mean_square(latents: Floats) -> Floats:
    """Return the root mean square over all but the first two axes, [t, n]."""
    return np.asarray(np.sqrt(np.square(latents).reshape(*latents.shape[:2], -1).mean(axis=2)), np.float64)


def sampling_path(sampler: DiffusionSampler, ids: np.ndarray, noise: np.ndarray, seeds: list[int]) -> SamplingPath:
    """Return the latents that the denoiser receives at each timestep, and the finished latents last.

    They are scaled as the denoiser takes them. If it is called twice at a timestep, the second call counts. Raises the
    errors of `DiffusionSampler.generate`.

    Args:
        sampler: Sampling loop.
        ids: Token ids of the prompts, [n, tokens].
        noise: Initial latents, [n, channels, height, width].
        seeds: Seed of each image.
    """
    latents: dict[float, np.ndarray] = {}

    def denoise(batch: Batch) -> Mapping[str, np.ndarray]:
        # With guidance the batch has two copies of the latents.
        latents[float(batch[TIMESTEP])] = batch[SAMPLE][: len(noise)].copy()
        return sampler.denoise(batch)

    finished = replace(sampler, denoise=denoise).sample_latents(ids, noise, seeds)
    times = sorted(latents, reverse=True)
    return SamplingPath(np.array([*times, FINISHED]), np.stack([*(latents[time] for time in times), finished]))


_SIDE = 128
"""Largest side of a report's images in pixels."""
_FULL = 64
"""Difference in levels that has full colour."""


def encode_png(levels: np.ndarray) -> str:
    """Return an image [height, width, channels] with levels of 0 to 255 as a PNG in Base64.

    A large image is scaled down.
    """
    from PIL import Image

    image = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def encode_difference_png(levels: np.ndarray, reference: np.ndarray) -> str:
    """Return the difference of two images: red where ``levels`` is lighter than ``reference``, blue where it is darker.

    It is white where both are equal, and has full colour from 64 levels on, by the mean over the channels.
    """
    difference = (levels.astype(np.float64) - reference.astype(np.float64)).mean(axis=-1) / _FULL
    fading = np.rint(255 * (1 - np.clip(np.abs(difference), 0, 1)))
    white = np.full_like(fading, 255)
    colours = np.stack(
        [np.where(difference >= 0, white, fading), fading, np.where(difference >= 0, fading, white)], axis=-1
    )
    return encode_png(colours.astype(np.uint8))


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
