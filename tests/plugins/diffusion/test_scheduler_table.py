"""Schedulers as tables of numbers, against diffusers' own steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compress.plugins.diffusion.scheduler_table import step_table
from compress.utils.errors import ModelError

diffusers = pytest.importorskip("diffusers")

COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (2, 4, 3, 3)


def denoiser(sample: np.ndarray, time: float) -> np.ndarray:
    """Something that is not linear, and that every latent has a say in."""
    return np.tanh(sample + np.sin(time / 100) + sample.mean()).astype(np.float32)


def by_diffusers(scheduler: Any, steps: int, noise: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The latents, and the noise that steps drew of themselves."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    latents, added = torch.from_numpy(noise) * scheduler.init_noise_sigma, []
    options = (
        {"generator": generator}
        if type(scheduler).__name__ in ("LCMScheduler", "EulerAncestralDiscreteScheduler")
        else {}
    )
    for time in scheduler.timesteps:
        at = generator.get_state()
        added.append(torch.randn(SHAPE, generator=generator).numpy())
        generator.set_state(at)
        output = denoiser(scheduler.scale_model_input(latents, time).numpy(), float(time))
        latents = scheduler.step(torch.from_numpy(output), time, latents, **options).prev_sample
    return latents.numpy(), np.stack(added)


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("DDIMScheduler", {**COSINE, "clip_sample": False, "timestep_spacing": "trailing"}),
        ("DDIMScheduler", {**LINEAR, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
        ("DPMSolverMultistepScheduler", {**COSINE, "timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", {**LINEAR, "use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {**COSINE, "timestep_spacing": "trailing"}),
        ("EulerDiscreteScheduler", {**LINEAR, "timestep_spacing": "trailing"}),
        ("EulerAncestralDiscreteScheduler", LINEAR),
        ("LCMScheduler", {**COSINE, "original_inference_steps": 50}),
        ("LCMScheduler", {**LINEAR, "original_inference_steps": 20, "timestep_scaling": 3.0}),
    ],
)
def test_a_table_draws_what_diffusers_draws(name: str, fields: dict[str, Any], steps: int) -> None:
    scheduler = getattr(diffusers, name)(**fields)
    noise = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    expected, added = by_diffusers(scheduler, steps, noise, seed=3)
    table = step_table(scheduler, steps)
    latents = table.draw(denoiser, noise, added)
    np.testing.assert_allclose(latents, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert table.adds_noise == (name in ("LCMScheduler", "EulerAncestralDiscreteScheduler"))


@pytest.mark.parametrize("fields", [{"clip_sample": True}, {"clip_sample": False, "thresholding": True}])
def test_a_scheduler_that_clips_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="no sum"):
        step_table(diffusers.DDIMScheduler(**COSINE, **fields), 4)


def test_the_last_step_of_a_consistent_model_adds_no_noise() -> None:
    table = step_table(diffusers.LCMScheduler(**COSINE), 3)
    assert all(table.added[step][step] for step in (0, 1)) and not table.added[2][2]
