"""Numbers that an app needs to generate an image without diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from compress.models.pipeline_folder import UNET, part_config
from compress.plugins.diffusion.pipeline_model import Sampling, load_prompt_processor, load_scheduler, vae_config
from compress.plugins.diffusion.sampler import LatentSpace, guidance_embedding
from compress.plugins.diffusion.scheduler_table import SchedulerTable, build_scheduler_table


def app_sampling(folder: Path) -> dict[str, Any]:
    """Return the sizes, the guidance and the scheduler's table of a model, by the names of an app's manifest.

    ``condition`` is the embedding of the guidance scale for a denoiser that takes one as input, otherwise None.

    Raises:
        ModelError: The scheduler cannot be written as a table.
    """
    sampling, processor = Sampling.read(folder), load_prompt_processor(folder)
    latents = LatentSpace.from_configs(part_config(folder, UNET), vae_config(folder))
    channels, height, width = processor.noise_shape
    table = build_scheduler_table(load_scheduler(folder), sampling.steps)
    return {
        "channels": channels,
        "height": height,
        "width": width,
        "factor": latents.factor,
        "scaling": latents.scaling,
        "shift": latents.shift,
        "guidance": 1.0 if latents.condition else max(sampling.guidance, 1.0),
        "empty_ids": tuple(processor.ids([""])[0].tolist()),
        "condition": guidance_embedding(sampling.guidance, latents.condition) if latents.condition else None,
        **{column.name: getattr(table, column.name) for column in fields(table)},
    }


def sample_by_table(
    table: Mapping[str, Any], denoise: Callable[[np.ndarray, float], np.ndarray], noise: np.ndarray, added: np.ndarray
) -> np.ndarray:
    """Return the latents that an app computes from a table of `app_sampling`.

    Args:
        table: Columns of the scheduler's table by name.
        denoise: Denoiser, called with latents and a timestep.
        noise: Initial noise, [1, channels, height, width].
        added: Noise of each step, [steps, 1, channels, height, width].
    """
    latents: np.ndarray = SchedulerTable(**table).sample(denoise, noise, added)
    return latents
