"""What a denoiser is given at each step, whatever a scheduler holds between."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

from compress.plugins.diffusion.sampler import DENOISED, HIDDEN, PICTURE, SAMPLE, Latents, PictureSampler
from compress.plugins.diffusion.sampling_drift import drift
from compress.plugins.diffusion.sampling_path import FINISHED, sampling_path
from compress.plugins.diffusion.sampling_settings import Sampling

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
NOISE = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
SETTINGS = {DDIMScheduler: {"clip_sample": False}}
IDS = np.ones((2, 3), np.int64)


def _sampler(scheduler: type, steps: int, guidance: float = 1.0) -> PictureSampler:
    """A denoiser that takes half of what it is given for noise."""
    return PictureSampler(
        encode=lambda batch: {HIDDEN: np.zeros((len(batch["input_ids"]), 3, 2), np.float32)},
        denoise=lambda batch: {DENOISED: 0.5 * batch[SAMPLE]},
        decode=lambda batch: {PICTURE: batch["latent_sample"]},
        scheduler=scheduler(**SETTINGS.get(scheduler, {}), timestep_spacing="trailing"),
        latents=Latents(4, 1, 1, 1.0),
        sampling=Sampling(steps, guidance),
        empty=np.zeros((1, 3), np.int64),
    )


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_path_is_that_of_diffusers_own_loop(guidance: float) -> None:
    sampler = _sampler(DDIMScheduler, 5, guidance)
    path = sampling_path(sampler, IDS, NOISE, [0, 1])
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    latents = [torch.from_numpy(NOISE)]
    for time in scheduler.timesteps:
        latents.append(scheduler.step(0.5 * latents[-1], time, latents[-1]).prev_sample)
    assert path.times.tolist() == [999, 799, 599, 399, 199, FINISHED]
    assert np.allclose(path.latents, torch.stack(latents).numpy(), atol=1e-5)


def test_schedulers_of_another_scale_keep_to_the_same_path() -> None:
    # DDIM without noise is Euler's method in another scale (Karras et al. 2022, section 3).
    exact = sampling_path(_sampler(DDIMScheduler, 100), IDS, NOISE, [0, 1])
    scaled = sampling_path(_sampler(EulerDiscreteScheduler, 100), IDS, NOISE, [0, 1])
    found = drift(exact, scaled)
    assert found.typical.max() < 1e-3
    assert found.parting() is None


def test_of_a_timestep_that_is_asked_twice_the_second_call_counts() -> None:
    path = sampling_path(_sampler(HeunDiscreteScheduler, 4), IDS, NOISE, [0, 1])
    assert (np.diff(path.times) < 0).all()
    assert path.latents.shape[0] == len(path.times) == 5


def test_drawing_is_not_changed_by_being_watched() -> None:
    sampler = _sampler(DDIMScheduler, 3, 2.0)
    assert np.array_equal(sampling_path(sampler, IDS, NOISE, [0, 1]).latents[-1], sampler.denoised(IDS, NOISE, [0, 1]))
    other = replace(sampler, sampling=Sampling(4, 2.0))
    assert len(sampling_path(other, IDS, NOISE, [0, 1]).times) == 5
