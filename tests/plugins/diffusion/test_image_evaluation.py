"""Tests of image metrics against closed forms, scipy's matrix square root, finite differences and explicit loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from test_diffusion_runs import ROWS, write_recipe
from tiny_pictures import write_judge, write_preparation
from tiny_pipelines import WORDS, pipeline_folder
from tiny_run import load
from transformers import RegNetForImageClassification, ViTConfig, ViTForImageClassification

from compress.formats.targets import REFERENCE
from compress.pipeline.measurements import Findings, measure_answers
from compress.pipeline.run_checks import check_run
from compress.pipeline.runner import StageRunner
from compress.pipeline.target_session import TargetSession
from compress.plugins.diffusion.image_metrics import (
    Gaussian,
    fit_gaussian,
    frechet_contributions,
    frechet_distance,
    frechet_interval,
    gaussian_frechet_distance,
    perceptual_distance,
    psnr,
    ssim,
)
from compress.plugins.diffusion.judge import ImageClassifier, ImageEvaluation, check_classes
from compress.results.report import BASELINE, FINAL, Measurement
from compress.utils.errors import DataError, InputError
from compress.utils.progress import SilentProgress

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")


def _features(seed: int, count: int, width: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(seed + 100).normal(size=(width, width)) / math.sqrt(width)
    return scale * generator.normal(size=(count, width)) @ mix + shift


def test_frechet_distance_equals_formula_with_scipy_sqrtm() -> None:
    generated, real = _features(1, 300, 6, 1.3, 0.2), _features(2, 400, 6)
    covariances = np.cov(generated, rowvar=False), np.cov(real, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(generated.mean(0) - real.mean(0)).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(generated, real) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(generated, generated) == pytest.approx(0, abs=1e-9)


def test_constant_feature_adds_only_its_squared_mean_difference() -> None:
    generated, real = (
        np.column_stack([_features(seed, 50, 3), np.full(50, level)]) for seed, level in ((1, 2.0), (2, 5.0))
    )
    assert frechet_distance(generated, real) == pytest.approx(frechet_distance(generated[:, :3], real[:, :3]) + 9)


def _weighted(rows: np.ndarray, weights: np.ndarray) -> Gaussian:
    mean = weights @ rows
    away = rows - mean
    return Gaussian(mean, len(rows) / (len(rows) - 1) * (away * weights[:, None]).T @ away)


def test_contributions_equal_derivative_by_image_weight() -> None:
    generated, real = _features(3, 40, 4, 1.5, 0.5), _features(4, 200, 4)
    shares = frechet_contributions(generated, real)
    value = frechet_distance(generated, real)
    assert shares.mean() == pytest.approx(value)
    even, step = np.full(40, 1 / 40), 1e-5
    for picture in (0, 7, 39):
        toward = np.eye(40)[picture] - even
        ahead, behind = (
            gaussian_frechet_distance(_weighted(generated, even + sign * step * toward), fit_gaussian(real))
            for sign in (1.0, -1.0)
        )
        assert shares[picture] - value == pytest.approx((ahead - behind) / (2 * step), rel=1e-4)
    with pytest.raises(ValueError, match="4 images"):
        frechet_contributions(generated[:4], real)


def test_bootstrap_interval_width_matches_delta_method() -> None:
    generated, real = _features(5, 400, 3, 1.4, 0.4), _features(6, 400, 3)
    value, low, high = frechet_interval(generated, real, seed=0, resamples=400)
    half = 1.96 * frechet_contributions(generated, real).std(ddof=1) / math.sqrt(400)
    assert value == pytest.approx(frechet_distance(generated, real))
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert (high + low) / 2 == pytest.approx(value, abs=0.3 * half)


def test_interval_contains_distance_caused_by_small_samples() -> None:
    # With few images and many features resamples have larger distances: 60 rows of 15 features, same distribution.
    mix = np.random.default_rng(11).normal(size=(15, 15))
    generated, real = (
        np.random.default_rng(seed).normal(size=(count, 15)) @ mix for seed, count in ((12, 60), (13, 2000))
    )
    value, low, high = frechet_interval(generated, real, seed=0)
    drawn = np.random.default_rng(1).integers(0, 60, (100, 60))
    assert min(frechet_distance(generated[rows], real) for rows in drawn) > value
    assert 0.2 < (value - low) / (high - low) < 0.8


def test_non_finite_features_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        fit_gaussian(np.array([[1.0, np.nan], [1.0, 2.0]]))


def _pictures(seed: int, count: int = 3, side: int = 14, channels: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).random((count, side, side, channels))


def _ssim_of_one(first: np.ndarray, second: np.ndarray, span: float) -> float:
    """Return the SSIM of one channel after Wang et al. (2004), equations 13 to 17, window by window."""
    offsets = range(-5, 6)
    window = np.array([[math.exp(-(x * x + y * y) / (2 * 1.5**2)) for x in offsets] for y in offsets])
    window /= window.sum()
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    values = []
    for row in range(first.shape[0] - 10):
        for column in range(first.shape[1] - 10):
            a, b = (picture[row : row + 11, column : column + 11] for picture in (first, second))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            variance_a, variance_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            values.append(luminance * (2 * covariance + c2) / (variance_a + variance_b + c2))
    return float(np.mean(values))


def test_ssim_equals_mean_over_windows() -> None:
    first, second = _pictures(0), 0.7 * _pictures(0) + 0.3 * _pictures(1)
    expected = [
        np.mean([_ssim_of_one(a[..., channel], b[..., channel], 1.0) for channel in range(2)])
        for a, b in zip(first, second, strict=True)
    ]
    assert ssim(first, second) == pytest.approx(expected, abs=1e-12)
    assert ssim(255 * first, 255 * second, 255.0) == pytest.approx(expected, abs=1e-10)


def test_psnr_of_known_errors() -> None:
    first = np.zeros((2, 4, 4, 1))
    second = np.stack([np.full((4, 4, 1), 0.1), np.zeros((4, 4, 1))])
    second[1, 0, 0] = 1.0  # one pixel of sixteen
    assert psnr(second, first) == pytest.approx([20.0, 10 * math.log10(16)])
    assert psnr(255 * second, 255 * first, 255.0) == pytest.approx([20.0, 10 * math.log10(16)])


def test_psnr_of_equal_images_is_bounded_by_8_bit_rounding() -> None:
    levels = np.arange(0, 256, 0.001) / 255
    rounding = np.square(np.round(levels * 255) / 255 - levels).mean()
    result = psnr(_pictures(0), _pictures(0))
    assert result == pytest.approx([10 * math.log10(1 / rounding)] * 3, abs=0.05)


def test_perceptual_distance_equals_explicit_loops() -> None:
    generator = np.random.default_rng(2)
    shapes = [(3, 5, 4, 4), (3, 7, 2, 2), (3, 6)]
    first, second = ([generator.normal(size=shape) for shape in shapes] for _ in range(2))
    expected = []
    for picture in range(3):
        total = 0.0
        for a, b in zip(first, second, strict=True):
            places = [(a[picture].reshape(a.shape[1], -1)[:, p], b[picture].reshape(a.shape[1], -1)[:, p])
                      for p in range(int(np.prod(a.shape[2:], initial=1)))]  # fmt: skip
            total += np.mean([np.sum((x / np.linalg.norm(x) - y / np.linalg.norm(y)) ** 2) for x, y in places])
        expected.append(total)
    assert perceptual_distance(first, second) == pytest.approx(expected)
    assert perceptual_distance(first, [3.0 * layer for layer in first]) == pytest.approx([0, 0, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("measure", "first", "second", "words"),
    [
        (psnr, _pictures(0, count=3), _pictures(0, count=2), "pair"),
        (ssim, _pictures(0, side=10), _pictures(1, side=10), "11 x 11"),
        (perceptual_distance, [np.ones((1, 2))], [], "same layers"),
    ],
)
def test_incompatible_images_are_refused(measure: Any, first: Any, second: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        measure(first, second)


CLASSES = ("coat", "bag", "boot")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a two-stage RegNet classifier with random weights and return its folder."""
    judge_folder = tmp_path_factory.mktemp("judge")
    write_judge(judge_folder, CLASSES, mean=0.25)
    return judge_folder


