"""Evaluations of image generators: a judge's metrics, a grid of images, and drift of the sampling path."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
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
from compress.plugins.diffusion.pipeline_model import Sampling
from compress.plugins.diffusion.sampler import (
    IDS,
    IMAGES,
    NOISE,
    SAMPLE,
    SEED,
    TIMESTEP,
    DiffusionSampler,
    DiffusionSession,
)
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

    def diverging_index(self, limit: float = PARTED) -> int | None:
        """Return the index in ``times`` from which the median stays above ``limit``, or None if it ends below."""
        within = np.flatnonzero(self.typical <= limit)
        first = int(within[-1]) + 1 if len(within) else 0
        return first if first < len(self.times) else None


def drift(baseline: SamplingPath, candidate: SamplingPath) -> PathDrift:
    """Return the drift of a candidate from the baseline, at the timesteps of the path with fewer steps."""
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
    red, blue = np.where(difference >= 0, 255, fading), np.where(difference >= 0, fading, 255)
    return encode_png(np.stack([red, fading, blue], axis=-1).astype(np.uint8))


_JUDGE_VERSION = 2
"""Increased when a judge would compute other values from the same images."""


def judgements(session: TargetSession, parts: Sequence[Part]) -> list[Measurement]:
    """Return the metrics that the recipe's judge computes from each model's images, on all rows and each slice."""
    folder = session.runner.inputs.judge
    if folder is None:
        return []
    rows, labels = session.runner.inputs.data.split(session.split), list(session.predictions)
    classes = rows["label"].to_pylist() if "label" in rows.column_names else None
    usual = session.predictions[BASELINE].kept[IMAGES] if BASELINE in session.predictions else None
    real = session.predictions[labels[0]].labels
    evaluation = ImageEvaluation(folder, classes, real, usual)
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
            return [row.model_dump() for row in evaluation.measurements(session.predictions[label].kept[IMAGES])]

        names = (f"judgement of {label}", f"evaluate the images of {label}")
        stored_rows = session.cached_json("judgement", label, key, "rows.json", names, compute)
        measurements += [
            Measurement.model_validate({**row, "model": label, "target": session.target.name}) for row in stored_rows
        ]
    return measurements + slice_rows(measurements, parts)


def sampling_steps(session: TargetSession) -> list[Measurement]:
    """Return the number of sampling steps of each model."""
    identity = {"metric": "sampling_steps", "target": session.target.name, "unit": "count"}
    steps = {label: Sampling.read(folder).steps for label, folder in session.artifacts.items()}
    return [Measurement(model=label, value=value, **identity) for label, value in steps.items()]


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
            levels, usual = predictions.kept[IMAGES][row], baseline_images[row]
            fields: dict[str, Any] = {"prompt": prompt, "seed": row, "png": encode_png(levels)}
            if label != BASELINE:
                fields["difference"] = encode_difference_png(levels, usual)
                fields["levels"] = round(float(np.abs(levels.astype(np.float64) - usual).mean()), 2)
            records.append(PictureRecord(model=label, target=session.target.name, **fields))
    return records


def sampling_drifts(session: TargetSession) -> list[DriftRecord]:
    """Return how far each model's latents drift from the baseline's, over the images of the `image_grid`."""
    count = session.runner.recipe.evaluation.pictures
    if not count or BASELINE not in session.artifacts:
        return []

    # The baseline's path is compared with that of each model.
    @cache
    def path_of(label: str, threads: int) -> SamplingPath:
        opened = get_runtime(session.target.runtime).open(session.artifacts[label], session.target, threads)
        assert isinstance(opened, DiffusionSession), "models that generate images are opened as such a session"
        batch = session.examples(label).batch(range(min(count, len(session.examples(label)))))
        return sampling_path(opened.sampler, batch[IDS], batch[NOISE], batch[SEED].tolist())

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
            drift_values = drift(path_of(BASELINE, threads), path)
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

        names = (f"drift of {label}", f"compare {label} step by step")
        stored = session.cached_json("drift", label, key, "drift.json", names, compute)
        records.append(DriftRecord.model_validate({**stored, "model": label, "target": session.target.name}))
    return records
