"""The parts of a model that draws pictures, as torch computes them, for the loop that draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from compress.checkpoints.diffusion_pipeline import TEXT_ENCODER, VAE, GeneratorModel
from compress.runtimes import picture_sampler as names
from compress.runtimes.picture_sampler import Latents, PictureSampler
from compress.runtimes.runtime import Batch


def torch_sampler(model: GeneratorModel) -> PictureSampler:
    """Draws with the modules of ``model``, its scheduler and its own number of steps."""
    unet, vae = model.parts[model.denoiser], model.parts[VAE]
    return PictureSampler(
        encode=lambda batch: _encode(model.parts[TEXT_ENCODER], batch),
        denoise=lambda batch: _denoise(unet, batch),
        decode=lambda batch: _decode(vae, batch),
        scheduler=model.scheduler,
        latents=latents_of(unet.config, vae.config),
        sampling=model.sampling,
        empty=model.processor.ids([""]),
    )


def latents_of(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Latents:
    """What lies between a denoiser and a decoder, by their configs."""
    return Latents(
        channels=int(unet["in_channels"]),
        factor=2 ** (len(vae["block_out_channels"]) - 1),
        multiple=2 ** (len(unet["block_out_channels"]) - 1),
        scaling=float(vae.get("scaling_factor") or 1.0),
        shift=float(vae.get("shift_factor") or 0.0),
        condition=int(unet.get("time_cond_proj_dim") or 0),
    )


def _encode(part: Any, batch: Batch) -> dict[str, np.ndarray]:
    return {names.HIDDEN: _run(lambda ids: part(ids)[0], batch[names.IDS])}


def _denoise(part: Any, batch: Batch) -> dict[str, np.ndarray]:
    import torch

    told = {names.CONDITION: torch.from_numpy(batch[names.CONDITION])} if names.CONDITION in batch else {}
    given = (batch[name] for name in (names.SAMPLE, names.TIMESTEP, names.TEXT))
    return {names.DENOISED: _run(lambda sample, when, text: part(sample, when, text, **told)[0], *given)}


def _decode(part: Any, batch: Batch) -> dict[str, np.ndarray]:
    return {names.PICTURE: _run(lambda latents: part.decode(latents)[0], batch[names.LATENT])}


def _run(call: Any, *arrays: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return np.asarray(call(*(torch.from_numpy(np.asarray(array)) for array in arrays)).numpy())