@pytest.fixture(scope="module")
def judge(folder: Path) -> ImageClassifier:
    return ImageClassifier(folder)


def random_pictures(seed: int, count: int = 70) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 1), dtype=np.uint8)


def test_classifier_outputs_equal_those_of_transformers(judge: ImageClassifier, folder: Path) -> None:
    pictures = random_pictures(0)
    module = RegNetForImageClassification.from_pretrained(folder).eval()
    pixels = torch.from_numpy((pictures / 255 - 0.25) / 0.5).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        outputs = module(pixel_values=pixels, output_hidden_states=True)
        features = module.regnet(pixels).pooler_output.flatten(1)
    judged_features, seen = judge.features_and_classes(pictures)
    assert np.allclose(judged_features, features.numpy(), atol=1e-5)
    assert seen == [CLASSES[class_id] for class_id in outputs.logits.argmax(1).tolist()]
    layers = [np.concatenate(parts) for parts in zip(*(batch.layers for batch in judge.outputs(pictures)), strict=True)]
    assert len(layers) == len(outputs.hidden_states)
    for layer, state in zip(layers, outputs.hidden_states, strict=True):
        assert np.allclose(layer, state.numpy(), atol=1e-5)


def test_vision_transformer_tokens_are_spatial_positions(tmp_path: Path) -> None:
    config = ViTConfig(
        num_channels=1, image_size=16, patch_size=8, hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, id2label={0: "coat", 1: "bag"},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    write_preparation(tmp_path, 0.5, 0.5)
    (seen,) = ImageClassifier(tmp_path).outputs(random_pictures(1, 3))
    assert seen.features.shape == (3, 12)
    assert {layer.shape for layer in seen.layers} == {(3, 12, 5)}  # four patches and the class token


def _rows(
    folder: Path, pictures: np.ndarray, classes: Any = None, real: Any = None, usual: Any = None
) -> dict[str, Measurement]:
    return {row.metric: row for row in ImageEvaluation(folder, classes, real, usual).measurements(pictures)}


def test_real_images_have_zero_distances(judge: ImageClassifier, folder: Path) -> None:
    pictures = random_pictures(2)
    seen = judge.features_and_classes(pictures)[1]
    wrong = [CLASSES[(CLASSES.index(name) + (picture_number < 7)) % 3] for picture_number, name in enumerate(seen)]
    rows = _rows(folder, pictures, wrong, pictures, pictures)
    assert rows["prompt_accuracy"].value == pytest.approx(0.9)
    assert rows["frechet_distance"].value == pytest.approx(0, abs=1e-6)
    assert rows["perceptual_distance_to_baseline"].value == pytest.approx(0, abs=1e-9)
    assert all(len(row.raw or ()) == 70 for row in rows.values())


def test_contributions_average_to_the_frechet_distance(folder: Path) -> None:
    dark = (random_pictures(3) // 3).astype(np.uint8)
    rows = _rows(folder, dark, None, random_pictures(4), random_pictures(5))
    row = rows["frechet_distance"]
    assert "prompt_accuracy" not in rows and row.value > 0.005
    assert np.mean(row.raw or ()) == pytest.approx(row.value)
    assert row.low is not None and row.high is not None and row.low < row.value < row.high
    assert rows["perceptual_distance_to_baseline"].value > 0


def test_perceptual_distance_to_baseline_uses_all_layers(judge: ImageClassifier, folder: Path) -> None:
    first, second = random_pictures(10, 40), random_pictures(11, 40)
    distance = _rows(folder, first, usual=second)["perceptual_distance_to_baseline"]
    both = [list(judge.outputs(pictures)) for pictures in (first, second)]
    layers = [[np.concatenate(parts) for parts in zip(*(batch.layers for batch in seen), strict=True)] for seen in both]
    assert distance.raw == pytest.approx(perceptual_distance(*layers))


def test_fewer_images_than_features_give_no_interval(folder: Path) -> None:
    few = random_pictures(6, 4)
    rows = _rows(folder, few, real=random_pictures(7, 4))
    assert rows["frechet_distance"].low is None and rows["frechet_distance"].raw is None
    assert list(_rows(folder, few, usual=few)) == ["perceptual_distance_to_baseline"]


def test_class_unknown_to_the_classifier_is_refused(folder: Path) -> None:
    check_classes(folder, CLASSES)
    with pytest.raises(DataError, match="no class 'hat'"):
        check_classes(folder, ["coat", "hat"])


KINDS = tuple(WORDS[3:5])


def _runner(folder: Path, names: tuple[str, ...]) -> StageRunner:
    folder.mkdir(exist_ok=True)
    write_judge(folder / "judge", names, widths=(4, 2))
    options = {"judge": "judge", "pictures": 2}
    slices = [{"column": "label", "min_rows": 1}]
    recipe = load(write_recipe(folder, stages=[{"onnx": {}}], slices=slices, evaluation=options, targets=["torch"]))
    return StageRunner(recipe, folder, folder / "artifacts", SilentProgress())


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """Evaluate a pipeline, the same pipeline again, and one with other weights and fewer sampling steps."""
    folder = tmp_path_factory.mktemp("judged")
    runner = _runner(folder, KINDS)
    other = pipeline_folder(folder / "other", seed=3)
    (other / "sampling_config.json").write_text('{"num_inference_steps": 2, "guidance_scale": 1.0}')
    artifacts = {BASELINE: runner.inputs.start, "same": runner.inputs.start, FINAL: runner.inputs.resolve(str(other))}
    findings = Findings()
    measure_answers(findings, TargetSession(runner, REFERENCE, artifacts))
    return findings


def _row(findings: Findings, model: str, metric: str) -> Measurement:
    (row,) = (row for row in findings.measurements if (row.model, row.metric) == (model, metric))
    return row


def test_every_model_is_evaluated_on_every_row(findings: Findings) -> None:
    for label in (BASELINE, "same", FINAL):
        seen, distance = (_row(findings, label, metric) for metric in ("prompt_accuracy", "frechet_distance"))
        assert seen.n == distance.n == ROWS["test"] and seen.raw is not None and distance.raw is not None
        parts = [_row(findings, label, f"prompt_accuracy[label={kind}]") for kind in KINDS]
        assert sum(part.n for part in parts) == ROWS["test"]
        assert sum(part.value * part.n for part in parts) == pytest.approx(sum(seen.raw))
    far = _row(findings, FINAL, "perceptual_distance_to_baseline").value
    assert _row(findings, "same", "perceptual_distance_to_baseline").value < 1e-9 < far
    assert [_row(findings, label, "sampling_steps").value for label in (BASELINE, FINAL)] == [3, 2]
    near, apart = (_row(findings, label, "ssim_to_baseline").value for label in ("same", FINAL))
    assert near == pytest.approx(1) and apart < 0.99


def test_first_rows_are_shown_as_generated_by_every_model(findings: Findings) -> None:
    shown = {(picture.model, picture.seed): picture for picture in findings.pictures}
    assert set(shown) == {(model, seed) for model in (BASELINE, "same", FINAL) for seed in (0, 1)}
    assert shown[("same", 0)].png == shown[(BASELINE, 0)].png != shown[(FINAL, 0)].png
    assert shown[(BASELINE, 0)].difference is None and shown[("same", 0)].levels == 0
    assert (shown[(FINAL, 1)].levels or 0) > 0 and shown[(FINAL, 1)].difference


def test_sampling_paths_start_from_the_same_noise(findings: Findings) -> None:
    same, final = findings.drift
    assert (same.model, same.steps, len(same.times)) == ("same", 3, 4)
    assert max(same.typical) == 0 and same.parted is None
    assert (final.model, final.steps, final.times[-1]) == (FINAL, 2, -1)
    assert final.typical[-1] > 0.1 and final.parted is not None


def test_classifier_of_other_classes_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="knows no class"):
        check_run(_runner(tmp_path / "other", ("hat", "glove")))
