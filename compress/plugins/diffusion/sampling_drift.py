"""Where two ways of drawing the same picture part: latents after each step, from the same noise.

s: steps, n: pictures. A path has s + 1 latents, those before the first step among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from compress.numerics.statistics import Floats
from compress.results.report import PARTED


@dataclass(frozen=True, eq=False)
class SamplingPath:
    """``times`` [s + 1] are the timesteps that the latents [s + 1, n, ...] are at, falling; the last is the picture."""

    times: Floats
    latents: np.ndarray

    def at(self, times: ArrayLike) -> Floats:
        """Latents at other timesteps [t], [t, n, ...], in a straight line between the two steps about each."""
        wanted = np.asarray(times, dtype=np.float64)
        later = np.clip(np.searchsorted(-self.times, -wanted), 1, len(self.times) - 1)
        before, after = self.times[later - 1], self.times[later]
        share = np.clip((before - wanted) / (before - after), 0.0, 1.0)
        share = share.reshape(-1, *[1] * (self.latents.ndim - 1))
        found: Floats = (1 - share) * self.latents[later - 1] + share * self.latents[later]
        return found


@dataclass(frozen=True, eq=False)
class PathDrift:
    """How far two paths are apart at ``times`` [t]: ``distances`` [t, n], root mean squares over the baseline's own."""

    times: Floats
    distances: Floats

    @property
    def typical(self) -> Floats:
        """The median over the pictures, [t]."""
        found: Floats = np.median(self.distances, axis=1)
        return found

    @property
    def added(self) -> Floats:
        """By how much the typical distance grows with each step, [t - 1]."""
        found: Floats = np.diff(self.typical)
        return found

    def parting(self, limit: float = PARTED) -> int | None:
        """The first place in ``times`` from which the typical distance stays above ``limit``; None if it ends below."""
        within = np.flatnonzero(self.typical <= limit)
        first = int(within[-1]) + 1 if len(within) else 0
        return first if first < len(self.times) else None


def drift(baseline: SamplingPath, candidate: SamplingPath) -> PathDrift:
    """How far a candidate's latents are from the baseline's, at the timesteps of the one with fewer steps.

    Raises `ValueError` for paths of other pictures, for timesteps that do not fall, and for latents that are not
    finite.
    """
    for path in (baseline, candidate):
        if len(path.times) != len(path.latents) or len(path.times) < 2 or not (np.diff(path.times) < 0).all():
            raise ValueError(f"expected latents at falling timesteps, found {len(path.latents)} at {path.times}")
        if not np.isfinite(path.latents).all():
            raise ValueError("latents hold NaN or infinity")
    if baseline.latents.shape[1:] != candidate.latents.shape[1:]:
        raise ValueError(f"latents must pair: {baseline.latents.shape[1:]} and {candidate.latents.shape[1:]}")
    times = min(baseline.times, candidate.times, key=len)
    ours, theirs = baseline.at(times), candidate.at(times)
    size = np.maximum(_root_mean_square(ours), np.finfo(np.float64).tiny)
    return PathDrift(times, _root_mean_square(theirs - ours) / size)


def _root_mean_square(latents: Floats) -> Floats:
    """Over all but the first two axes, [t, n]."""
    found: Floats = np.sqrt(np.square(latents).reshape(*latents.shape[:2], -1).mean(axis=2))
    return found
