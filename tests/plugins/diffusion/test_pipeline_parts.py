"""Tests of pipeline folders: errors of incomplete or inconsistent ones, tiny autoencoders, and component costs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from real_diffusion_configs import BK_SDM_BASE, BK_SDM_TINY, SD15_UNET, SD_VAE, SDXL_UNET
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_pipelines import pipeline_folder
from torch import nn

from compress.inspection.budget import budget_of
from compress.inspection.budget_rendering import write_budget
from compress.models.folder_checks import check_model_folder, check_weights_finite, weight_files
from compress.models.hooks import capture_outputs
from compress.numerics.losses import feature_distance
from compress.plugins.diffusion.component_costs import (
    MemoryTracker,
    build_component_on_meta,
    component_calls,
    component_costs,
    costs_of_component,
    count_parameters,
)
from compress.plugins.diffusion.onnx_export import diffusion_folder
from compress.plugins.diffusion.pipeline_model import SAMPLING, Sampling, load_pipeline, load_prompt_processor
from compress.plugins.diffusion.source_folder import convert_pipeline
from compress.plugins.diffusion.stages import DistillAutoencoder
from compress.plugins.diffusion.tiny_autoencoder import (
    build_tiny_autoencoder,
    decoding_error,
    encoder_features,
    image_examples,
    train_tiny_autoencoder,
)
from compress.utils.errors import ModelError, StageError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_folder(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def pickled(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no vae in the index": (lambda folder: change(folder / "model_index.json", vae=[None, None]), "lacks the part vae"),
    "no folder": (lambda folder: shutil.rmtree(folder / "unet"), "part 'unet' is missing"),
    "no weights": (lambda folder: next((folder / "vae").glob("*.safetensors")).unlink(), "'vae' has no weights"),
    "a pickle": (pickled, "diffusion_pytorch_model.bin is a pickle"),
    "another text encoder": (
        lambda folder: change(folder / "text_encoder" / "config.json", hidden_size=24),
        "unet has cross_attention_dim 16, text_encoder has hidden_size 24",
    ),
    "another vae": (
        lambda folder: change(folder / "vae" / "config.json", latent_channels=16),
        "unet has out_channels 4, vae has latent_channels 16",
    ),
    "two text encoders": (
        lambda folder: change(folder / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
        "a text_encoder_2 beside the first",
    ),
    "a transformer": (
        lambda folder: change(
            folder / "model_index.json", unet=[None, None], transformer=["diffusers", "PixArtTransformer2DModel"]
        ),
        r"lacks the part unet, and has a transformer \(PixArtTransformer2DModel\) instead",
    ),
    "another UNet": (
        lambda folder: change(folder / "model_index.json", unet=["diffusers", "UNet3DConditionModel"]),
        "UNet is a UNet3DConditionModel, which takes other arguments",
    ),
    "a mask": (
        lambda folder: change(folder / "text_encoder" / "config.json", use_attention_mask=True),
        "needs an attention mask for padding",
    ),
    "another tokenizer": (
        lambda folder: change(folder / "text_encoder" / "config.json", vocab_size=7),
        "tokenizer does not match the model",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_defects_of_a_folder_are_named(folder: Path, case: str) -> None:
    spoil, words = CASES[case]
    spoil(folder)
    with pytest.raises(ModelError, match=words):
        check_model_folder(folder)


def test_complete_folder_is_accepted_and_every_part_is_checked(folder: Path) -> None:
    check_model_folder(folder)
    assert {file.parent.name for file in weight_files(folder)} == {"text_encoder", "unet", "vae"}
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(ModelError, match=r"conv_in\.bias"):
        check_weights_finite(folder)


def test_parameters_are_counted_by_part(folder: Path) -> None:
    parameters_by_part = {child.name: child.parameters for child in budget_of(folder).modules.children}
    model = load_pipeline(folder)
    expected = {name: sum(tensor.numel() for tensor in part.parameters()) for name, part in model.parts.items()}
    assert parameters_by_part == expected


def test_prompts_longer_than_text_encoder_positions_are_refused(folder: Path) -> None:
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=77)
    with pytest.raises(ModelError, match="padded to 77 tokens, and the text encoder has 12 places"):
        load_prompt_processor(folder)


@pytest.mark.parametrize("fields", [{"num_inference_steps": 0}, {"num_inference_steps": 2.5}, {"guidance_scale": "7"}])
def test_invalid_sampling_settings_are_refused(folder: Path, fields: dict[str, object]) -> None:
    (folder / SAMPLING).write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="steps and the guidance"):
        Sampling.read(folder)


def with_checker(folder: Path) -> None:
    """Add a safety checker of a tiny CLIP that flags every image."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 16, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=vision, projection_dim=8))
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-1)
    checker.save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder / "feature_extractor")
    change(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )


