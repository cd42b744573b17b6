"""Pictures that models draw, and those that rows hold, in levels of 0 to 255."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from compress.data.media import decode
from compress.numerics.calibration import mean_interval
from compress.plugins.diffusion.image_similarity import SSIM_WINDOW, psnr, ssim
from compress.results.report import Measurement

if TYPE_CHECKING:
    from PIL import Image

_SEED = 0
_LEVELS = 255


def as_levels(pictures: np.ndarray) -> np.ndarray:
    """Pictures from 0 to 1 as uint8, rounded as diffusers does it."""
    return (pictures * _LEVELS).round().astype(np.uint8)


def levels_of(values: Sequence[Mapping[str, object]], shape: tuple[int, int, int]) -> np.ndarray:
    """Images of a column as [n, height, width, channels] uint8, ``shape`` being channels, height and width.

    Raises `DataError` for a broken one.
    """
    channels, height, width = shape
    conversions: Counter[str] = Counter()
    images = (decode(value, "L" if channels == 1 else "RGB", conversions) for value in values)
    return np.stack([np.asarray(fitted(image, height, width)).reshape(height, width, -1) for image in images])


def fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    """An image of that size: a smaller one in the middle of black, a larger one scaled down and cropped evenly."""
    from PIL import Image, ImageOps

    if image.height <= height and image.width <= width:
        whole = Image.new(image.mode, (width, height))
        whole.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return whole
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def contrast_row(pictures: np.ndarray, model: str, target: str) -> Measurement:
    """The mean standard deviation of a picture's levels, with its interval over pictures."""
    return _mean_row("picture_contrast", pictures.reshape(len(pictures), -1).std(axis=1), "levels", model, target)


def nearness_rows(pictures: np.ndarray, reference: np.ndarray, model: str, target: str) -> list[Measurement]:
    """Mean PSNR of pictures to their references, and SSIM where they are large enough, with intervals."""
    rows = [_mean_row("psnr_to_baseline", psnr(pictures, reference, span=_LEVELS), "dB", model, target)]
    if min(pictures.shape[1:3]) >= SSIM_WINDOW:
        rows.append(_mean_row("ssim_to_baseline", ssim(pictures, reference, span=_LEVELS), "", model, target))
    return rows


def _mean_row(metric: str, values: np.ndarray, unit: str, model: str, target: str) -> Measurement:
    value, low, high = mean_interval(values.tolist(), _SEED)
    known = {"low": low, "high": high} if len(values) > 1 else {}
    raw = tuple(values.tolist())
    return Measurement(
        model=model, metric=metric, target=target, value=value, unit=unit, n=len(values), raw=raw, **known
    )
