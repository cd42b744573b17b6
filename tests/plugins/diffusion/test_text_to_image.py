"""The task of drawing pictures: what prompts and rows become, and what is made of pictures."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from tiny_pipelines import TOKENS, pipeline_folder

from compress.data.media import media, media_type
from compress.plugins.diffusion.image_levels import as_levels, fitted
from compress.plugins.diffusion.sampling_settings import PromptProcessor, load_prompt_processor
from compress.plugins.diffusion.task import TASK
from compress.tasks.registry import get_task, infer_task
from compress.tasks.task import Examples
from compress.utils.errors import ModelError


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> PromptProcessor:
    return load_prompt_processor(pipeline_folder(tmp_path_factory.mktemp("pipeline")))


def encoded(levels: np.ndarray) -> object:
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return media(file.getvalue(), None)


def rows(*texts: str) -> pa.Table:
    pictures = [np.full((12, 14), 10 * number, np.uint8) for number in range(len(texts))]
    images = pa.array([encoded(picture) for picture in pictures], media_type())
    return pa.table({"image": images, "text": list(texts), "label": ["bag", "boot"] * (len(texts) // 2)})


def test_row_i_is_drawn_from_the_noise_of_seed_i(processor: PromptProcessor) -> None:
    examples = TASK.encode(rows("a bag", "dark boot"), processor, None, 99)
    batch = examples.batch([0, 1])
    assert batch["seed"].tolist() == [0, 1] and batch["input_ids"].shape == (2, TOKENS)
    for seed in (0, 1):
        drawn = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
        np.testing.assert_array_equal(batch["noise"][seed : seed + 1], drawn.numpy())
    assert examples.lengths().tolist() == [4, 4], "words and the tokens about them"
    assert examples.note == ""


def test_what_is_cut_is_said(processor: PromptProcessor) -> None:
    examples = TASK.encode(rows("a bag", " ".join(["dark"] * 40)), processor, None, 99)
    assert examples.note == f"1 of 2 prompts are cut at {TOKENS} tokens"
    assert examples.lengths().tolist() == [4, 42]


def test_real_pictures_lie_in_the_middle_of_black(processor: PromptProcessor) -> None:
    examples = TASK.encode(rows("a bag", "dark boot"), processor, None, 99)
    assert examples.labels is not None and examples.labels.shape == (2, 16, 16, 1)
    expected = np.zeros((16, 16), np.uint8)
    expected[2:14, 1:15] = 10
    np.testing.assert_array_equal(examples.labels[1, :, :, 0], expected)


def test_larger_pictures_are_scaled_and_cropped_evenly() -> None:
    wide = np.zeros((32, 64), np.uint8)
    wide[:, 16:48] = 200
    cropped = np.asarray(fitted(Image.fromarray(wide), 16, 16))
    assert cropped.shape == (16, 16) and (cropped[:, 2:-2] == 200).all()


def test_levels_are_those_that_diffusers_rounds_to() -> None:
    from diffusers.image_processor import VaeImageProcessor

    pictures = np.random.default_rng(0).random((2, 4, 4, 3), dtype=np.float32)
    expected = [np.asarray(picture) for picture in VaeImageProcessor.numpy_to_pil(pictures)]
    np.testing.assert_array_equal(as_levels(pictures), np.stack(expected))


def test_pictures_keep_the_names_of_their_classes(processor: PromptProcessor) -> None:
    examples = TASK.encode(rows("a bag", "dark boot"), processor, None, 99)
    pictures = np.stack([np.full((16, 16, 1), 0.5, np.float32), np.zeros((16, 16, 1), np.float32)])
    collected = TASK.collect({"pictures": pictures}, examples, [1, 0])
    assert collected["class"].tolist() == ["boot", "bag"]
    assert collected["pictures"].dtype == np.uint8 and collected["pictures"][0].max() == 128


def test_a_picture_of_one_gray_has_no_contrast_and_equal_ones_are_at_no_distance() -> None:
    half = np.zeros((2, 16, 16, 1), np.uint8)
    half[1, :8] = 100
    (contrast,) = TASK.measure({"pictures": half}, None, "final", "cpu")
    assert contrast.raw == (0.0, 50.0)
    nearness = {row.metric: row for row in TASK.compare({"pictures": half}, {"pictures": half + 10}, "final", "cpu")}
    # 10 log10(255² / 10²)
    assert nearness["psnr_to_baseline"].value == pytest.approx(28.1308, abs=1e-3)


def test_a_pipeline_tells_its_task_and_another_processor_is_refused() -> None:
    assert infer_task({"architectures": ["StableDiffusionPipeline"]}, False) == "text-to-image"
    assert get_task("text-to-image") is TASK
    with pytest.raises(ModelError, match="does not prepare prompts"):
        TASK.encode(rows("a bag", "dark boot"), object(), None, 99)


def test_a_subset_keeps_its_noise(processor: PromptProcessor) -> None:
    examples: Examples = TASK.encode(rows("a bag", "dark boot"), processor, None, 99)
    assert examples.subset([1]).batch([0])["seed"].tolist() == [1]
