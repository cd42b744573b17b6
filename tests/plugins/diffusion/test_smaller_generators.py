"""The stages that make a model that draws smaller, on a tiny pipeline that diffusers opens before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny_images
import tiny_pipelines
from diffusers import AutoencoderTiny, DiffusionPipeline

from compress.data.dataset import Dataset
from compress.plugins.diffusion.onnx_export import export_diffusion, verify_diffusion
from compress.plugins.diffusion.pipeline_model import GeneratorModel, load_pipeline
from compress.plugins.diffusion.stage_settings import AutoencoderDistillation
from compress.plugins.diffusion.stages import DistillAutoencoder, DistillFeatures, PruneDenoiser
from compress.plugins.diffusion.tiny_autoencoder import make_small_autoencoder
from compress.plugins.diffusion.torch_session import torch_sampler
from compress.stages.base import Context
from compress.stages.protocols import fields_without_effect
from compress.tasks.registry import get_task
from compress.utils.errors import StageError
from compress.utils.progress import SilentProgress

TASK = get_task("text-to-image")


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return tiny_pipelines.pipeline_folder(tmp_path / "start", layers_per_block=2)


@pytest.fixture
def context(tmp_path: Path, start: Path) -> Context:
    pictures = tiny_images.table(8)
    captions = [f"a {'dark' if row % 2 else 'small'} coat" for row in range(8)]
    rows = pa.table({"image": pictures["image"], "text": captions})
    data = Dataset(TASK.columns, {"train": rows, "validation": rows.slice(0, 4), "test": rows}, ())

    def earlier(label: str) -> Any:
        assert label == "start"
        return load_pipeline(start)

    return Context(TASK, data, 12, 0, SilentProgress(), earlier, Path, tmp_path / "scratch")


def drawn(model: GeneratorModel) -> np.ndarray:
    noise = np.stack([model.processor.noise(seed) for seed in range(2)])
    return torch_sampler(model).draw(model.processor.ids(["a coat", "a bag"]), noise, [0, 1])


def reopened(model: GeneratorModel, folder: Path) -> Any:
    """The same folder as compress opens it, which draws the same, and as diffusers does."""
    folder.mkdir()
    model.save(folder)
    np.testing.assert_array_equal(drawn(load_pipeline(folder)), drawn(model))
    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def pruned(start: Path, context: Context, **fields: Any) -> GeneratorModel:
    stage = PruneDenoiser.model_validate({"timesteps": 3, "importance_examples": 4, **fields})
    stage.check_model(start)
    smaller = stage.run(load_pipeline(start), context)
    assert isinstance(smaller, GeneratorModel)
    return smaller


def test_a_unet_without_blocks_and_channels_learns_from_the_whole_one(
    start: Path, context: Context, tmp_path: Path
) -> None:
    smaller = pruned(start, context, blocks="bk-sdm-small", channels=0.5)
    opened = reopened(smaller, tmp_path / "pruned")
    assert opened.unet.config.block_out_channels == [4, 8]
    assert opened.unet.config.layers_per_block == 1 and opened.unet.mid_block is None
    assert any("parameters; denoising loss" in note for note in context.notes)
    drawn_before = drawn(smaller)
    stage = DistillFeatures.model_validate({"teacher": "start", "epochs": 4, "batch_size": 4, "learning_rate": 2e-3})
    taught = stage.run(smaller, context)
    assert isinstance(taught, GeneratorModel)
    assert np.abs(drawn(taught) - drawn_before).max() > 1e-3
    reopened(taught, tmp_path / "taught")


def test_pairs_are_chosen_by_the_loss(start: Path, context: Context) -> None:
    smaller = pruned(start, context, pairs=1)
    table = context.tables[0]
    assert table.title == "Blocks that went" and len(table.rows) == 1
    assert sorted(len(block.resnets) for block in smaller.parts["unet"].down_blocks) == [1, 2]


def test_a_small_decoder_takes_the_place_of_the_vae(start: Path, context: Context, tmp_path: Path) -> None:
    fields = {"width": 8, "layers": 1, "epochs": 2, "batch_size": 4, "learning_rate": 1e-3}
    stage = DistillAutoencoder.model_validate(fields)
    assert "diffusers" in stage.called_packages() and not fields_without_effect(stage, TASK.capabilities)
    smaller = stage.run(load_pipeline(start), context)
    assert isinstance(smaller, GeneratorModel)
    opened = reopened(smaller, tmp_path / "made")
    assert isinstance(opened.vae, AutoencoderTiny)
    assert opened.vae_scale_factor == 2


@pytest.mark.slow
def test_cut_parts_are_exported_as_whole_ones_are(start: Path, context: Context) -> None:
    smaller = pruned(start, context, blocks="bk-sdm-small", channels=0.5)
    small = make_small_autoencoder(smaller.parts["vae"], AutoencoderDistillation(width=8, layers=1), seed=0)
    smaller.replace_part("vae", small.eval())
    ids = smaller.processor.ids(["a bag", "the small dark boot of a photo"])
    graphs = {name: part.graph for name, part in export_diffusion(smaller, ids, None, True).items()}
    apart = verify_diffusion(smaller, graphs, ids, 1e-3)
    assert list(apart) == ["text_encoder", "unet", "vae_decoder"]
    assert max(difference.worst for difference in apart.values()) < 1e-4


def test_what_the_config_cannot_say_is_refused_before_anything_runs(start: Path) -> None:
    stage = PruneDenoiser(block_out_channels=(8, 10))
    with pytest.raises(StageError, match=r"cannot be cut to \[8, 10\]"):
        stage.check_model(start)
    PruneDenoiser(block_out_channels=(8, 12)).check_model(start)


def test_a_stage_without_a_purpose_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks or pairs"):
        PruneDenoiser.model_validate({})
    with pytest.raises(ValueError, match="teacher"):
        DistillFeatures.model_validate({})
    with pytest.raises(ValueError, match="one of epochs and budget"):
        DistillAutoencoder.model_validate({"epochs": 2, "budget": "3m"})


def test_stages_are_for_image_generation_alone() -> None:
    for stage in (PruneDenoiser, DistillFeatures, DistillAutoencoder):
        assert stage.supports(TASK.capabilities)
        assert not stage.supports(get_task("text-generation").capabilities)
