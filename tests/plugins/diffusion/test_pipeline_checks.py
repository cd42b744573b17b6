"""Folders in diffusers' layout that are not whole, or of two versions, are refused with what is wrong in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_pipelines import pipeline_folder

from compress.inspection.budget import budget_of
from compress.models.folder_checks import check_model_folder, check_weights_finite, weight_files
from compress.plugins.diffusion.onnx_export import diffusion_folder
from compress.plugins.diffusion.pipeline_model import load_pipeline
from compress.plugins.diffusion.sampling_settings import SAMPLING, Sampling, load_prompt_processor
from compress.plugins.diffusion.source_folder import convert_pipeline
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
        "told which tokens are padding",
    ),
    "another tokenizer": (
        lambda folder: change(folder / "text_encoder" / "config.json", vocab_size=7),
        "tokenizer does not match the model",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named(folder: Path, case: str) -> None:
    spoil, words = CASES[case]
    spoil(folder)
    with pytest.raises(ModelError, match=words):
        check_model_folder(folder)


def test_a_whole_one_is_taken_and_every_part_is_looked_at(folder: Path) -> None:
    check_model_folder(folder)
    assert {file.parent.name for file in weight_files(folder)} == {"text_encoder", "unet", "vae"}
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(ModelError, match=r"conv_in\.bias"):
        check_weights_finite(folder)


def test_bytes_are_told_by_part(folder: Path) -> None:
    parameters_by_part = {child.name: child.parameters for child in budget_of(folder).modules.children}
    model = load_pipeline(folder)
    expected = {name: sum(tensor.numel() for tensor in part.parameters()) for name, part in model.parts.items()}
    assert parameters_by_part == expected


def test_prompts_longer_than_the_text_encoder_can_place_are_refused(folder: Path) -> None:
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=77)
    with pytest.raises(ModelError, match="padded to 77 tokens, and the text encoder has 12 places"):
        load_prompt_processor(folder)


@pytest.mark.parametrize("fields", [{"num_inference_steps": 0}, {"num_inference_steps": 2.5}, {"guidance_scale": "7"}])
def test_sampling_that_makes_no_sense_is_refused(folder: Path, fields: dict[str, object]) -> None:
    (folder / SAMPLING).write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="steps and the guidance"):
        Sampling.read(folder)


def with_checker(folder: Path) -> None:
    """Give the pipeline a real checker, of a tiny CLIP, that objects to every picture."""
    import torch
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


def test_a_safety_checker_goes_or_stays_by_the_recipe_alone(folder: Path, tmp_path: Path) -> None:
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


def test_what_a_recipe_starts_from_has_the_parts_alone(folder: Path, tmp_path: Path) -> None:
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/old.bin", "v1-5-pruned.safetensors"):
        (folder / name).write_bytes(b"")
    converted = convert_pipeline(folder, tmp_path, None)
    assert (
        not list(converted.rglob("*fp16*"))
        and not list(converted.rglob("*.bin"))
        and not list(converted.glob("*.safetensors"))
    )
    assert json.loads((converted / "config.json").read_text()) == {"architectures": ["StableDiffusionPipeline"]}
    assert convert_pipeline(folder, tmp_path, None) == converted
    assert convert_pipeline(converted, tmp_path, None) == converted
    assert set(load_pipeline(converted).parts) == {"text_encoder", "unet", "vae"}
