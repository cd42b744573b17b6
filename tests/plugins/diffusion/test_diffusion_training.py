"""Tests of diffusion training: noise, sampling steps, losses and encoded examples against diffusers and formulas."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_unets
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)

from compress.plugins.diffusion.noised_latents import (
    TEXT,
    NoiseProcess,
    denoising_losses,
    encode_captions,
    encode_images,
    unscale_latents,
)
from compress.plugins.diffusion.sampler import guidance_embedding
from compress.plugins.diffusion.step_losses import (
    NoiseSchedule,
    PredictionType,
    add_noise,
    boundary_scalings,
    ddim_step,
    predicted_clean,
    pseudo_huber,
)
from compress.utils.errors import StageError


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_ddim_step_equals_diffusers(kind: PredictionType) -> None:
    scheduler = DDIMScheduler(
        1000, prediction_type=kind, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=False
    )
    scheduler.set_timesteps(8)
    levels = NoiseSchedule(scheduler.alphas_cumprod, float(scheduler.final_alpha_cumprod))
    noisy, output = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).split(1)
    for time in scheduler.timesteps.tolist():
        start_level, end_level = levels.levels(torch.tensor([time]), 4), levels.levels(torch.tensor([time - 125]), 4)
        stepped = ddim_step(predicted_clean(kind, output, noisy, start_level), noisy, start_level, end_level)
        expected = scheduler.step(output, time, noisy).prev_sample
        torch.testing.assert_close(stepped, expected, rtol=2e-5, atol=2e-5)


def test_added_noise_equals_diffusers() -> None:
    scheduler, times = DDIMScheduler(1000), torch.tensor([3, 100, 500, 900, 999])
    clean, noise = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(1))
    noisy = add_noise(clean, noise, NoiseSchedule(scheduler.alphas_cumprod).levels(times, 2))
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, times))


def test_boundary_scalings_equal_diffusers() -> None:
    scheduler = LCMScheduler()
    skip, out = boundary_scalings(torch.arange(1000), 1)
    expected = [scheduler.get_scalings_for_boundary_condition_discrete(time) for time in range(1000)]
    torch.testing.assert_close(torch.stack([skip, out], 1), torch.tensor(expected))


def test_guidance_embedding_equals_diffusers() -> None:
    """LatentConsistencyModelPipeline embeds 1000 (scale - 1) as it embeds a timestep."""
    from diffusers.models.embeddings import get_timestep_embedding

    scales = (1.0, 4.5, 8.0)
    expected = get_timestep_embedding(1000 * (torch.tensor(scales) - 1), 33, downscale_freq_shift=1)
    embedded = np.stack([guidance_embedding(scale, 33) for scale in scales])
    np.testing.assert_allclose(embedded, expected.numpy(), rtol=1e-4, atol=1e-3)


def test_pseudo_huber_loss_is_quadratic_near_zero_and_linear_far_away() -> None:
    target = torch.zeros(1, 100)
    constant = 0.00054 * 10
    near, far = torch.full((1, 100), 1e-6), torch.full((1, 100), 10.0)
    assert float(pseudo_huber(near.double(), target.double())) == pytest.approx((1e-5) ** 2 / 2 / constant, rel=1e-3)
    assert float(pseudo_huber(far, target)) == pytest.approx(100 - constant, rel=1e-5)


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in tiny_unets.latents(rows).batch(list(range(rows))).items()}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_scheduler_recovers_clean_latents_from_the_target(kind):
    noised = NoiseProcess.from_scheduler(DPMSolverMultistepScheduler(prediction_type=kind)).sample(
        batch(), torch.tensor(400)
    )
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(1000)
    clean_latents = scheduler.step(noised.target, 400, noised.noised).pred_original_sample
    assert torch.allclose(clean_latents, noised.clean, atol=1e-4)
    assert noised.timesteps.tolist() == [400] * 4


def test_dropped_prompts_become_the_empty_prompt():
    empty = torch.full((tiny_unets.TOKENS, tiny_unets.TEXT_WIDTH), 7.0)
    noising = NoiseProcess.from_scheduler(DDIMScheduler(), {TEXT: empty}, dropped=0.25)
    torch.manual_seed(0)
    rows = {name: value.repeat(100, *[1] * (value.ndim - 1)) for name, value in batch(4).items()}
    states = noising.sample(rows).conditions[TEXT]
    emptied = (states == 7.0).all(2).all(1)
    assert emptied.float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert torch.equal(states[~emptied], rows[TEXT][~emptied])


def test_denoising_loss_of_known_outputs():
    noised = NoiseProcess.from_scheduler(DDIMScheduler()).sample(batch())
    asked = []

    def unet(sample, timesteps, encoder_hidden_states, return_dict):
        asked.append((sample, timesteps, encoder_hidden_states))
        return (noised.noise + torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None, None, None],)

    assert denoising_losses(unet, noised).tolist() == pytest.approx([0.0, 1.0, 4.0, 9.0])
    assert torch.equal(asked[0][0], noised.noised) and torch.equal(asked[0][2], noised.conditions[TEXT])


def test_image_latents_use_scaling_and_shift_of_the_config():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    pictures = np.random.default_rng(0).uniform(-1, 1, (3, 3, 8, 8)).astype(np.float32)
    latents = encode_images(vae, pictures)
    with torch.no_grad():
        own = vae.encode(torch.from_numpy(pictures)).latent_dist.mode()
    assert np.allclose(latents, (own - 0.25) * 0.5, atol=1e-5)
    assert torch.allclose(unscale_latents(vae, torch.from_numpy(latents)), own, atol=1e-5)


def test_each_caption_is_encoded_once():
    asked: list[str] = []

    def encode(captions: list[str]) -> np.ndarray:
        asked.extend(captions)
        return np.array([[[float(len(caption))]] for caption in captions])

    states = encode_captions(["a", "bcd", "a"], encode)
    assert asked == ["a", "bcd"] and [state.item() for state in states] == [1.0, 3.0, 1.0]
    assert states[0] is states[2]


def test_flow_matching_scheduler_is_refused():
    with pytest.raises(StageError, match="FlowMatchEulerDiscreteScheduler has no schedule of betas"):
        NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler())
