"""Tests of step distillation: students of an exact teacher on 2-D points, and stages of tiny pipelines."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import mixture
import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from pydantic import ValidationError
from tiny_pipelines import captioned_context, check_reopened, drawn
from torch import nn

from compress.plugins.diffusion.noised_latents import latent_examples
from compress.plugins.diffusion.pipeline_model import GeneratorModel, load_pipeline
from compress.plugins.diffusion.scheduler import rank_schedulers
from compress.plugins.diffusion.stages import DistillConsistency, DistillSteps, Schedule
from compress.plugins.diffusion.step_distillation import StepTrainer
from compress.plugins.diffusion.step_losses import (
    AveragedNetwork,
    CleanBatch,
    ConsistencyLoss,
    GuidedDenoiser,
    NoiseSchedule,
    ProgressiveLoss,
)
from compress.stages.base import Context
from compress.stages.training.checkpoint import TrainingCheckpoint
from compress.utils.errors import InputError, StageError


def made_settings(fields: dict[str, Any]) -> DistillSteps | DistillConsistency:
    kind = DistillConsistency if fields.get("method") == "consistency" else DistillSteps
    return kind.model_validate({name: value for name, value in fields.items() if name != "method"})


def step_trainer(folder: Path, few: dict[str, Any], rows: int = 8192, **settings: Any) -> StepTrainer:
    """Return a trainer on points [rows, 2] of a mixture, for a student with random weights."""
    fields = {"batch_size": 256, "precision": "fp32", "optimizer": {"weight_decay": 0.0}, **settings}
    chosen = made_settings({**few, **fields})
    torch.manual_seed(0)
    student, examples = mixture.SmallDenoiser(), latent_examples(mixture.points(rows), {})
    about = replace(tiny.context(), scratch=folder)
    return StepTrainer(chosen, mixture.ExactDenoiser(), student, mixture.scheduler(), examples, None, about)


def energy(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the energy distance of two sets of points (Szekely and Rizzo 2013), 0 for the same distribution."""
    within = torch.cdist(one, one).mean() + torch.cdist(other, other).mean()
    return float(2 * torch.cdist(one, other).mean() - within)


def noise(count: int = 1500) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(5))


def table() -> NoiseSchedule:
    return NoiseSchedule(mixture.scheduler().alphas_cumprod)


def denoiser(network: nn.Module) -> GuidedDenoiser:
    return GuidedDenoiser(network, "v_prediction", table())


@pytest.mark.slow
@pytest.mark.parametrize(
    "few",
    [
        {"method": "progressive", "steps": 4, "teacher_steps": 16},
        {"method": "consistency", "steps": 1, "teacher_steps": 20},
    ],
    ids=lambda few: few["method"],
)
def test_distilled_sampling_halves_the_error_of_the_best_scheduler(few: dict[str, Any], tmp_path: Path) -> None:
    """Progressive distillation samples in 4 steps, consistency distillation in 1."""
    real, exact = torch.from_numpy(mixture.points(1500, seed=9)), mixture.ExactDenoiser()

    def apart(network: nn.Module) -> Callable[[Any], float]:
        return lambda trained: energy(mixture.drawn(network, trained, few["steps"], noise()), real)

    _, tried = rank_schedulers(mixture.scheduler(), few["steps"], apart(exact))
    taught = step_trainer(tmp_path, few, epochs=60, learning_rate=8e-3, batch_size=1024)
    trained = taught.train()
    assert tried[0].error is not None and apart(taught.student)(trained) * 2 < tried[0].error


