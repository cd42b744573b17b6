"""What a page makes of noise step by step, in Node, against diffusers' own schedulers."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from compress.plugins.apps.image_generation import noise_of, portable_noise
from compress.plugins.apps.postprocess import Draw
from compress.plugins.diffusion.scheduler_table import step_table

diffusers = pytest.importorskip("diffusers")

COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
SCRIPT = Path(__file__).parent / "draws.mjs"


def end_of(scheduler: Any, steps: int) -> Draw:
    defaults: dict[str, Any] = {"guidance": 1.0, "empty_ids": (), "condition": (), "scaling": 1.0, "shift": 0.0}
    places = {"output": "", "denoiser": "", "decoder": "", "channels": 4, "height": 3, "width": 5, "factor": 1}
    return Draw.model_validate({**places, **defaults, **asdict(step_table(scheduler, steps))})


def denoiser(sample: np.ndarray, time: float) -> np.ndarray:
    return np.tanh(sample + np.sin(time / 100) + sample.mean()).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "fields", "steps"),
    [
        ("DDIMScheduler", {**COSINE, "clip_sample": False, "timestep_spacing": "trailing"}, 4),
        ("DPMSolverMultistepScheduler", {**COSINE, "timestep_spacing": "trailing"}, 8),
        ("LCMScheduler", {**COSINE, "original_inference_steps": 50}, 4),
    ],
)
def test_a_page_steps_as_diffusers_does(name: str, fields: dict[str, Any], steps: int) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here")
    scheduler = getattr(diffusers, name)(**fields)
    end = end_of(scheduler, steps)
    asked = json.dumps({"end": end.model_dump(mode="json"), "seed": 7})
    answer = json.loads(subprocess.run([node, SCRIPT], input=asked, capture_output=True, text=True, check=True).stdout)
    noise, added = noise_of(end, 7)
    np.testing.assert_allclose(answer["noise"], noise.reshape(-1), rtol=1e-6)
    np.testing.assert_allclose(answer["added"], added.reshape(steps, -1), rtol=1e-9, atol=1e-12)
    latents = torch.from_numpy(noise) * scheduler.init_noise_sigma
    scheduler.set_timesteps(steps)
    for step, time in enumerate(scheduler.timesteps):
        output = torch.from_numpy(denoiser(scheduler.scale_model_input(latents, time).numpy(), float(time)))
        last = step == steps - 1
        latents = (
            by_hand(scheduler, output, int(time), step, latents, None if last else added[step])
            if name == "LCMScheduler"
            else scheduler.step(output, time, latents).prev_sample
        )
    np.testing.assert_allclose(answer["latents"], latents.numpy().reshape(-1), rtol=1e-4, atol=1e-4)
    assert answer["steps"] == steps


def by_hand(
    scheduler: Any, output: torch.Tensor, time: int, place: int, latents: torch.Tensor, noise: np.ndarray | None
) -> torch.Tensor:
    """LCM's step with noise that is given: Luo et al. 2023, algorithm 3, of a network that predicts v."""
    square = float(scheduler.alphas_cumprod[time])
    clean = square**0.5 * latents - (1 - square) ** 0.5 * output
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(time)
    end = skip * latents + out * clean
    if noise is None:
        return end
    after = float(scheduler.alphas_cumprod[int(scheduler.timesteps[place + 1])])
    return after**0.5 * end + (1 - after) ** 0.5 * torch.from_numpy(noise).float()


def test_portable_noise_is_standard_normal() -> None:
    drawn = portable_noise(5, 20_000)
    assert kstest(drawn, "norm").pvalue > 0.01
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(drawn, portable_noise(6, 20_000))[0, 1]) < 0.03


def test_portable_noise_is_that_of_its_rule() -> None:
    """Worked in Python's integers, one number after the other."""
    state, uniform = 5, []
    for _ in range(4):
        state = (state + 0x6D2B79F5) & 0xFFFFFFFF
        mixed = ((state ^ state >> 15) * (state | 1)) & 0xFFFFFFFF
        mixed ^= (mixed + (mixed ^ mixed >> 7) * (mixed | 61)) & 0xFFFFFFFF
        uniform.append((mixed ^ mixed >> 14) / 2**32)
    expected = [
        (-2 * np.log(first + 2**-33)) ** 0.5 * turn(2 * np.pi * second)
        for first, second in (uniform[:2], uniform[2:])
        for turn in (np.cos, np.sin)
    ]
    np.testing.assert_allclose(portable_noise(5, 3), expected[:3], rtol=1e-12)
