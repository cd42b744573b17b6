"""Stable Diffusion pipelines with random weights that generate an image in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tiny_images
import torch
from stage_context import refuse_earlier, stage_context

from compress.data.dataset import Dataset
from compress.plugins.diffusion.pipeline_model import load_pipeline
from compress.plugins.diffusion.sampler import torch_sampler
from compress.stages.base import Context
from compress.tasks.registry import TASKS

WIDTH, TOKENS = 16, 12
WORDS = ("a", "picture", "of", "bag", "boot", "coat", "dress", "sandal", "shirt", "small", "dark", "the", "photo")
COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
"""Config fields of a scheduler with a cosine schedule and v-prediction."""


def denoiser(sample: np.ndarray, time: float) -> np.ndarray:
    """Return a nonlinear output in which every element depends on all of ``sample`` and on the timestep."""
    return np.tanh(sample + np.sin(time / 100) + sample.mean()).astype(np.float32)


def tokenizer(length: int = TOKENS) -> Any:
    """Return a BERT tokenizer whose vocabulary is the special tokens and ``WORDS``."""
    from transformers import BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate((*special, *WORDS))}
    return BertTokenizerFast(vocab=vocabulary, model_max_length=length)


def parts(seed: int = 0, **unet: Any) -> dict[str, Any]:
    """Return a text encoder of width 16, a UNet for 8x8 latents and a VAE for gray 16x16 images."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    text = BertConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=TOKENS,
    )
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
    )
    made = {"text_encoder": BertModel(text), "unet": UNet2DConditionModel(**{**settings, **unet}), "vae": vae}
    with torch.no_grad():
        for part in made.values():
            for parameter in part.parameters():
                # Zero-initialised layers would hide the effect of the layers after them.
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return {name: part.eval() for name, part in made.items()}


def pipeline(scheduler: Any = None, seed: int = 0, **unet: Any) -> Any:
    """Return a StableDiffusionPipeline of these components without a safety checker."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        **parts(seed, **unet),
        tokenizer=tokenizer(),
        scheduler=scheduler or DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pipeline_folder(folder: Path, **made: Any) -> Path:
    """Save such a pipeline in diffusers' layout and return the folder."""
    pipeline(**made).save_pretrained(folder)
    return folder


def captioned_context(scratch: Path, earlier: Callable[[str], Any] = refuse_earlier) -> Context:
    """Return a stage context whose training split has eight captioned images."""
    captions = [f"a {'dark' if row % 2 else 'small'} coat" for row in range(8)]
    rows = pa.table({"image": tiny_images.table(8)["image"], "text": captions})
    data = Dataset(TASKS["text-to-image"].columns, {"train": rows, "validation": rows.slice(0, 4), "test": rows}, ())
    return stage_context("text-to-image", data, 12, earlier=earlier, scratch=scratch)


def drawn(model: Any) -> np.ndarray:
    """Return the two images that torch_sampler generates for two prompts."""
    noise = np.stack([model.processor.noise(seed) for seed in range(2)])
    return torch_sampler(model).generate(model.processor.ids(["a coat", "a bag"]), noise, [0, 1])


def check_reopened(model: Any, folder: Path) -> Any:
    """Check that the saved model generates the same images, and return it as a diffusers pipeline."""
    from diffusers import DiffusionPipeline

    folder.mkdir()
    model.save(folder)
    np.testing.assert_array_equal(drawn(load_pipeline(folder)), drawn(model))
    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)
