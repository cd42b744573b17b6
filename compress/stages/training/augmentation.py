"""Training images varied anew each time they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compress.stages.training.settings import Augment
from compress.tasks.capability import TAKES_IMAGES
from compress.tasks.registry import tasks_with
from compress.tasks.task import Examples
from compress.utils.errors import StageError

_PIXELS = "pixel_values"


@dataclass(frozen=True)
class Augmentation:
    """Random changes to the batches of one training; ``black`` [C] is a black pixel's value after preparation.

    What is drawn depends on the seed, the epoch and the examples of a batch, and on nothing else: not on what was
    drawn before, nor on how many processes train.
    """

    settings: Augment
    black: np.ndarray
    seed: int

    @classmethod
    def of(cls, settings: Augment, examples: Examples, seed: int) -> Augmentation:
        """Return the augmentation of ``examples``. Raises `StageError` if they are no images, or too small."""
        if examples.black_pixel is None:
            raise StageError(
                "augment applies to images, and the training examples have none.",
                expected=f"a task of images: {', '.join(tasks_with(frozenset({TAKES_IMAGES})))}",
                hint="leave augment out",
            )
        height, width = examples.inputs[0][_PIXELS].shape[-2:]
        if settings.crop_padding >= min(height, width):
            raise StageError(
                f"augment.crop_padding is {settings.crop_padding}, and images have {height} x {width} pixels.",
                expected=f"less than {min(height, width)}, so that something of each image is left",
                hint=f"a tenth of the side is usual: crop_padding: {max(1, min(height, width) // 10)}",
            )
        return cls(settings, examples.black_pixel, seed)

    def vary(self, batch: dict[str, torch.Tensor], indices: Sequence[int], epoch: int) -> dict[str, torch.Tensor]:
        """Return the batch with varied `pixel_values` [B, C, H, W], as ``epoch`` shows the examples at ``indices``."""
        generator = np.random.default_rng([self.seed, epoch, *indices])
        images = batch[_PIXELS].numpy()
        if self.settings.crop_padding:
            images = random_crop(images, self.settings.crop_padding, self.black, generator)
        if self.settings.horizontal_flip:
            images = random_horizontal_flip(images, self.settings.horizontal_flip, generator)
        return {**batch, _PIXELS: torch.from_numpy(images)}


def random_crop(images: np.ndarray, padding: int, fill: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Pad each of ``images`` [B, C, H, W] by ``padding`` pixels, and crop a window of its size at random.

    ``fill`` [C] is what the padding holds. Each window is drawn by itself, evenly among (2 padding + 1)^2 places.
    """
    count, channels, height, width = images.shape
    padded = np.empty((count, channels, height + 2 * padding, width + 2 * padding), images.dtype)
    padded[:] = fill[:, None, None]
    padded[:, :, padding : padding + height, padding : padding + width] = images
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    top, left = generator.integers(0, 2 * padding + 1, (2, count))
    return np.asarray(windows[np.arange(count), :, top, left])


def random_horizontal_flip(images: np.ndarray, probability: float, generator: np.random.Generator) -> np.ndarray:
    """``images`` [B, C, H, W], each mirrored left to right with ``probability``, drawn for each by itself."""
    mirrored = generator.random(len(images)) < probability
    return np.asarray(np.where(mirrored[:, None, None, None], images[..., ::-1], images))
