"""Rows of pictures and captions as a denoiser learns from them, and the paths that it walks for captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.checkpoints.diffusion_pipeline import TEXT_ENCODER, VAE, GeneratorModel
from compress.errors import DataError
from compress.formats.safetensors.pictures import torch_sampler
from compress.runtimes.step_choice import Path
from compress.tasks.pictures import levels_of
from compress.tasks.task import Examples
from compress.training.noised_latents import TEXT, caption_states, encode_pictures, latent_examples

if TYPE_CHECKING:
    from compress.stage.stage import Context

TRAIN, VALIDATION = "train", "validation"
"""The splits that training looks at."""
_PICTURE, _CAPTION = "image", "text"
"""The columns."""


def picture_rows(model: GeneratorModel, context: Context, split: str = TRAIN) -> np.ndarray:
    """The pictures of a split, [n, channels, height, width] from -1 to 1. Raises `DataError` where there are none."""
    rows = context.data.split(split)
    if _PICTURE not in rows.column_names:
        raise DataError(f"The {split} split has no pictures to learn from.", expected=f"a column {_PICTURE!r}")
    levels = levels_of(rows[_PICTURE].to_pylist(), model.processor.picture_shape)
    pictures: np.ndarray = levels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    return pictures


def latent_rows(model: GeneratorModel, context: Context, split: str = TRAIN) -> tuple[Examples, torch.Tensor]:
    """A split as latents and states of captions, and those of the empty prompt, [1, tokens, width].

    Raises `DataError` where rows have no pictures, or a broken one.
    """
    latents = encode_pictures(model.parts[VAE], picture_rows(model, context, split))
    captions = [str(caption) for caption in context.data.split(split)[_CAPTION].to_pylist()]
    states = caption_states(captions, lambda some: text_states(model, some))
    return latent_examples(latents, {TEXT: states}), torch.from_numpy(text_states(model, [""]))


@torch.inference_mode()
def text_states(model: GeneratorModel, prompts: Sequence[str]) -> np.ndarray:
    """What the text encoder says of prompts, [n, tokens, width]."""
    encoder: Any = model.parts[TEXT_ENCODER]
    found: np.ndarray = encoder(torch.from_numpy(model.processor.ids(prompts)))[0].float().numpy()
    return found


def walked_path(model: GeneratorModel, context: Context, count: int, steps: int) -> Path:
    """Where ``steps`` lead for captions of the train split that are spread over it, each from noise of its own."""
    captions = context.data.split("train")[_CAPTION].to_pylist()
    chosen = [captions[place] for place in np.linspace(0, len(captions) - 1, count).round().astype(int)]
    noise = np.stack([model.processor.noise(context.seed + place) for place in range(count)])
    return Path.of(torch_sampler(model), model.processor.ids(chosen), noise, steps)
