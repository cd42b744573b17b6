"""Tests of feature distillation and small VAE decoders: losses against explicit sums, resumed against whole runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_pipelines
import tiny_unets
import torch
from diffusers import AutoencoderTiny, DDPMScheduler
from tiny_pipelines import captioned_context, check_reopened, drawn

from compress.models.hooks import removed_on_exit
from compress.plugins.diffusion.feature_distillation import FeatureTrainer, train_on_features
from compress.plugins.diffusion.noised_latents import NoisedLatents, NoiseProcess, denoise
from compress.plugins.diffusion.onnx_export import export_diffusion, verify_diffusion
from compress.plugins.diffusion.pipeline_model import GeneratorModel, load_pipeline
from compress.plugins.diffusion.stages import DistillAutoencoder, DistillFeatures, PruneDenoiser
from compress.plugins.diffusion.tiny_autoencoder import build_tiny_autoencoder
from compress.plugins.diffusion.unet_blocks import select_bk_sdm_blocks
from compress.stages.base import Context
from compress.stages.protocols import fields_without_effect
from compress.stages.training.checkpoint import TrainingCheckpoint
from compress.tasks.registry import TASKS
from compress.utils.errors import StageError

NOISING = NoiseProcess.from_scheduler(DDPMScheduler())
FAST = DistillFeatures(
    teacher="start", judged_timesteps=2, epochs=2, batch_size=4, learning_rate=2e-3, precision="fp32"
)
EXAMPLES = tiny_unets.latents(8)


def noised(rows: int = 3) -> NoisedLatents:
    batch = {name: torch.from_numpy(value) for name, value in EXAMPLES.batch(list(range(rows))).items()}
    return NOISING.sample(batch, generator=torch.Generator().manual_seed(2))


def feature_trainer(teacher, student, **weights) -> FeatureTrainer:
    return FeatureTrainer(teacher, student, EXAMPLES, NOISING, FAST.model_copy(update=weights), 0)


def test_identical_student_has_zero_loss():
    teacher = tiny_unets.conditional(layers_per_block=2)
    student = copy.deepcopy(teacher)
    distillation = feature_trainer(teacher, student, denoising_weight=0.0)
    with distillation.capture_features():
        assert float(distillation.noised_loss(student, noised()).detach()) == 0.0
        with torch.no_grad():
            student.up_blocks[0].resnets[0].conv2.bias.add_(0.5)
        assert float(distillation.noised_loss(student, noised()).detach()) > 0.01


def test_loss_sums_denoising_output_and_block_feature_errors():
    teacher = tiny_unets.conditional(layers_per_block=2)
    student = select_bk_sdm_blocks(teacher, "small")
    seen = noised()

    def computed(unet):
        features = []
        hooks = [
            block.register_forward_hook(
                lambda _, __, output: features.append(output[0] if isinstance(output, tuple) else output)
            )
            for block in (*unet.down_blocks, *unet.up_blocks)
        ]
        with removed_on_exit(hooks):
            return denoise(unet, seen), features

    (taught, theirs), (answer, mine) = computed(teacher), computed(student)
    mse = torch.nn.functional.mse_loss
    assert len(theirs) == len(mine) == 4
    expected_loss = 0.5 * mse(answer, seen.noise) + 2 * mse(answer, taught)
    expected_loss = expected_loss + 3 * sum(mse(feature, other) for feature, other in zip(mine, theirs, strict=True))
    distillation = feature_trainer(teacher, student, denoising_weight=0.5, output_weight=2.0, feature_weight=3.0)
    with distillation.capture_features():
        loss = distillation.noised_loss(student, seen).detach()
    assert float(loss) == pytest.approx(float(expected_loss.detach()), rel=1e-5)


def test_narrower_student_is_projected_to_teacher_width():
    student, teacher = tiny_unets.doubled(tiny_unets.conditional, (8, 16))
    distillation = feature_trainer(teacher, student, denoising_weight=0.0, output_weight=0.0)
    assert {name: projection.weight.shape[:2] for name, projection in distillation.projections.items()} == {
        "down 0": (16, 8),
        "down 1": (32, 16),
        "middle": (32, 16),
        "up 0": (16, 8),
        "up 1": (32, 16),
    }
    with distillation.capture_features():
        # The teacher's features are the student's, each channel twice, so a linear projection maps one to the other.
        twins = float(distillation.noised_loss(student, noised()).detach())
        with torch.no_grad():
            for projection in distillation.projections.values():
                projection.weight.zero_()
        assert twins < 1e-4 * float(distillation.noised_loss(student, noised()).detach())


def test_removed_innermost_stage_is_compared_before_downsampling():
    teacher = tiny_unets.conditional(block_out_channels=(8, 16, 16), **tiny_unets.THREE)
    student = select_bk_sdm_blocks(teacher, "tiny")
    distillation = feature_trainer(teacher, student)
    assert list(distillation.pairs) == ["down 0", "down 1", "up 0", "up 1"]
    assert distillation.pairs["down 1"] == tuple(unet.down_blocks[1].attentions[-1] for unet in (teacher, student))
    assert distillation.pairs["up 1"] == (teacher.up_blocks[1], student.up_blocks[0])
    with distillation.capture_features():
        assert distillation.noised_loss(student, noised()).isfinite()
    with pytest.raises(StageError, match="that the teacher lacks"):
        feature_trainer(student, teacher)


def test_training_moves_student_towards_unchanged_teacher(tmp_path):
    teacher = tiny_unets.conditional(layers_per_block=2)
    student = select_bk_sdm_blocks(teacher, "small")
    states_before = copy.deepcopy(teacher.state_dict())
    context = tiny.context(scratch=tmp_path)
    apart = (tiny_unets.answer(student) - tiny_unets.answer(teacher)).square().mean()
    settings = FAST.model_copy(update={"epochs": 12})
    train_on_features(student, teacher, EXAMPLES, EXAMPLES, NOISING, settings, context)
    assert (tiny_unets.answer(student) - tiny_unets.answer(teacher)).square().mean() < 0.7 * apart
    assert all(torch.equal(value, states_before[name]) for name, value in teacher.state_dict().items())
    assert "denoising loss on held-out images" in context.notes[-1]


def test_resumed_distillation_equals_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingCheckpoint, "is_due", lambda self: True)
    small, teacher = tiny_unets.doubled(tiny_unets.conditional, (8, 16))
    loss, calls = FeatureTrainer.loss, []

    def dies(*given):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*given)

    def taught(folder):
        student = copy.deepcopy(small)
        train_on_features(student, teacher, EXAMPLES, EXAMPLES, NOISING, FAST, tiny.context(scratch=folder))
        return student.state_dict()

    whole = taught(tmp_path / "whole")
    monkeypatch.setattr(FeatureTrainer, "loss", dies)
    with pytest.raises(KeyboardInterrupt):
        taught(tmp_path / "killed")
    again = taught(tmp_path / "killed")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert not torch.equal(whole["conv_in.weight"], small.conv_in.weight)


TASK = TASKS["text-to-image"]


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return tiny_pipelines.pipeline_folder(tmp_path / "start", layers_per_block=2)


@pytest.fixture
def context(tmp_path: Path, start: Path) -> Context:
    return captioned_context(tmp_path / "scratch", lambda label: load_pipeline(start))


def pruned(start: Path, context: Context, **fields: Any) -> GeneratorModel:
    stage = PruneDenoiser.model_validate({"timesteps": 3, "importance_examples": 4, **fields})
    stage.check_model(start)
    smaller = stage.run(load_pipeline(start), context)
    assert isinstance(smaller, GeneratorModel)
    return smaller


def test_pruned_unet_is_distilled_from_the_original(start: Path, context: Context, tmp_path: Path) -> None:
    smaller = pruned(start, context, blocks="bk-sdm-small", parameters=0.5)
    opened = check_reopened(smaller, tmp_path / "pruned")
    assert opened.unet.config.block_out_channels == [4, 8]
    assert opened.unet.config.layers_per_block == 1 and opened.unet.mid_block is None
    assert any("parameters; denoising loss" in note for note in context.notes)
    drawn_before = drawn(smaller)
    stage = DistillFeatures.model_validate({"teacher": "start", "epochs": 4, "batch_size": 4, "learning_rate": 2e-3})
    taught = stage.run(smaller, context)
    assert isinstance(taught, GeneratorModel)
    assert np.abs(drawn(taught) - drawn_before).max() > 1e-3
    check_reopened(taught, tmp_path / "taught")


def test_tiny_autoencoder_replaces_the_vae(start: Path, context: Context, tmp_path: Path) -> None:
    fields = {"width": 8, "layers": 1, "epochs": 2, "batch_size": 4, "learning_rate": 1e-3}
    stage = DistillAutoencoder.model_validate(fields)
    assert "diffusers" in stage.called_packages() and not fields_without_effect(stage, TASK.capabilities)
    smaller = stage.run(load_pipeline(start), context)
    assert isinstance(smaller, GeneratorModel)
    opened = check_reopened(smaller, tmp_path / "made")
    assert isinstance(opened.vae, AutoencoderTiny) and opened.vae_scale_factor == 2
    picture = opened("a bag", num_inference_steps=1, height=16, width=16, output_type="np").images[0]
    assert picture.shape == (16, 16, 1) and np.isfinite(picture).all()


@pytest.mark.slow
def test_pruned_components_export_to_onnx(start: Path, context: Context) -> None:
    smaller = pruned(start, context, blocks="bk-sdm-small", parameters=0.5)
    small = build_tiny_autoencoder(smaller.parts["vae"], DistillAutoencoder(width=8, layers=1), seed=0)
    smaller.replace_part("vae", small.eval())
    ids = smaller.processor.ids(["a bag", "the small dark boot of a photo"])
    graphs = {name: part.graph for name, part in export_diffusion(smaller, ids, None, True).items()}
    apart = verify_diffusion(smaller, graphs, ids, 1e-3)
    assert list(apart) == ["text_encoder", "unet", "vae_decoder"]
    assert max(difference.worst for difference in apart.values()) < 1e-4


def test_stage_without_required_settings_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks or parameters"):
        PruneDenoiser.model_validate({})
    with pytest.raises(ValueError, match="teacher"):
        DistillFeatures.model_validate({})
    with pytest.raises(ValueError, match="one of epochs and budget"):
        DistillAutoencoder.model_validate({"epochs": 2, "budget": "3m"})


def test_stages_support_only_image_generation() -> None:
    for stage in (PruneDenoiser, DistillFeatures, DistillAutoencoder):
        assert stage.supports(TASK.capabilities)
        assert not stage.supports(TASKS["text-generation"].capabilities)