def test_recipe_decides_whether_the_safety_checker_is_kept(folder: Path, tmp_path: Path) -> None:
    with_checker(folder)
    from diffusers import DiffusionPipeline

    with pytest.raises(ModelError, match="safety checker") as refused:
        convert_pipeline(folder, tmp_path, None)
    assert "safety_checker: leave_out" in str(refused.value)
    without = convert_pipeline(folder, tmp_path, "leave_out")
    assert not (without / "safety_checker").exists()
    assert json.loads((without / "model_index.json").read_text())["safety_checker"] == [None, None]
    with_safety_checker = convert_pipeline(folder, tmp_path, "keep")
    assert (with_safety_checker / "safety_checker" / "model.safetensors").is_file()
    assert json.loads((folder / "model_index.json").read_text())["safety_checker"][0] == "stable_diffusion"
    (tmp_path / "saved").mkdir()
    model = load_pipeline(with_safety_checker)
    model.save(tmp_path / "saved")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    opened.set_progress_bar_config(disable=True)
    drawn = opened("a small boot", num_inference_steps=1, height=16, width=16)
    assert drawn.nsfw_content_detected == [True], "what was kept still looks at pictures"
    with pytest.raises(StageError, match="safety_checker cannot be exported"):
        diffusion_folder(model, {})


def test_converted_pipeline_has_only_the_used_files(folder: Path, tmp_path: Path) -> None:
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/old.bin", "v1-5-pruned.safetensors"):
        (folder / name).write_bytes(b"")
    converted = convert_pipeline(folder, tmp_path, None)
    unused = [path for pattern in ("*/*fp16*", "*/*.bin", "*.safetensors") for path in converted.glob(pattern)]
    assert unused == []
    assert json.loads((converted / "config.json").read_text()) == {"architectures": ["StableDiffusionPipeline"]}
    assert convert_pipeline(folder, tmp_path, None) == converted
    assert convert_pipeline(converted, tmp_path, None) == converted
    assert set(load_pipeline(converted).parts) == {"text_encoder", "unet", "vae"}


SETTINGS = DistillAutoencoder(width=8, layers=1, epochs=30, batch_size=8, learning_rate=5e-3, precision="fp32")


def pictures(rows: int = 8) -> np.ndarray:
    side = np.linspace(-1, 1, 16, dtype=np.float32)
    rng = np.random.default_rng(0)
    return np.stack([np.outer(side * a, side * b + c)[None] for a, b, c in rng.uniform(-1, 1, (rows, 3)).astype("f4")])


def test_tiny_autoencoder_learns_the_vae_decoder(tmp_path):
    vae = tiny_pipelines.parts()["vae"]
    examples = image_examples(vae, pictures())
    assert examples.inputs[0]["latents"].shape == (4, 8, 8)
    untaught = decoding_error(vae, build_tiny_autoencoder(vae, SETTINGS, 0), examples)
    context = tiny.context(scratch=tmp_path)
    small = train_tiny_autoencoder(vae, examples, examples, SETTINGS, context)
    assert decoding_error(vae, small, examples) < 0.6 * untaught
    assert "parameters of the decoder; images differ by" in context.notes[-1]
    latents = torch.from_numpy(np.stack([row["latents"] for row in examples.inputs]))
    with torch.no_grad():
        encoded = small.encode(torch.from_numpy(pictures())).latents
    assert (encoded - latents).square().mean() < latents.square().mean()


def test_encoder_features_equal_block_outputs():
    vae, seen, given = tiny_pipelines.parts()["vae"], [], torch.from_numpy(pictures(2))
    with torch.no_grad():
        with capture_outputs(dict(enumerate(vae.encoder.down_blocks)), lambda _, output: seen.append(output)):
            vae.encode(given)
        features = encoder_features(vae, given)
    assert len(features) == 2 and all(map(torch.equal, features, seen))


def test_feature_distance_ignores_vector_length():
    feature = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    other = torch.tensor([40.0, 30.0]).view(1, 2, 1, 1)
    assert float(feature_distance(feature, 9 * feature)) == pytest.approx(0.0, abs=1e-12)
    assert float(feature_distance(feature, other)) == pytest.approx(0.08, rel=1e-5)