@pytest.mark.parametrize("index", range(4))
def test_progressive_target_equals_two_steps_of_diffusers(index: int) -> None:
    teacher = mixture.ExactDenoiser()
    loss = ProgressiveLoss(denoiser(teacher), denoiser(teacher), 4)
    time, noisy = loss.timesteps[index], noise(6)
    target = loss.target(noisy, time.repeat(6), CleanBatch(noisy))
    eight, four = (mixture.scheduler(timestep_spacing="trailing") for _ in range(2))
    eight.set_timesteps(8)
    four.set_timesteps(4)
    assert four.timesteps.tolist() == loss.timesteps.tolist()
    reached = noisy
    for when in eight.timesteps[2 * index : 2 * index + 2]:
        reached = eight.step(teacher(reached, when.repeat(6))[0], when, reached).prev_sample
    level = table().levels(time.reshape(1), 2)
    output = (level.alpha * noisy - target) / level.sigma
    torch.testing.assert_close(four.step(output, time, noisy).prev_sample, reached, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("second_order", [False, True])
def test_target_of_four_merged_steps_equals_four_steps_of_diffusers(second_order: bool) -> None:
    teacher, noisy = mixture.ExactDenoiser(), noise(6)
    loss = ProgressiveLoss(denoiser(teacher), denoiser(teacher), 1, merged=4, second_order=second_order)
    target = loss.target(noisy, loss.timesteps.repeat(6), CleanBatch(noisy))
    scheduler = mixture.scheduler(timestep_spacing="trailing")
    if second_order:
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
    samples = mixture.drawn(teacher, scheduler, 4, noisy)
    torch.testing.assert_close(target, samples, rtol=1e-3, atol=1e-4)  # no noise remains after the last step


def test_consistency_function_is_identity_at_the_smallest_timestep() -> None:
    averaged = AveragedNetwork(mixture.SmallDenoiser(), 0.95)
    loss = ConsistencyLoss(denoiser(mixture.ExactDenoiser()), denoiser(averaged.network), 50, averaged)
    noisy = noise(6)
    for network in (averaged, averaged.average):
        assert torch.equal(
            loss.predict_end(noisy, torch.zeros(6, dtype=torch.int64), CleanBatch(noisy), network), noisy
        )
    lcm = diffusers.LCMScheduler(original_inference_steps=50)
    lcm.set_timesteps(50)
    assert sorted(lcm.timesteps.tolist()) == loss.timesteps.tolist()


def test_moving_average_decays_and_is_applied_to_the_weights() -> None:
    averaged = AveragedNetwork(nn.Linear(2, 2, bias=False), 0.75)
    with torch.no_grad():
        averaged.network.weight.fill_(0.0)  # type: ignore[union-attr]
    average_before = averaged.get_buffer("average_0").clone()
    averaged.update_average()
    averaged.update_average()
    averaged.apply_average()
    torch.testing.assert_close(averaged.network.weight, average_before * 0.75**2)


def test_guided_denoiser_equals_classifier_free_guidance() -> None:
    unet = tiny_pipelines.parts()["unet"]
    text, empty = torch.randn(2, 5, tiny_pipelines.WIDTH), torch.randn(1, 5, tiny_pipelines.WIDTH)
    noisy, times = torch.randn(2, 4, 8, 8), torch.tensor([900, 100])
    scale = 5.0
    with torch.no_grad():
        guided = GuidedDenoiser(unet, "epsilon", table(), empty, scale).clean(noisy, times, CleanBatch(noisy, text))
        for row in range(2):
            noisy_row, when = noisy[row : row + 1], times[row : row + 1]
            without, conditioned = (unet(noisy_row, when, states).sample for states in (empty, text[row : row + 1]))
            output = without + scale * (conditioned - without)
            square = mixture.scheduler().alphas_cumprod[when]
            clean = (noisy_row - (1 - square).sqrt() * output) / square.sqrt()
            torch.testing.assert_close(guided[row : row + 1], clean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("few", [{"method": "progressive", "teacher_steps": 16}, {"method": "consistency"}])
def test_resumed_distillation_equals_uninterrupted_one(
    few: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(folder: Path) -> StepTrainer:
        return step_trainer(folder, {"steps": 4, **few}, rows=512, epochs=8)

    whole = made(tmp_path / "whole")
    whole.train()
    monkeypatch.setattr(TrainingCheckpoint, "is_due", lambda self: True)
    original_batch, calls = StepTrainer.batch, itertools.count(1)

    def failing(self: StepTrainer, given: dict[str, torch.Tensor]) -> CleanBatch:
        if next(calls) == 12:  # in the second round, where there are two
            raise KeyboardInterrupt
        return original_batch(self, given)

    monkeypatch.setattr(StepTrainer, "batch", failing)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "killed").train()
    again = made(tmp_path / "killed")
    again.train()
    assert 12 + 1 < next(calls) < 12 + 1 + 16
    for parameter, other in zip(whole.student.parameters(), again.student.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_non_finite_loss_ends_the_round_with_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingCheckpoint, "is_due", lambda self: True)
    original_batch, calls = StepTrainer.batch, itertools.count(1)

    def spoiled(self: StepTrainer, given: dict[str, torch.Tensor]) -> CleanBatch:
        batch = original_batch(self, given)
        return replace(batch, clean=batch.clean * float("nan")) if next(calls) >= 5 else batch

    monkeypatch.setattr(StepTrainer, "batch", spoiled)
    taught = step_trainer(tmp_path, {"steps": 4, "method": "consistency"}, rows=512, epochs=8)
    taught.train()
    assert all(torch.isfinite(weight).all() for weight in taught.student.parameters())
    assert any("as it was after step 4" in remark for remark in taught.context.notes)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 4, "teacher_steps": 24}, "power of 2"),
        ({"method": "consistency", "steps": 8, "teacher_steps": 8}, "above steps"),
        ({"guidance": 0.5}, "greater than or equal to 1"),
    ],
)
def test_inconsistent_settings_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        made_settings(fields)


def test_rounds_halve_the_steps() -> None:
    assert DistillSteps(steps=4, teacher_steps=64).rounds == [32, 16, 8, 4]
    assert DistillSteps(steps=32).first_steps == 64
    assert DistillSteps(steps=3).rounds == [24, 12, 6, 3]
    assert DistillSteps(steps=4, teacher_steps=32, at_once=4).rounds == [8, 4]


