"""What a model that draws pictures has before it at each step, and where that parts from the baseline's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from compress.numerics.sampling_drift import SamplingPath
from compress.runtimes.picture_sampler import SAMPLE, TIMESTEP, PictureSampler
from compress.runtimes.runtime import Batch

FINISHED = -1.0
"""Behind the last timestep, which may be 0."""


def sampling_path(sampler: PictureSampler, ids: np.ndarray, noise: np.ndarray, seeds: list[int]) -> SamplingPath:
    """The latents that the denoiser is given at each timestep for prompts [n, tokens] and noise [n, channels, h, w].

    They are scaled as it takes them, whatever the scheduler holds between; the finished ones are last. Of a timestep
    at which it is called twice the second call counts. Raises as `PictureSampler.draw`.
    """
    given: dict[float, np.ndarray] = {}

    def denoise(batch: Batch) -> Mapping[str, np.ndarray]:
        given[float(batch[TIMESTEP])] = batch[SAMPLE][: len(noise)].copy()
        return sampler.denoise(batch)

    finished = replace(sampler, denoise=denoise).denoised(ids, noise, seeds)
    times = sorted(given, reverse=True)
    return SamplingPath(np.array([*times, FINISHED]), np.stack([*(given[time] for time in times), finished]))
