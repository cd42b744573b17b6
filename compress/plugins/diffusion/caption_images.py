"""Rows of pictures and captions as a denoiser learns from them, and the paths that it walks for captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.plugins.diffusion.image_levels import levels_of
from compress.plugins.diffusion.noised_latents import TEXT, caption_states, encode_pictures, latent_examples
from compress.plugins.diffusion.pipeline_model import TEXT_ENCODER, VAE, GeneratorModel
from compress.plugins.diffusion.scheduler_search import Path
from compress.plugins.diffusion.torch_session import torch_sampler
from compress.tasks.task import Examples
from compress.utils.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from compress.stages.base import Context

TRAIN, VALIDATION = "train", "validation"
"""The splits that training looks at."""
_PICTURE, _CAPTION = "image", "text"
"""The columns."""


def picture_rows(
    model: GeneratorModel, context: Context, split: str = TRAIN, places: Sequence[int] | None = None
) -> np.ndarray:
    """The pictures of a split, or those at ``places``, [n, channels, height, width] from -1 to 1.

    Raises `DataError` where rows have no pictures, or a broken one.
    """
    rows = _rows(context, split, places)
    if _PICTURE not in rows.column_names:
        raise DataError(f"The {split} split has no pictures to learn from.", expected=f"a column {_PICTURE!r}")
    levels = levels_of(rows[_PICTURE].to_pylist(), model.processor.picture_shape)
    pictures: np.ndarray = levels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    return pictures


def latent_rows(
    model: GeneratorModel, context: Context, split: str = TRAIN, places: Sequence[int] | None = None
) -> tuple[Examples, torch.Tensor]:
    """A split, or what of it is at ``places``, as latents and states of captions.

    Beside them the states of the empty prompt, [1, tokens, width]. Raises `DataError` where rows have no pictures, or a
    broken one.
    """
    latents = encode_pictures(model.parts[VAE], picture_rows(model, context, split, places))
    captions = [str(caption) for caption in _rows(context, split, places)[_CAPTION].to_pylist()]
    states = caption_states(captions, lambda some: text_states(model, some))
    return latent_examples(latents, {TEXT: states}), torch.from_numpy(text_states(model, [""]))


def some_places(context: Context, split: str, count: int) -> list[int]:
    """``count`` rows of a split, or all, drawn from the run's seed."""
    drawn = np.random.default_rng(context.seed).permutation(context.data.split(split).num_rows)
    places: list[int] = np.sort(drawn[:count]).tolist()
    return places


def _rows(context: Context, split: str, places: Sequence[int] | None) -> pa.Table:
    rows = context.data.split(split)
    return rows if places is None else rows.take(list(places))


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
