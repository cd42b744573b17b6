"""Noise on latents: diffusers' own schedulers undo it, prompts are left out in their share, scales are the VAE's."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_unets
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from compress.plugins.diffusion.noised_latents import (
    TEXT,
    Noising,
    caption_states,
    denoising_losses,
    encode_pictures,
    unscaled_latents,
)
from compress.utils.errors import StageError


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in tiny_unets.latents(rows).batch(list(range(rows))).items()}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_scheduler_that_is_given_the_target_finds_the_clean_latents(kind):
    noised = Noising.of(DPMSolverMultistepScheduler(prediction_type=kind)).draw(batch(), torch.tensor(400))
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(1000)
    clean_latents = scheduler.step(noised.target, 400, noised.noised).pred_original_sample
    assert torch.allclose(clean_latents, noised.clean, atol=1e-4)
    assert noised.timesteps.tolist() == [400] * 4


def test_the_share_without_a_prompt_has_the_empty_one():
    empty = torch.full((tiny_unets.TOKENS, tiny_unets.TEXT_WIDTH), 7.0)
    noising = Noising.of(DDIMScheduler(), {TEXT: empty}, dropped=0.25)
    torch.manual_seed(0)
    rows = {name: value.repeat(100, *[1] * (value.ndim - 1)) for name, value in batch(4).items()}
    states = noising.draw(rows).conditions[TEXT]
    emptied = (states == 7.0).all(2).all(1)
    assert emptied.float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert torch.equal(states[~emptied], rows[TEXT][~emptied])


def test_a_unet_that_answers_with_the_target_has_no_loss():
    noised = Noising.of(DDIMScheduler()).draw(batch())
    asked = []

    def unet(sample, timesteps, encoder_hidden_states, return_dict):
        asked.append((sample, timesteps, encoder_hidden_states))
        return (noised.noise + torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None, None, None],)

    assert denoising_losses(unet, noised).tolist() == pytest.approx([0.0, 1.0, 4.0, 9.0])
    assert torch.equal(asked[0][0], noised.noised) and torch.equal(asked[0][2], noised.conditions[TEXT])


def test_latents_of_pictures_are_scaled_as_the_config_says():
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
    latents = encode_pictures(vae, pictures)
    with torch.no_grad():
        own = vae.encode(torch.from_numpy(pictures)).latent_dist.mode()
    assert np.allclose(latents, (own - 0.25) * 0.5, atol=1e-5)
    assert torch.allclose(unscaled_latents(vae, torch.from_numpy(latents)), own, atol=1e-5)


def test_each_caption_is_encoded_once():
    asked: list[str] = []

    def encode(captions: list[str]) -> np.ndarray:
        asked.extend(captions)
        return np.array([[[float(len(caption))]] for caption in captions])

    states = caption_states(["a", "bcd", "a"], encode)
    assert asked == ["a", "bcd"] and [state.item() for state in states] == [1.0, 3.0, 1.0]
    assert states[0] is states[2]


def test_flow_matching_is_refused_by_name():
    with pytest.raises(StageError, match="FlowMatchEulerDiscreteScheduler has no schedule of betas"):
        Noising.of(FlowMatchEulerDiscreteScheduler())
