"""Drift between the sampling paths of two models: latents after each step, from the same noise.

s: steps, n: images. A path has s + 1 latents: those before each step, and the finished ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from compress.formats.runtime import Batch
from compress.numerics.statistics import Floats
from compress.plugins.diffusion.sampler import SAMPLE, TIMESTEP, DiffusionSampler
from compress.results.report import PARTED

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
