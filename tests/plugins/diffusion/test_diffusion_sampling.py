"""Tests of the sampling loop: images and latents against diffusers' pipelines with the same components and noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from tiny_pipelines import COSINE, denoiser, pipeline_folder

from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.plugins.diffusion.evals import FINISHED, SamplingPath, drift, sampling_path
from compress.plugins.diffusion.pipeline_model import GeneratorModel, Sampling, load_pipeline
from compress.plugins.diffusion.sampler import DiffusionSampler, LatentSpace, torch_sampler
from compress.plugins.diffusion.scheduler import (
    CANDIDATES,
    SchedulerChoice,
    build_scheduler,
    rank_schedulers,
)
from compress.plugins.diffusion.scheduler_table import build_scheduler_table
from compress.utils.errors import InputError, ModelError, StageError

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

PROMPTS = ["a picture of a bag", "the dark boot"]
SEEDS = [5, 6]


def noise_of(generator: GeneratorModel) -> np.ndarray:
    return np.stack([generator.processor.noise(seed) for seed in SEEDS])


def of_diffusers(generator: GeneratorModel, steps: int, guidance: float) -> np.ndarray:
    pipeline = generator.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.from_numpy(noise_of(generator)),
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="np",
    ).images


def drawn(generator: GeneratorModel, seeds: list[int] | None = None) -> np.ndarray:
    return torch_sampler(generator).generate(generator.processor.ids(PROMPTS), noise_of(generator), seeds)


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
def test_images_equal_those_of_diffusers(generator: GeneratorModel, name: str, guidance: float) -> None:
    scheduler = getattr(diffusers, name)(**SCHEDULERS[name], steps_offset=1)
    generator = replace(generator, scheduler=scheduler, sampling=Sampling(5, guidance))
    expected = of_diffusers(generator, 5, guidance)
    pictures = drawn(generator, SEEDS)
    assert pictures.shape == expected.shape == (2, 16, 16, 1)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(pictures * 255, expected * 255, atol=1)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_linear_scheduler_is_called_once(generator: GeneratorModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = getattr(diffusers, name)(**SCHEDULERS[name])
    sampler = torch_sampler(replace(generator, scheduler=scheduler, sampling=Sampling(6, 2.0)))
    ids, noise = generator.processor.ids(PROMPTS), noise_of(generator)
    first = sampler.sample_latents(ids, noise)
    asked: list[Any] = []
    monkeypatch.setattr(type(scheduler), "step", lambda *given, **named: asked.append(given))
    np.testing.assert_array_equal(sampler.sample_latents(ids, noise), first)
    assert not asked
    monkeypatch.undo()
    denoise = replace(sampler)
    monkeypatch.setattr(type(denoise), "_table", None)
    np.testing.assert_allclose(denoise.sample_latents(ids, noise), first, rtol=0, atol=1e-4 * np.abs(first).max())


def test_guidance_conditioned_denoiser_equals_diffusers(tmp_path: Path) -> None:
    guided_model = load_pipeline(pipeline_folder(tmp_path, time_cond_proj_dim=8))
    index = {**guided_model.index, "_class_name": "LatentConsistencyModelPipeline"}
    generator = replace(guided_model, index=index, scheduler=diffusers.LCMScheduler(), sampling=Sampling(4, 8.5))
    expected = of_diffusers(generator, 4, 8.5)
    np.testing.assert_allclose(drawn(generator, SEEDS) * 255, expected * 255, atol=1)
    assert np.abs(drawn(replace(generator, sampling=Sampling(4, 1.5)), SEEDS) - expected).max() > 0.01


def test_nan_error_names_part_and_step(generator: GeneratorModel) -> None:
    sampler, calls = torch_sampler(replace(generator, sampling=Sampling(4, 1.0))), []

    def denoise(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append(1)
        return {"out_sample": np.full_like(batch["sample"], np.nan if len(calls) == 3 else 0.0)}

    with pytest.raises(StageError, match="step 3 of 4"):
        replace(sampler, denoise=denoise).generate(generator.processor.ids(PROMPTS), noise_of(generator))


@pytest.mark.parametrize("shape", [(1, 4, 7, 8), (1, 3, 8, 8), (1, 4, 0, 8), (4, 8, 8)])
def test_unsupported_image_sizes_are_refused(generator: GeneratorModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="makes no image") as refused:
        torch_sampler(generator).generate(generator.processor.ids(PROMPTS[:1]), np.zeros(shape, np.float32))
    assert "multiples of 4" in str(refused.value)


def test_image_does_not_depend_on_its_batch(generator: GeneratorModel) -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    sampler = torch_sampler(replace(generator, scheduler=scheduler, sampling=Sampling(4, 3.0)))
    ids, noise = generator.processor.ids(PROMPTS), noise_of(generator)
    both, second = sampler.generate(ids, noise, SEEDS), sampler.generate(ids[1:], noise[1:], SEEDS[1:])
    np.testing.assert_allclose(both[1:], second, atol=1e-5)


def test_latents_of_each_step_are_passed_to_the_callback(generator: GeneratorModel) -> None:
    seen: dict[int, np.ndarray] = {}
    sampler = torch_sampler(replace(generator, sampling=Sampling(3, 2.0)))
    last = sampler.sample_latents(generator.processor.ids(PROMPTS), noise_of(generator), on_step=seen.__setitem__)
    assert list(seen) == [1, 2, 3]
    np.testing.assert_array_equal(seen[3], last)
    assert len({latents.tobytes() for latents in seen.values()}) == 3


def test_long_prompts_are_truncated_as_in_diffusers(generator: GeneratorModel) -> None:
    prompts = ["a bag", " ".join(["dark"] * 40)]
    assert generator.processor.truncated(prompts) == [1]
    expected = generator.pipeline().tokenizer(prompts, padding="max_length", max_length=12, truncation=True)
    np.testing.assert_array_equal(generator.processor.ids(prompts), expected["input_ids"])


def test_unsupported_step_counts_are_refused(generator: GeneratorModel) -> None:
    with pytest.raises(InputError, match="DDIMScheduler cannot make 2000 steps"):
        drawn(replace(generator, sampling=Sampling(2000, 1.0)))


def test_saved_pipeline_generates_the_same_images(generator: GeneratorModel, tmp_path: Path) -> None:
    with_sampling = replace(generator, sampling=Sampling(2, 1.5))
    with_sampling.save(tmp_path)
    again, expected = load_pipeline(tmp_path), drawn(with_sampling)
    assert again.sampling == Sampling(2, 1.5)
    np.testing.assert_allclose(drawn(again), expected, atol=1e-5)
    opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert type(opened).__name__ == "StableDiffusionPipeline"
    session = get_runtime("torch").open(tmp_path, TARGETS["torch"], threads=1)
    batch = {"input_ids": again.processor.ids(PROMPTS), "noise": noise_of(again), "seed": np.array(SEEDS)}
    np.testing.assert_allclose(session.predict(batch)["pictures"], expected, atol=1e-5)
    assert session.settings["steps"] == 2 and session.settings["scheduler"] == "DDIMScheduler"


LINEAR: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def own(**fields: Any) -> Any:
    return diffusers.DDPMScheduler(**LINEAR, clip_sample=False, **fields)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("choice", CANDIDATES, ids=str)
@pytest.mark.parametrize("steps", [50, 4])
def test_tried_schedulers_keep_noise_levels_and_prediction_type(kind: str, choice: SchedulerChoice, steps: int) -> None:
    base = own(prediction_type=kind)
    fitted = build_scheduler(base, choice, steps)
    assert type(fitted).__name__ == choice.scheduler and fitted.config.prediction_type == kind
    torch.testing.assert_close(fitted.alphas_cumprod, base.alphas_cumprod)
    assert fitted.config.timestep_spacing == choice.fields["timestep_spacing"]


@pytest.mark.parametrize(
    ("base", "choice", "steps", "words"),
    [
        ({}, SchedulerChoice("DDIMSchedular"), 10, "no scheduler 'DDIMSchedular'"),
        ({}, SchedulerChoice("LCMScheduler"), 4, "LCMScheduler does not fit"),
        ({}, SchedulerChoice("FlowMatchEulerDiscreteScheduler"), 4, "does not fit"),
        ({"prediction_type": "sample"}, SchedulerChoice("PNDMScheduler"), 10, "does not fit"),
        ({}, SchedulerChoice("PNDMScheduler", {"timestep_spacing": "karras"}), 10, "karras"),
        ({}, SchedulerChoice("DDIMScheduler", {"use_karras_sigmas": True}), 10, "has no use_karras_sigmas"),
        ({}, SchedulerChoice("DDIMScheduler"), 1001, "1001|1000"),
        ({"rescale_betas_zero_snr": True}, SchedulerChoice("PNDMScheduler"), 10, "noise levels"),
    ],
)
def test_incompatible_scheduler_is_refused_with_the_reason(
    base: dict[str, Any], choice: SchedulerChoice, steps: int, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        build_scheduler(own(**base), choice, steps)


def test_consistency_model_keeps_its_scheduler() -> None:
    lcm = diffusers.LCMScheduler(**LINEAR, original_inference_steps=50)
    assert type(build_scheduler(lcm, SchedulerChoice("LCMScheduler"), 4)) is diffusers.LCMScheduler
    with pytest.raises(InputError, match="DDIMScheduler does not fit"):
        build_scheduler(lcm, SchedulerChoice("DDIMScheduler"), 4)
    with pytest.raises(InputError, match="smaller"):
        build_scheduler(lcm, SchedulerChoice("LCMScheduler"), 51)


def test_schedulers_are_ranked_by_error_and_failures_are_listed() -> None:
    names = ("DDIMScheduler", "LCMScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler")
    measures = {"DDIMScheduler": 2.0, "UniPCMultistepScheduler": 1.0}
    choices = [SchedulerChoice(name) for name in names]
    best, tried = rank_schedulers(own(), 4, lambda trial: measures[type(trial).__name__], choices)
    assert type(best).__name__ == "UniPCMultistepScheduler"
    assert [trial.error for trial in tried] == [1.0, 2.0, None, None]
    assert "LCMScheduler does not fit" in tried[2].reason and "more than once" in tried[3].reason


SHAPE = (2, 4, 3, 3)
NOISY = ("LCMScheduler", "EulerAncestralDiscreteScheduler")


def by_diffusers(scheduler: Any, steps: int, noise: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return diffusers' final latents, and the noise [steps, ...] that its steps added."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    latents, added = torch.from_numpy(noise) * scheduler.init_noise_sigma, []
    options = {"generator": generator} if type(scheduler).__name__ in NOISY else {}
    for time in scheduler.timesteps:
        at = generator.get_state()
        added.append(torch.randn(SHAPE, generator=generator).numpy())
        generator.set_state(at)
        output = denoiser(scheduler.scale_model_input(latents, time).numpy(), float(time))
        latents = scheduler.step(torch.from_numpy(output), time, latents, **options).prev_sample
    return latents.numpy(), np.stack(added)


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("DDIMScheduler", {**COSINE, "clip_sample": False, "timestep_spacing": "trailing"}),
        ("DDIMScheduler", {**LINEAR, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
        ("DPMSolverMultistepScheduler", {**COSINE, "timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", {**LINEAR, "use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {**COSINE, "timestep_spacing": "trailing"}),
        ("EulerDiscreteScheduler", {**LINEAR, "timestep_spacing": "trailing"}),
        ("EulerAncestralDiscreteScheduler", LINEAR),
        ("LCMScheduler", {**COSINE, "original_inference_steps": 50}),
        ("LCMScheduler", {**LINEAR, "original_inference_steps": 20, "timestep_scaling": 3.0}),
    ],
)
def test_scheduler_table_equals_diffusers(name: str, fields: dict[str, Any], steps: int) -> None:
    scheduler = getattr(diffusers, name)(**fields)
    noise = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    expected, added = by_diffusers(scheduler, steps, noise, seed=3)
    table = build_scheduler_table(scheduler, steps)
    latents = table.sample(denoiser, noise, added)
    np.testing.assert_allclose(latents, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert table.adds_noise == (name in NOISY)


@pytest.mark.parametrize("fields", [{"clip_sample": True}, {"clip_sample": False, "thresholding": True}])
def test_clipping_scheduler_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="no sum"):
        build_scheduler_table(diffusers.DDIMScheduler(**COSINE, **fields), 4)


def test_last_step_of_consistency_model_adds_no_noise() -> None:
    table = build_scheduler_table(diffusers.LCMScheduler(**COSINE), 3)
    assert all(table.added[step][step] for step in (0, 1)) and not table.added[2][2]


NOISE = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
IDS = np.ones((2, 3), np.int64)


def _sampler(scheduler: type, steps: int, guidance: float = 1.0) -> DiffusionSampler:
    """Return a sampler whose denoiser predicts half of its input as the noise."""
    fields = {"clip_sample": False} if scheduler is DDIMScheduler else {}
    return DiffusionSampler(
        encode=lambda batch: {"last_hidden_state": np.zeros((len(batch["input_ids"]), 3, 2), np.float32)},
        denoise=lambda batch: {"out_sample": 0.5 * batch["sample"]},
        decode=lambda batch: {"sample": batch["latent_sample"]},
        scheduler=scheduler(timestep_spacing="trailing", **fields),
        latents=LatentSpace(4, 1, 1, 1.0),
        sampling=Sampling(steps, guidance),
        empty=np.zeros((1, 3), np.int64),
    )


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_path_equals_loop_of_diffusers(guidance: float) -> None:
    sampler = _sampler(DDIMScheduler, 5, guidance)
    path = sampling_path(sampler, IDS, NOISE, [0, 1])
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    latents = [torch.from_numpy(NOISE)]
    for time in scheduler.timesteps:
        latents.append(scheduler.step(0.5 * latents[-1], time, latents[-1]).prev_sample)
    assert path.times.tolist() == [999, 799, 599, 399, 199, FINISHED]
    assert np.allclose(path.latents, torch.stack(latents).numpy(), atol=1e-5)


def test_drift_ignores_the_latent_scale_of_schedulers() -> None:
    # DDIM without noise is Euler's method on rescaled latents (Karras et al. 2022, section 3).
    exact = sampling_path(_sampler(DDIMScheduler, 100), IDS, NOISE, [0, 1])
    scaled = sampling_path(_sampler(EulerDiscreteScheduler, 100), IDS, NOISE, [0, 1])
    distances = drift(exact, scaled)
    assert distances.typical.max() < 1e-3
    assert distances.diverging_index() is None


def test_second_call_at_a_timestep_counts_in_the_path() -> None:
    path = sampling_path(_sampler(HeunDiscreteScheduler, 4), IDS, NOISE, [0, 1])
    assert (np.diff(path.times) < 0).all()
    assert path.latents.shape[0] == len(path.times) == 5


def test_recording_the_path_does_not_change_sampling() -> None:
    sampler = _sampler(DDIMScheduler, 3, 2.0)
    assert np.array_equal(
        sampling_path(sampler, IDS, NOISE, [0, 1]).latents[-1], sampler.sample_latents(IDS, NOISE, [0, 1])
    )
    other = replace(sampler, sampling=Sampling(4, 2.0))
    assert len(sampling_path(other, IDS, NOISE, [0, 1]).times) == 5


TIMES = np.array([1000.0, 750.0, 500.0, 250.0, 0.0])


def _path(times: np.ndarray, slope: float, turn: float = 1000.0) -> SamplingPath:
    """Return a path of two images with latents of 1 down to ``turn``, then growing by ``slope`` per 1000 timesteps."""
    away = slope * np.maximum(turn - times, 0) / 1000
    return SamplingPath(times, np.broadcast_to((1 + away)[:, None, None, None, None], (len(times), 2, 3, 2, 2)))


def test_drift_is_relative_to_the_norm_of_the_baseline() -> None:
    distances = drift(_path(TIMES, 0.0), _path(TIMES, 0.4))
    assert distances.distances == pytest.approx(np.repeat([[0.0], [0.1], [0.2], [0.3], [0.4]], 2, axis=1))
    assert distances.typical == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    halved = drift(_path(TIMES, 1.0), _path(TIMES, 1.4))
    assert halved.typical == pytest.approx([0, 0.1 / 1.25, 0.2 / 1.5, 0.3 / 1.75, 0.4 / 2])


def test_paths_diverge_where_they_stay_apart() -> None:
    assert drift(_path(TIMES, 0.0), _path(TIMES, 0.8, turn=500.0)).diverging_index() == 3
    assert drift(_path(TIMES, 0.0), _path(TIMES, 0.8, turn=500.0)).diverging_index(0.3) == 4
    assert drift(_path(TIMES, 0.0), _path(TIMES, 0.05)).diverging_index() is None


def test_path_that_returns_has_not_diverged() -> None:
    away, still = np.array([1.0, 1.5, 1.5, 1.0, 1.0])[:, None, None] * np.ones((5, 2, 3)), np.ones((5, 2, 3))
    assert drift(SamplingPath(TIMES, still), SamplingPath(TIMES, away)).diverging_index() is None
    away[-1] = 1.2
    assert drift(SamplingPath(TIMES, still), SamplingPath(TIMES, away)).diverging_index() == 4


def test_paths_of_few_steps_are_compared_at_their_timesteps() -> None:
    few = np.array([1000.0, 600.0, 0.0])
    distances = drift(_path(TIMES, 1.0), _path(few, 1.5))
    assert distances.times.tolist() == few.tolist()
    assert distances.typical == pytest.approx([0, 0.2 / 1.4, 0.5 / 2])
    assert drift(_path(few, 1.5), _path(TIMES, 1.0)).typical == pytest.approx([0, 0.2 / 1.6, 0.5 / 2.5])
