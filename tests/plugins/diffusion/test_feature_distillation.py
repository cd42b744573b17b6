"""A UNet taught by features: nothing to learn from itself, sums done by hand, and a kill that changes no byte."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial

import pytest
import tiny
import tiny_unets
import torch
from diffusers import DDPMScheduler

from compress.plugins.diffusion import feature_distillation
from compress.plugins.diffusion.feature_distillation import FeatureTrainer, train_on_features
from compress.plugins.diffusion.noised_latents import NoisedLatents, Noising, denoise
from compress.plugins.diffusion.stage_settings import FeatureDistillation
from compress.plugins.diffusion.unet_blocks import bk_sdm_blocks, keep_blocks
from compress.stages.training.checkpoint import TrainingCheckpoint
from compress.utils.errors import StageError

NOISING = Noising.of(DDPMScheduler())
FAST = FeatureDistillation(
    teacher="start", judged_timesteps=2, epochs=2, batch_size=4, learning_rate=2e-3, precision="fp32"
)
EXAMPLES = tiny_unets.latents(8)


def noised(rows: int = 3) -> NoisedLatents:
    batch = {name: torch.from_numpy(value) for name, value in EXAMPLES.batch(list(range(rows))).items()}
    return NOISING.draw(batch, generator=torch.Generator().manual_seed(2))


def lesson(teacher, student, **weights) -> FeatureTrainer:
    return FeatureTrainer.between(teacher, student, EXAMPLES, NOISING, FAST.model_copy(update=weights), 0)


def test_an_identical_student_has_no_loss_against_its_teacher():
    teacher = tiny_unets.conditional(layers_per_block=2)
    student = copy.deepcopy(teacher)
    distillation = lesson(teacher, student, denoising_weight=0.0)
    with distillation.listening():
        assert float(distillation.loss_of(student, noised()).detach()) == 0.0
        with torch.no_grad():
            student.up_blocks[0].resnets[0].conv2.bias.add_(0.5)
        assert float(distillation.loss_of(student, noised()).detach()) > 0.01


def test_the_loss_is_the_sum_of_denoising_output_and_features_behind_each_block():
    teacher = tiny_unets.conditional(layers_per_block=2)
    student = keep_blocks(teacher, bk_sdm_blocks(teacher, "small"))
    seen = noised()
    features = []
    for unet in (teacher, student):
        mine = []
        blocks = [*unet.down_blocks, *unet.up_blocks]
        handles = [
            block.register_forward_hook(
                lambda _, given, output, mine=mine: mine.append(output[0] if isinstance(output, tuple) else output)
            )
            for block in blocks
        ]
        answer = denoise(unet, seen)
        for handle in handles:
            handle.remove()
        features.append((answer, mine))
    (taught, theirs), (answer, mine) = features
    mse = torch.nn.functional.mse_loss
    assert len(theirs) == len(mine) == 4
    expected_loss = 0.5 * mse(answer, seen.noise) + 2 * mse(answer, taught)
    expected_loss = expected_loss + 3 * sum(mse(feature, other) for feature, other in zip(mine, theirs, strict=True))
    distillation = lesson(teacher, student, denoising_weight=0.5, output_weight=2.0, feature_weight=3.0)
    with distillation.listening():
        assert float(distillation.loss_of(student, seen).detach()) == pytest.approx(
            float(expected_loss.detach()), rel=1e-5
        )


def test_a_narrower_student_is_projected_to_the_width_of_its_teacher():
    student, teacher = tiny_unets.doubled(tiny_unets.conditional, (8, 16))
    distillation = lesson(teacher, student, denoising_weight=0.0, output_weight=0.0)
    assert {name: projection.weight.shape[:2] for name, projection in distillation.projections.items()} == {
        "down 0": (16, 8),
        "down 1": (32, 16),
        "middle": (32, 16),
        "up 0": (16, 8),
        "up 1": (32, 16),
    }
    with distillation.listening():
        # Its features are the teacher's without their twins: a matrix makes the one of the other.
        twins = float(distillation.loss_of(student, noised()).detach())
        with torch.no_grad():
            for projection in distillation.projections.values():
                projection.weight.zero_()
        assert twins < 1e-4 * float(distillation.loss_of(student, noised()).detach())


def test_without_an_innermost_stage_features_are_compared_before_they_are_halved():
    teacher = tiny_unets.conditional(block_out_channels=(8, 16, 16), **tiny_unets.THREE)
    student = keep_blocks(teacher, bk_sdm_blocks(teacher, "tiny"))
    distillation = lesson(teacher, student)
    assert list(distillation.pairs) == ["down 0", "down 1", "up 0", "up 1"]
    assert distillation.pairs["down 1"] == (
        teacher.down_blocks[1].attentions[-1],
        student.down_blocks[1].attentions[-1],
    )
    assert distillation.pairs["up 1"] == (teacher.up_blocks[1], student.up_blocks[0])
    with distillation.listening():
        assert distillation.loss_of(student, noised()).isfinite()
    with pytest.raises(StageError, match="that the teacher lacks"):
        lesson(student, teacher)


def test_a_student_comes_nearer_and_its_teacher_stays(tmp_path):
    teacher = tiny_unets.conditional(layers_per_block=2)
    student = keep_blocks(teacher, bk_sdm_blocks(teacher, "small"))
    states_before = copy.deepcopy(teacher.state_dict())
    context = tiny.context(scratch=tmp_path)
    apart = (tiny_unets.answer(student) - tiny_unets.answer(teacher)).square().mean()
    settings = FAST.model_copy(update={"epochs": 12})
    train_on_features(student, teacher, EXAMPLES, EXAMPLES, NOISING, settings, context)
    assert (tiny_unets.answer(student) - tiny_unets.answer(teacher)).square().mean() < 0.7 * apart
    assert all(torch.equal(value, states_before[name]) for name, value in teacher.state_dict().items())
    assert "denoising loss on held-out pictures" in context.notes[-1]


class Killed(BaseException):
    pass


@dataclass(frozen=True)
class Mortal(Noising):
    """Dies when it is asked for the batch after so many."""

    left: list[int] = field(default_factory=lambda: [-1])

    def draw(self, batch, timesteps=None, generator=None):
        if timesteps is None and generator is None:
            if self.left[0] == 0:
                raise Killed
            self.left[0] -= 1
        return super().draw(batch, timesteps, generator)


def test_a_killed_teaching_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_distillation, "TrainingCheckpoint", partial(TrainingCheckpoint, every_seconds=0.0))
    small, teacher = tiny_unets.doubled(tiny_unets.conditional, (8, 16))

    def taught(folder, dies_after):
        student = copy.deepcopy(small)
        noising = Mortal(NOISING.scheduler, {}, 0.0, [dies_after])
        train_on_features(student, teacher, EXAMPLES, EXAMPLES, noising, FAST, tiny.context(scratch=folder))
        return student.state_dict()

    whole = taught(tmp_path / "whole", -1)
    with pytest.raises(Killed):
        taught(tmp_path / "killed", 3)
    again = taught(tmp_path / "killed", -1)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert not torch.equal(whole["conv_in.weight"], small.conv_in.weight)
