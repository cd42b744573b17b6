"""Latents of an image generation model at each denoising step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from compress.formats.runtime import Batch
from compress.plugins.diffusion.sampler import SAMPLE, TIMESTEP, PictureSampler
from compress.plugins.diffusion.sampling_drift import SamplingPath

FINISHED = -1.0
"""Time of the finished latents, after the last timestep, which may be 0."""


def sampling_path(sampler: PictureSampler, ids: np.ndarray, noise: np.ndarray, seeds: list[int]) -> SamplingPath:
    """Return the latents that the denoiser receives at each timestep, and the finished latents last.

    They are scaled as the denoiser takes them. If it is called twice at a timestep, the second call counts. Raises the
    errors of `PictureSampler.draw`.

    Args:
        sampler: Sampling loop.
        ids: Token ids of the prompts, [n, tokens].
        noise: Initial latents, [n, channels, height, width].
        seeds: Seed of each image.
    """
    latents: dict[float, np.ndarray] = {}

    def denoise(batch: Batch) -> Mapping[str, np.ndarray]:
        latents[float(batch[TIMESTEP])] = batch[SAMPLE][: len(noise)].copy()
        return sampler.denoise(batch)

    finished = replace(sampler, denoise=denoise).denoised(ids, noise, seeds)
    times = sorted(latents, reverse=True)
    return SamplingPath(np.array([*times, FINISHED]), np.stack([*(latents[time] for time in times), finished]))