def test_guidance_is_distilled_in_its_own_round_or_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str] = []
    monkeypatch.setattr(StepTrainer, "_train_round", lambda self, name, make, place, rounds: named.append(name))
    few = {"steps": 4, "teacher_steps": 16}
    noise_scheduler = diffusers.DDIMScheduler.from_config(mixture.scheduler().config, prediction_type="epsilon")
    for fields in (few, {**few, "guidance_first": False, "at_once": 4}):
        replace(step_trainer(tmp_path, fields), scheduler=noise_scheduler).train()
    assert named == ["guided", "8-steps", "4-steps", "4-steps"]


def test_guidance_is_refused_without_text_conditioning(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="reads none"):
        step_trainer(tmp_path, {"guidance": 3.0})


def test_flow_matching_is_refused(tmp_path: Path) -> None:
    taught = step_trainer(tmp_path, {})
    with pytest.raises(StageError, match="FlowMatchEulerDiscreteScheduler"):
        replace(taught, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())


def test_student_scheduler_matches_the_training(tmp_path: Path) -> None:
    scheduler = step_trainer(tmp_path, {"steps": 4}).student_scheduler()
    assert isinstance(scheduler, diffusers.DDIMScheduler) and scheduler.config.timestep_spacing == "trailing"
    assert scheduler.config.prediction_type == "v_prediction" and not scheduler.config.clip_sample
    lcm = step_trainer(tmp_path, {"method": "consistency", "teacher_steps": 20}).student_scheduler()
    assert isinstance(lcm, diffusers.LCMScheduler) and lcm.config.original_inference_steps == 20
    np.testing.assert_array_equal(lcm.alphas_cumprod, mixture.scheduler().alphas_cumprod)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return captioned_context(tmp_path / "scratch")


@pytest.fixture
def model(tmp_path: Path) -> GeneratorModel:
    return load_pipeline(tiny_pipelines.pipeline_folder(tmp_path / "start"))


def test_schedule_stage_changes_scheduler_and_steps(model: GeneratorModel, context: Context, tmp_path: Path) -> None:
    name, config = "DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}
    stage = Schedule(scheduler=name, steps=5, guidance=2, config=config)
    rescheduled = stage.run(model, context)
    assert isinstance(rescheduled, GeneratorModel) and rescheduled.module is model.module
    assert not stage.output_spec().changes_weights and type(rescheduled.scheduler).__name__ == name
    assert (rescheduled.sampling.steps, rescheduled.sampling.guidance) == (5, 2)
    check_reopened(rescheduled, tmp_path / "made")
    assert np.abs(drawn(rescheduled) - drawn(model)).max() > 1e-3


def test_best_scheduler_is_nearest_to_many_step_sampling(model: GeneratorModel, context: Context) -> None:
    rescheduled = Schedule(scheduler="best", steps=4, reference_steps=20, prompts=2).run(model, context)
    assert isinstance(rescheduled, GeneratorModel)
    (table,) = context.tables
    distances = [row[1] for row in table.rows if isinstance(row[1], float)]
    assert len(distances) > 5 and distances == sorted(distances)
    assert str(table.rows[0][0]).startswith(type(rescheduled.scheduler).__name__)


def test_incompatible_scheduler_is_refused(model: GeneratorModel, context: Context) -> None:
    with pytest.raises(InputError, match="LCMScheduler does not fit"):
        Schedule(scheduler="LCMScheduler", steps=4).run(model, context)
    with pytest.raises(InputError, match="no scheduler 'DDIMSchedule'"):
        Schedule(scheduler="DDIMSchedule", steps=4).check_model(Path("start"))


@pytest.mark.parametrize(
    ("few", "scheduler"),
    [
        ({"method": "progressive", "steps": 2, "teacher_steps": 4, "guidance": 3.0}, "DDIMScheduler"),
        ({"method": "consistency", "steps": 2, "guidance": 2.0}, "LCMScheduler"),
    ],
)
def test_distillation_stage_saves_a_model_with_fewer_steps(
    model: GeneratorModel, context: Context, tmp_path: Path, few: dict[str, Any], scheduler: str
) -> None:
    weights_before = {name: weight.clone() for name, weight in model.parts["unet"].state_dict().items()}
    fields = {name: value for name, value in few.items() if name != "method"}
    kind = DistillConsistency if few["method"] == "consistency" else DistillSteps
    stage = kind.model_validate({**fields, "epochs": 2, "batch_size": 4, "learning_rate": 1e-3})
    distilled = stage.run(model, context)
    assert isinstance(distilled, GeneratorModel) and type(distilled.scheduler).__name__ == scheduler
    assert (distilled.sampling.steps, distilled.sampling.guidance) == (2, 1.0)
    after = distilled.parts["unet"].state_dict()
    assert all(torch.isfinite(weight).all() for weight in after.values())
    assert any(not torch.equal(weights_before[name], after[name]) for name in weights_before)
    check_reopened(distilled, tmp_path / "made")
    assert any("trained" in str(row[0]) for row in context.tables[0].rows)