def test_vae_of_another_class_is_refused():
    small = build_tiny_autoencoder(tiny_pipelines.parts()["vae"], SETTINGS, 0)
    with pytest.raises(StageError, match="AutoencoderTiny cannot be distilled into a small decoder"):
        build_tiny_autoencoder(small, SETTINGS, 0)


def test_costs_of_pipeline_parts_are_computed_and_shown(tmp_path: Path) -> None:
    folder = tiny_pipelines.pipeline_folder(tmp_path / "pipeline")
    budget = budget_of(folder, calls=True)
    assert budget.calls is not None
    unet, vae = budget.calls
    parts = tiny_pipelines.parts()
    for call in (unet, vae):
        assert call.parameters == sum(weight.numel() for weight in parts[call.part].parameters())
        assert call.fp32_bytes == 2 * call.fp16_bytes > 4 * call.parameters
        assert call.fp32_stored_attention_bytes >= call.fp32_bytes
    # AutoencoderTiny's config has no sample size, so that the UNet's latent size is used.
    small = build_tiny_autoencoder(parts["vae"], DistillAutoencoder(width=8, layers=1), seed=0)
    small.save_config(folder / "vae")
    multiplications = component_calls(folder)[1].multiplications
    assert multiplications == costs_of_component(small, 8).multiplications < vae.multiplications
    console = Console(width=120, record=True)
    write_budget(budget, 1, 0, console)
    assert "one call of" in console.export_text()


def test_folder_without_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="parts of a pipeline"):
        component_calls(tmp_path)


SMALL = {
    "_class_name": "AutoencoderTiny",
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
}


@pytest.mark.parametrize(
    ("config", "count"), [(SD15_UNET, 859_520_964), (SDXL_UNET, 2_567_463_684), (SD_VAE, 83_653_863)]
)
def test_published_models_have_published_parameter_counts(config, count):
    assert count_parameters(build_component_on_meta(config)) == count


@pytest.mark.parametrize(
    ("config", "blocks", "published"),
    [(SD15_UNET, (5, 5, 5, 1), 339), (BK_SDM_BASE, (3, 3, 3, 1), 224), (BK_SDM_TINY, (3, 3, 3, 0), 205)],
)
def test_unet_multiplications_equal_published_counts(config, blocks, published):
    # Kim et al. 2023 (BK-SDM), table 1: multiply-accumulates of one step at 512x512, of convolutions and linear layers.
    # Attention multiplies queries with keys, and the result with values.
    places = zip((64 * 64, 32 * 32, 16 * 16, 8 * 8), (320, 640, 1280, 1280), blocks, strict=True)
    attention = sum(2 * width * here * (here + 77) * count for here, width, count in places)
    unet = build_component_on_meta(config)
    assert (costs_of_component(unet).multiplications - attention) / 1e9 == pytest.approx(published, abs=0.5)


def test_memory_is_weights_plus_peak_of_live_tensors():
    costs = component_costs(SD15_UNET)
    # The largest attention matrix has 4096 x 4096 values for each of 8 heads; softmax allocates another one.
    matrix = 8 * 4096 * 4096
    assert matrix <= costs.stored_attention_values - costs.working_values <= 3 * matrix
    assert costs.memory_bytes(32) == 4 * (costs.parameters + costs.working_values)


def test_convolution_multiplications_equal_the_formula():
    convolutions, side = 0, 4
    for layer in build_component_on_meta(SMALL).decoder.layers:
        side *= 2 if isinstance(layer, nn.Upsample) else 1
        weights = [module.weight for module in layer.modules() if isinstance(module, nn.Conv2d)]
        convolutions += sum(weight.numel() for weight in weights) * side * side
    assert component_costs(SMALL, size=4).multiplications == convolutions
    assert component_costs(SMALL, batch=3, size=4).multiplications == 3 * convolutions


def test_memory_tracker_subtracts_freed_tensors():
    class Chain(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            wide = torch.cat([values] * 3)
            small = wide[:1] * 2
            del wide
            return small + small.expand(2, 10)

    module, values = Chain(), torch.zeros(2, 10, device="meta")
    alive = MemoryTracker(module)
    with alive:
        module(values)
    # The peak is 3 x 20 values plus the 10 computed from them, more than the 10 and 20 of the last operation.
    assert alive.peak_bytes == 4 * 70


def test_unsupported_components_are_refused_by_name():
    with pytest.raises(ModelError, match="'Strange'"):
        build_component_on_meta({"_class_name": "Strange"})
    with pytest.raises(ModelError, match="PixArtTransformer2DModel"):
        component_costs({"_class_name": "PixArtTransformer2DModel", "num_layers": 1, "sample_size": 8})
