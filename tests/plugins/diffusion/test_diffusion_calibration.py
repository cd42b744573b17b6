"""What the parts of a pipeline are calibrated on: where on the way, of how many prompts, with guidance or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, HeunDiscreteScheduler

from compress.formats.runtime import Batch, TensorType
from compress.plugins.diffusion.calibration import TIMESTEPS, evenly, prompts_needed, watch
from compress.plugins.diffusion.sampler import (
    DENOISED,
    HIDDEN,
    IDS,
    LATENT,
    NOISE,
    PICTURE,
    SAMPLE,
    SEED,
    TEXT,
    TIMESTEP,
    Latents,
    PictureSampler,
)
from compress.plugins.diffusion.sampling_settings import Sampling
from compress.plugins.diffusion.session import PictureSession

PROMPTS, TOKENS, SCALING = 3, 5, 0.5
EMPTY = 9
"""The token of the empty prompt."""


class Part:
    """A session whose answers are known by hand."""

    provider = "none"
    settings: Mapping[str, Any] = {}

    def __init__(self, gives: str, **inputs: str) -> None:
        self.gives, self.inputs = gives, tuple(inputs)
        self.input_types = {name: TensorType(dtype, ()) for name, dtype in inputs.items()}
        self.output_types = {gives: TensorType("float32", ())}

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        if self.gives == HIDDEN:
            return {HIDDEN: np.repeat(batch[IDS][:, :, np.newaxis], 2, axis=2).astype(np.float32)}
        if self.gives == DENOISED:
            return {DENOISED: 0.1 * batch[SAMPLE]}
        return {PICTURE: batch[LATENT][:, :1]}


def session(steps: int = 50, guidance: float = 7.5, scheduler: Any = None) -> PictureSession:
    parts = {
        "text_encoder": Part(HIDDEN, input_ids="int64"),
        "unet": Part(DENOISED, sample="float32", timestep="int64", encoder_hidden_states="float32"),
        "vae_decoder": Part(PICTURE, latent_sample="float32"),
    }
    text, unet, decoder = (part.predict for part in parts.values())
    latents = Latents(channels=4, factor=2, multiple=2, scaling=SCALING)
    scheduler = scheduler or DDIMScheduler(clip_sample=False)
    empty = np.full((1, TOKENS), EMPTY, np.int64)
    sampler = PictureSampler(text, unet, decoder, scheduler, latents, Sampling(steps, guidance), empty)
    return PictureSession(sampler, parts, "here")


def batch() -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).standard_normal((PROMPTS, 4, 8, 8)).astype(np.float32)
    ids = np.arange(PROMPTS)[:, np.newaxis] + np.ones((1, TOKENS), np.int64)
    return {IDS: ids, NOISE: noise, SEED: np.arange(PROMPTS)}


def test_a_denoiser_is_watched_evenly_over_the_way_with_guidance() -> None:
    watched = watch(session(), "unet", batch(), np.arange(PROMPTS), seed=0)
    # DDIM's 50 of 1000 timesteps are 980, 960, ..., 0; 25 of them from the first to the last.
    expected = [980 - 20 * round(sample * 49 / 24) for sample in range(25)]
    assert list(watched.timesteps) == expected
    assert (expected[0], expected[-1]) == (980, 0)
    assert len(watched.feeds) == TIMESTEPS
    for feed in watched.feeds:
        assert feed[SAMPLE].shape == (2 * PROMPTS, 4, 8, 8)
        np.testing.assert_array_equal(feed[SAMPLE][:PROMPTS], feed[SAMPLE][PROMPTS:])
        # The empty prompt comes first, as in diffusers.
        assert feed[TEXT][:, 0, 0].tolist() == [EMPTY] * PROMPTS + [1, 2, 3]
        # As the graph takes it.
        assert feed[TIMESTEP].dtype == np.int64
    np.testing.assert_array_equal(watched.feeds[0][SAMPLE][:PROMPTS], batch()[NOISE])
    assert "3 prompts at 25 timesteps with guidance 7.5" in str(watched)


def test_without_guidance_there_is_one_row_a_prompt() -> None:
    watched = watch(session(4, 1.0), "unet", batch(), np.arange(PROMPTS), seed=0)
    assert [feed[SAMPLE].shape[0] for feed in watched.feeds] == [PROMPTS] * 4
    assert list(watched.timesteps) == [750, 500, 250, 0]


def test_a_scheduler_that_calls_twice_a_step_is_watched_at_both() -> None:
    watched = watch(session(5, 1.0, HeunDiscreteScheduler()), "unet", batch(), np.arange(PROMPTS), seed=0)
    assert len(watched.feeds) == 2 * 5 - 1


def test_a_decoder_is_given_what_sampling_ends_in() -> None:
    drawing = session(10)
    latents = drawing.sampler.denoised(batch()[IDS], batch()[NOISE], list(range(PROMPTS)))
    watched = watch(drawing, "vae_decoder", batch(), np.arange(PROMPTS), seed=0)
    np.testing.assert_allclose(np.concatenate([feed[LATENT] for feed in watched.feeds]), latents / SCALING, rtol=1e-6)
    text = watch(drawing, "text_encoder", batch(), np.arange(PROMPTS), seed=0)
    assert [feed[IDS].tolist() for feed in text.feeds] == [[[1 + row] * TOKENS] for row in range(PROMPTS)]


@pytest.mark.parametrize(
    ("part", "steps", "guidance", "count", "prompts"),
    [
        # 25 steps of two rows each.
        ("unet", 50, 7.5, 250, 5),
        ("unet", 50, 7.5, 251, 6),
        ("unet", 4, 1.0, 250, 63),
        ("unet", 50, 7.5, 1, 1),
        ("text_encoder", 50, 7.5, 250, 250),
        ("vae_decoder", 50, 7.5, 250, 32),
        ("vae_decoder", 50, 7.5, 7, 7),
    ],
)
def test_prompts_are_as_many_as_the_examples_take(
    part: str, steps: int, guidance: float, count: int, prompts: int
) -> None:
    assert prompts_needed(session(steps, guidance).sampler, part, count) == prompts


def test_places_are_even() -> None:
    assert evenly(5, 25) == [0, 1, 2, 3, 4]
    assert evenly(100, 5) == [0, 25, 50, 74, 99]
    assert evenly(1, 25) == [0]
