"""Metrics of generated images: PSNR, SSIM and LPIPS of image pairs, and the Fréchet distance (FID) of image sets.

Images are [n, height, width, channels]. n: generated images, m: real images, d: features that a classifier computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from compress.data.media import decode
from compress.numerics.calibration import mean_interval
from compress.numerics.statistics import Floats, IntervalEstimate
from compress.results.metrics import describe_metric
from compress.results.report import Measurement

if TYPE_CHECKING:
    from PIL import Image

SSIM_WINDOW = 11
"""Side of the Gaussian window of SSIM, in pixels."""
_MAX_LEVEL = 255
"""Largest value of an 8-bit channel."""
_BOOTSTRAP_SEED = 0
_EIGENVALUE_TOLERANCE = 1e-10
"""Eigenvalues below this share of the largest count as 0."""


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Convert images from 0 to 1 to uint8, rounded as diffusers does."""
    return (images * _MAX_LEVEL).round().astype(np.uint8)


def decode_images(values: Sequence[Mapping[str, object]], shape: tuple[int, int, int]) -> np.ndarray:
    """Decode an image column to [n, height, width, channels] uint8.

    Args:
        values: Cells of the column.
        shape: Channels, height and width of every decoded image.

    Raises:
        DataError: An image is broken.
    """
    channels, height, width = shape
    conversions: Counter[str] = Counter()
    # `decode` counts images that it converted to another color mode. The counts are not reported here.
    images = (decode(value, "L" if channels == 1 else "RGB", conversions) for value in values)
    return np.stack([np.asarray(fit_size(image, height, width)).reshape(height, width, -1) for image in images])


def fit_size(image: Image.Image, height: int, width: int) -> Image.Image:
    """Center a smaller image on black, or scale any other one to cover the size and crop it evenly."""
    from PIL import Image, ImageOps

    if image.height <= height and image.width <= width:
        canvas = Image.new(image.mode, (width, height))
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return canvas
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def mean_measurement(metric: str, values: np.ndarray, model: str = "", target: str = "") -> Measurement:
    """Return the mean of one value per image, with its interval.

    Args:
        metric: Name of the metric, which decides the unit.
        values: Value of each image, [n].
        model: Label of the model.
        target: Name of the target.
    """
    value, low, high = mean_interval(values, _BOOTSTRAP_SEED)
    bounds = {"low": low, "high": high} if len(values) > 1 else {}
    unit, raw = describe_metric(metric).unit, tuple(values.tolist())
    return Measurement(model=model, metric=metric, target=target, value=value, unit=unit, n=len(raw), raw=raw, **bounds)


def contrast_row(images: np.ndarray, model: str, target: str) -> Measurement:
    """Return the mean over images of the standard deviation of an image's values. It is near 0 for a blank image."""
    return mean_measurement("picture_contrast", images.reshape(len(images), -1).std(axis=1), model, target)


def similarity_rows(images: np.ndarray, reference: np.ndarray, model: str, target: str) -> list[Measurement]:
    """Return the mean PSNR to the reference images, and the mean SSIM of images that are large enough.

    Args:
        images: Generated images, uint8.
        reference: Images of the same prompts and noise, uint8.
        model: Label of the model.
        target: Name of the target.
    """
    rows = [mean_measurement("psnr_to_baseline", psnr(images, reference, _MAX_LEVEL), model, target)]
    if min(images.shape[1:3]) >= SSIM_WINDOW:
        rows.append(mean_measurement("ssim_to_baseline", ssim(images, reference, _MAX_LEVEL), model, target))
    return rows


def psnr(images: ArrayLike, reference: ArrayLike, data_range: float = 1.0) -> Floats:
    """Return the peak signal-to-noise ratio of each pair in decibels, [n]: 10 log10(data_range² / mean squared error).

    The squared error counts as at least 1/12 of a squared 8-bit step, the mean squared error of rounding to 8 bits.
    Equal images therefore have 58.9 dB instead of infinity.

    Args:
        images: Generated images.
        reference: Reference image of each generated image, of the same shape.
        data_range: Difference between the largest and the smallest possible value.

    Raises:
        ValueError: The images do not pair.
    """
    first, second = _pair_arrays(images, reference)
    mse = np.square(first - second).reshape(len(first), -1).mean(axis=1)
    return np.asarray(10 * np.log10(data_range**2 / np.maximum(mse, (data_range / _MAX_LEVEL) ** 2 / 12)), np.float64)


