"""Rows of pictures and captions as a denoiser learns from them, and the paths that it walks for captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.checkpoints.diffusion_pipeline import TEXT_ENCODER, VAE, GeneratorModel
from compress.data.media import Mode, decode
from compress.errors import StageError
from compress.formats.safetensors.pictures import torch_sampler
from compress.runtimes.step_choice import Path
from compress.tasks.task import Examples
from compress.training.noised_latents import TEXT, caption_states, encode_pictures, latent_examples

if TYPE_CHECKING:
    from PIL import Image

    from compress.stage.stage import Context

_PICTURE, _CAPTION = "image", "text"
"""The columns."""


def latent_rows(model: GeneratorModel, context: Context) -> tuple[Examples, torch.Tensor]:
    """The train split as latents and states of captions, and those of the empty prompt, [1, tokens, width].

    Raises `StageError` for a model without a size of its own.
    """
    rows = context.data.split("train")
    pictures = prepared_pictures(rows[_PICTURE].to_pylist(), picture_shape(model))
    latents = encode_pictures(model.parts[VAE], pictures)
    captions = [str(caption) for caption in rows[_CAPTION].to_pylist()]
    states = caption_states(captions, lambda some: text_states(model, some))
    return latent_examples(latents, {TEXT: states}), torch.from_numpy(text_states(model, [""]))


@torch.inference_mode()
def text_states(model: GeneratorModel, prompts: Sequence[str]) -> np.ndarray:
    """What the text encoder says of prompts, [n, tokens, width]."""
    encoder: Any = model.parts[TEXT_ENCODER]
    found: np.ndarray = encoder(torch.from_numpy(model.processor.ids(prompts)))[0].float().numpy()
    return found


def picture_shape(model: GeneratorModel) -> tuple[int, int, int]:
    """Channels, height and width of the pictures of a model. Raises `StageError` where its config has no size."""
    vae: Any = model.parts[VAE]
    _, height, width = model.processor.noise_shape
    if not height or not width:
        raise StageError(
            "The denoiser's config does not say how large its pictures are.",
            where=f"{model.denoiser}/config.json",
            expected="sample_size, in latents",
        )
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return int(vae.config.in_channels), height * factor, width * factor


def prepared_pictures(values: Sequence[Any], shape: tuple[int, int, int]) -> np.ndarray:
    """Pictures [n, channels, height, width] from -1 to 1, made smaller where they are too large, black around them."""
    channels, height, width = shape
    mode: Mode = "L" if channels == 1 else "RGB"
    found = np.empty((len(values), channels, height, width), np.float32)
    for place, value in enumerate(values):
        levels = np.asarray(_fitted(decode(value, mode, Counter()), height, width), np.float32)
        found[place] = levels.reshape(height, width, channels).transpose(2, 0, 1) / 127.5 - 1
    return found


def _fitted(picture: Image.Image, height: int, width: int) -> Image.Image:
    from PIL import Image

    if picture.width > width or picture.height > height:
        picture.thumbnail((width, height))
    whole = Image.new(picture.mode, (width, height))
    whole.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return whole


def walked_path(model: GeneratorModel, context: Context, count: int, steps: int) -> Path:
    """Where ``steps`` lead for captions of the train split that are spread over it, each from noise of its own."""
    captions = context.data.split("train")[_CAPTION].to_pylist()
    chosen = [captions[place] for place in np.linspace(0, len(captions) - 1, count).round().astype(int)]
    noise = np.stack([model.processor.noise(context.seed + place) for place in range(count)])
    return Path.of(torch_sampler(model), model.processor.ids(chosen), noise, steps)
