"""Pictures of the loop here against those of diffusers' own pipelines, with the same parts and the same noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import pipeline_folder

from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.plugins.diffusion.pipeline_model import GeneratorModel, load_pipeline
from compress.plugins.diffusion.sampling_settings import Sampling
from compress.plugins.diffusion.torch_session import torch_sampler
from compress.utils.errors import InputError, StageError

PROMPTS = ["a picture of a bag", "the dark boot"]
SEEDS = [5, 6]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GeneratorModel:
    return load_pipeline(pipeline_folder(tmp_path_factory.mktemp("pipeline")))


def noise_of(model: GeneratorModel) -> np.ndarray:
    return np.stack([model.processor.noise(seed) for seed in SEEDS])


def of_diffusers(model: GeneratorModel, steps: int, guidance: float) -> np.ndarray:
    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pictures: np.ndarray = pipeline(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.from_numpy(noise_of(model)),
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="np",
    ).images
    return pictures


SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "LCMScheduler": {"clip_sample": False},
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_those_of_diffusers(model: GeneratorModel, name: str, guidance: float) -> None:
    scheduler = getattr(diffusers, name)(**SCHEDULERS[name], steps_offset=1)
    model = replace(model, scheduler=scheduler, sampling=Sampling(5, guidance))
    expected = of_diffusers(model, 5, guidance)
    pictures = torch_sampler(model).draw(model.processor.ids(PROMPTS), noise_of(model), SEEDS)
    assert pictures.shape == expected.shape == (2, 16, 16, 1)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(pictures * 255, expected * 255, atol=1)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_that_only_adds_up_is_asked_once(
    model: GeneratorModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = getattr(diffusers, name)(**SCHEDULERS[name])
    sampler = torch_sampler(replace(model, scheduler=scheduler, sampling=Sampling(6, 2.0)))
    ids, noise = model.processor.ids(PROMPTS), noise_of(model)
    first = sampler.denoised(ids, noise)
    asked: list[Any] = []
    monkeypatch.setattr(type(scheduler), "step", lambda *given, **named: asked.append(given))
    np.testing.assert_array_equal(sampler.denoised(ids, noise), first)
    assert not asked
    monkeypatch.undo()
    denoise = replace(sampler)
    monkeypatch.setattr(type(denoise), "_table", None)
    np.testing.assert_allclose(denoise.denoised(ids, noise), first, rtol=0, atol=1e-4 * np.abs(first).max())


def test_a_denoiser_that_is_told_of_the_guidance_draws_as_in_diffusers(tmp_path: Path) -> None:
    guided_model = load_pipeline(pipeline_folder(tmp_path, time_cond_proj_dim=8))
    index = {**guided_model.index, "_class_name": "LatentConsistencyModelPipeline"}
    model = replace(guided_model, index=index, scheduler=diffusers.LCMScheduler(), sampling=Sampling(4, 8.5))
    expected = of_diffusers(model, 4, 8.5)
    pictures = torch_sampler(model).draw(model.processor.ids(PROMPTS), noise_of(model), SEEDS)
    np.testing.assert_allclose(pictures * 255, expected * 255, atol=1)
    less = torch_sampler(replace(model, sampling=Sampling(4, 1.5))).draw(
        model.processor.ids(PROMPTS), noise_of(model), SEEDS
    )
    assert np.abs(less - expected).max() > 0.01


def test_a_part_that_gives_nan_is_named_with_its_step(model: GeneratorModel) -> None:
    sampler, calls = torch_sampler(replace(model, sampling=Sampling(4, 1.0))), []

    def denoise(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append(1)
        return {"out_sample": np.full_like(batch["sample"], np.nan if len(calls) == 3 else 0.0)}

    with pytest.raises(StageError, match="step 3 of 4"):
        replace(sampler, denoise=denoise).draw(model.processor.ids(PROMPTS), noise_of(model))


@pytest.mark.parametrize("shape", [(1, 4, 7, 8), (1, 3, 8, 8), (1, 4, 0, 8), (4, 8, 8)])
def test_sizes_that_the_parts_cannot_take_are_refused(model: GeneratorModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="makes no picture") as refused:
        torch_sampler(model).draw(model.processor.ids(PROMPTS[:1]), np.zeros(shape, np.float32))
    assert "multiples of 4" in str(refused.value)


def test_a_picture_is_the_same_alone_and_among_others(model: GeneratorModel) -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    sampler = torch_sampler(replace(model, scheduler=scheduler, sampling=Sampling(4, 3.0)))
    ids, noise = model.processor.ids(PROMPTS), noise_of(model)
    both, second = sampler.draw(ids, noise, SEEDS), sampler.draw(ids[1:], noise[1:], SEEDS[1:])
    np.testing.assert_allclose(both[1:], second, atol=1e-5)


def test_steps_are_told(model: GeneratorModel) -> None:
    steps_seen: list[tuple[int, np.ndarray]] = []
    sampler = torch_sampler(replace(model, sampling=Sampling(3, 2.0)))
    last = sampler.denoised(
        model.processor.ids(PROMPTS), noise_of(model), on_step=lambda step, latents: steps_seen.append((step, latents))
    )
    assert [step for step, _ in steps_seen] == [1, 2, 3]
    np.testing.assert_array_equal(steps_seen[-1][1], last)
    assert len({latents.tobytes() for _, latents in steps_seen}) == 3


def test_prompts_that_are_too_long_are_cut_as_diffusers_cuts_them(model: GeneratorModel) -> None:
    prompts = ["a bag", " ".join(["dark"] * 40)]
    assert model.processor.cut(prompts) == [1]
    expected = model.pipeline().tokenizer(prompts, padding="max_length", max_length=12, truncation=True)["input_ids"]
    np.testing.assert_array_equal(model.processor.ids(prompts), expected)


def test_steps_that_a_scheduler_cannot_make_are_refused(model: GeneratorModel) -> None:
    sampler = torch_sampler(replace(model, sampling=Sampling(2000, 1.0)))
    with pytest.raises(InputError, match="DDIMScheduler cannot make 2000 steps"):
        sampler.draw(model.processor.ids(PROMPTS), noise_of(model))


def test_what_is_saved_draws_the_same(model: GeneratorModel, tmp_path: Path) -> None:
    with_sampling = replace(model, sampling=Sampling(2, 1.5))
    with_sampling.save(tmp_path)
    again = load_pipeline(tmp_path)
    assert again.sampling == Sampling(2, 1.5)
    expected = torch_sampler(with_sampling).draw(model.processor.ids(PROMPTS), noise_of(model))
    pictures = torch_sampler(again).draw(again.processor.ids(PROMPTS), noise_of(again))
    np.testing.assert_allclose(pictures, expected, atol=1e-5)
    opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert type(opened).__name__ == "StableDiffusionPipeline"


def test_the_torch_target_draws_from_a_folder(model: GeneratorModel, tmp_path: Path) -> None:
    with_sampling = replace(model, sampling=Sampling(2, 1.5))
    with_sampling.save(tmp_path)
    session = get_runtime("torch").open(tmp_path, TARGETS["torch"], threads=1)
    ids, noise = model.processor.ids(PROMPTS), noise_of(model)
    pictures = session.predict({"input_ids": ids, "noise": noise, "seed": np.array(SEEDS)})["pictures"]
    np.testing.assert_allclose(pictures, torch_sampler(with_sampling).draw(ids, noise, SEEDS), atol=1e-5)
    assert session.settings["steps"] == 2 and session.settings["scheduler"] == "DDIMScheduler"