def ssim(images: ArrayLike, reference: ArrayLike, data_range: float = 1.0) -> Floats:
    """Return the structural similarity of each pair, [n], the mean over channels (Wang et al. 2004, equation 13).

    Means, variances and covariance are those of a Gaussian window of 11 x 11 pixels with a standard deviation of 1.5,
    at each position inside the image. K1 is 0.01, K2 0.03, as in section III-C of the paper.

    Raises:
        ValueError: The images do not pair, or are smaller than the window.
    """
    x, y = _pair_arrays(images, reference)
    if x.ndim != 4 or min(x.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"expected images of {SSIM_WINDOW} x {SSIM_WINDOW} pixels or more, found {list(x.shape)}")
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = _gaussian_window(x), _gaussian_window(y)
    variance_x = _gaussian_window(x**2) - mean_x**2
    variance_y = _gaussian_window(y**2) - mean_y**2
    covariance = _gaussian_window(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return np.asarray(similarity.reshape(len(x), -1).mean(axis=1), np.float64)


def perceptual_distance(layers: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> Floats:
    """Return the LPIPS distance of image pairs, [n] (Zhang et al. 2018, equation 1, all weights 1).

    At each position the channels are scaled to length 1. The squared distance is averaged over positions and summed
    over layers, so that it lies between 0 and 4 times the number of layers.

    Args:
        layers: Outputs of each layer of a network for the images, [n, channels, ...].
        reference: Outputs of the same layers for the reference images.

    Raises:
        ValueError: The layers do not pair.
    """
    if len(layers) != len(reference) or not layers:
        raise ValueError(f"expected the same layers of both, found {len(layers)} and {len(reference)}")
    total = np.zeros(len(layers[0]))
    for layer, reference_layer in zip(layers, reference, strict=True):
        # The small addend, also of the lpips package, avoids division by zero.
        first, second = (
            array / (np.linalg.norm(array, axis=1, keepdims=True) + 1e-10)
            for array in _pair_arrays(layer, reference_layer)
        )
        total += np.square(first - second).sum(axis=1).reshape(len(first), -1).mean(axis=1)
    return total


def _gaussian_window(images: Floats) -> Floats:
    """Return Gaussian-weighted means at each position of the window inside, [n, height - 10, width - 10, channels]."""
    from scipy.ndimage import correlate1d

    half = SSIM_WINDOW // 2
    weights = np.exp(-np.square(np.arange(-half, half + 1)) / (2 * 1.5**2))
    weights /= weights.sum()
    # The Gaussian window is separable, so two passes of one dimension each replace one of two dimensions.
    smoothed = correlate1d(correlate1d(images, weights, axis=1), weights, axis=2)
    return np.asarray(smoothed[:, half:-half, half:-half], np.float64)


def _pair_arrays(images: ArrayLike, reference: ArrayLike) -> tuple[Floats, Floats]:
    first, second = np.asarray(images, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if first.shape != second.shape or not first.size:
        raise ValueError(f"images must pair: {list(first.shape)} and {list(second.shape)}")
    return first, second


class Gaussian(NamedTuple):
    """Mean [d] and covariance [d, d] of features."""

    mean: Floats
    covariance: Floats


def fit_gaussian(features: ArrayLike) -> Gaussian:
    """Return mean and covariance (divided by n - 1) of features [n, d].

    Raises:
        ValueError: There are fewer than two rows, or values that are not finite.
    """
    rows = _check_features(features)
    return Gaussian(rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False)))


def gaussian_frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return the squared Fréchet distance of two normal distributions (Dowson and Landau 1982).

    It is |m - w|² + tr(C + S - 2 (C S)^½), where w and S are mean and covariance of ``first``, m and C those of
    ``second``. (C S)^½ has the same trace as (C^½ S C^½)^½, which is symmetric and therefore computed here.
    """
    root = _matrix_power(second.covariance, 0.5)
    eigenvalues = np.linalg.eigvalsh(root @ first.covariance @ root)
    # A trace of a matrix root is the sum of the roots of the eigenvalues. Rounding can make them slightly negative.
    between_means = float(np.square(first.mean - second.mean).sum())
    traces = float(np.trace(first.covariance) + np.trace(second.covariance))
    return max(between_means + traces - 2 * float(np.sqrt(np.maximum(eigenvalues, 0)).sum()), 0.0)


def frechet_distance(features: ArrayLike, reference: ArrayLike) -> float:
    """Return the Fréchet Inception distance of features [n, d] and [m, d] (Heusel et al. 2017, equation 6).

    The features may come from another network than Inception. The distance of few images is larger than that of many
    images of the same distribution, so compare only distances of equally many images.
    """
    return gaussian_frechet_distance(fit_gaussian(features), fit_gaussian(reference))


def frechet_interval(
    features: ArrayLike, reference: ArrayLike, seed: int, resamples: int = 200, confidence: float = 0.95
) -> IntervalEstimate:
    """Return `frechet_distance` with its bootstrap interval over the generated images.

    Args:
        features: Features of the generated images, [n, d].
        reference: Features of the real images, [m, d].
        seed: Seed of the resampling.
        resamples: Number of bootstrap resamples.
        confidence: Confidence of the interval.
    """
    rows, real = _check_features(features), fit_gaussian(reference)
    indices = np.random.default_rng(seed).integers(0, len(rows), (resamples, len(rows)))
    values = np.array([gaussian_frechet_distance(fit_gaussian(rows[chosen]), real) for chosen in indices])
    value = gaussian_frechet_distance(fit_gaussian(rows), real)
    # A resample has a larger distance than the sample, as the sample has a larger one than its distribution (Efron and
    # Tibshirani 1993, chapter 10). Subtracting this bias centers the percentiles on the distance.
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2]) - (values.mean() - value)
    return IntervalEstimate(value, min(value, max(float(low), 0.0)), max(value, float(high)))


def frechet_contributions(features: ArrayLike, reference: ArrayLike) -> Floats:
    """Return the contribution of each generated image to the Fréchet distance, [n]; their mean is the distance.

    To first order the distance is linear in the weight of each image, so that two models' distances can be paired image
    by image (influence function; Hampel 1974). T = C^½ (C^½ S C^½)^-½ C^½ maps the generated normal distribution (w, S)
    to the real one (m, C). The derivative of the distance by the weight of image x is 2 (w - m)·(x - w) +
    (x - w)ᵀ(I - T)(x - w) - tr((I - T) S).

    Raises:
        ValueError: There are no more images than features, so that the derivative is unknown.
    """
    rows, real = _check_features(features), fit_gaussian(reference)
    count, width = rows.shape
    if count <= width:
        raise ValueError(f"{count} images are too few for the contributions of each in {width} features")
    generated = fit_gaussian(rows)
    root = _matrix_power(real.covariance, 0.5)
    transport = root @ _matrix_power(root @ generated.covariance @ root, -0.5) @ root
    identity_minus_transport = np.eye(width) - transport
    centered = rows - generated.mean
    # Covariances are divided by n - 1. With this factor the mean of the contributions is exactly the distance.
    covariance_term = count / (count - 1) * np.einsum("nd,de,ne->n", centered, identity_minus_transport, centered)
    mean_term = 2 * centered @ (generated.mean - real.mean)
    trace = np.trace(identity_minus_transport @ generated.covariance)
    return np.asarray(gaussian_frechet_distance(generated, real) + mean_term + covariance_term - trace, np.float64)


def _matrix_power(matrix: Floats, exponent: float) -> Floats:
    """Return a power of a symmetric, positive semidefinite matrix. Eigenvalues of 0 stay 0."""
    values, vectors = np.linalg.eigh(matrix)
    positive = values > _EIGENVALUE_TOLERANCE * max(values[-1], 0)
    powers = np.where(positive, np.where(positive, values, 1.0) ** exponent, 0.0)
    return np.asarray((vectors * powers) @ vectors.T, np.float64)


def _check_features(features: ArrayLike) -> Floats:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"expected features of two images or more, found {list(rows.shape)}")
    if not np.isfinite(rows).all():
        raise ValueError("features hold NaN or infinity")
    return rows
