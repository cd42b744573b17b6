"""Training data, architectures and losses of a small latent diffusion model and of the classifier of its images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.data.media import decode
from compress.data.samples.fetch import sample_directory
from compress.tasks.registry import TASKS
from compress.utils.environment import has_bf16
from compress.utils.progress import Progress

SOURCE, TEXT_MODEL = "sample:fashion-captions", "minilm"
SIZE, TOKENS, SCALE = 32, 16, 4
"""Image size in pixels, prompt length in tokens, and pixels per latent along a side."""
JUDGE = {
    "num_channels": 1,
    "embedding_size": 32,
    "hidden_sizes": [64, 128, 128],
    "depths": [1, 2, 1],
    "groups_width": 64,
    "layer_type": "x",
    "downsample_in_first_stage": False,
}
AUTOENCODER = {
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": SIZE,
}
UNET = {
    "sample_size": SIZE // SCALE,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 128, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 384,
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
"""Noise schedule of Nichol and Dhariwal (2021), which ends in pure noise, so that brightness is generated as well."""
_UNCONDITIONAL = 0.1
_KL_WEIGHT = 1e-3
_SHIFTS = ((-1, 2), (-1, 2), (0, 2))
"""Bounds of the random augmentation: rows down, columns right, mirrored or not."""


@dataclass(eq=False)
class CaptionedImages:
    """Images [n, 1, 32, 32] uint8 with indices of their classes and captions."""

    classes: list[str]
    captions: list[str]
    train: torch.Tensor
    kinds: torch.Tensor
    texts: torch.Tensor
    held_out: torch.Tensor
    held_out_kinds: torch.Tensor
    held_out_texts: list[str]

    @classmethod
    def read(cls, progress: Progress) -> CaptionedImages:
        """Load the train split, and the validation split as held-out images."""
        columns = TASKS["zero-shot-image-classification"].columns
        data = load_dataset(DataConfig(source=SOURCE), columns, Path(), progress)
        train, held_out = data.split("train"), data.split("validation")
        labels, texts = train["label"].to_pylist(), train["text"].to_pylist()
        classes, captions = sorted(set(labels)), sorted(set(texts))
        return cls(
            classes,
            captions,
            _pixels(train["image"].to_pylist()),
            torch.tensor([classes.index(label) for label in labels]),
            torch.tensor([captions.index(text) for text in texts]),
            _pixels(held_out["image"].to_pylist()),
            torch.tensor([classes.index(label) for label in held_out["label"].to_pylist()]),
            held_out["text"].to_pylist(),
        )

    def shorten(self, rows: int) -> None:
        """Use only the first ``rows`` images for training."""
        self.train, self.kinds, self.texts = self.train[:rows], self.kinds[:rows], self.texts[:rows]


def _pixels(images: list[Any]) -> torch.Tensor:
    """Decode and pad images to [n, 1, 32, 32] uint8."""
    conversions: Counter[str] = Counter()
    pixels = torch.from_numpy(np.stack([np.asarray(decode(image, "L", conversions)) for image in images]))
    edge = (SIZE - pixels.shape[-1]) // 2
    return functional.pad(pixels[:, None], (edge, edge, edge, edge))


def as_floats(pixels: torch.Tensor) -> torch.Tensor:
    """Scale 8-bit pixels to the range -1 to 1, as diffusers does."""
    return pixels.float() / 127.5 - 1.0


class Text:
    """MiniLM and its tokenizer, which truncates and pads prompts to 16 tokens; padding is not masked."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer, BertModel

        folder = sample_directory(TEXT_MODEL)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=TOKENS)
        self.encoder = BertModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def states(self, prompts: list[str]) -> torch.Tensor:
        """Return hidden states [n + 1, 16, 384] for the pipeline, those of the empty prompt last."""
        ids = self.tokenizer(
            [*prompts, ""], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        states: torch.Tensor = self.encoder(ids)[0]
        return states


def build_judge(classes: list[str]) -> Any:
    """Return the untrained classifier."""
    from transformers import RegNetConfig, RegNetForImageClassification

    names = dict(enumerate(classes))
    config = RegNetConfig(**JUDGE, id2label=names, label2id={name: index for index, name in names.items()})
    return RegNetForImageClassification(config).to(memory_format=torch.channels_last)


def build_autoencoder() -> Any:
    """Return the untrained autoencoder."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**AUTOENCODER).to(memory_format=torch.channels_last)


def build_unet() -> Any:
    """Return the untrained UNet."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET).to(memory_format=torch.channels_last)


Loss = Callable[[torch.Generator], torch.Tensor]


def judge_loss(judge: Any, images: CaptionedImages) -> Loss:
    """Return the cross-entropy of images that are randomly mirrored and shifted by up to a pixel."""

    def loss(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(images.train), (64,), generator=generator)
        down, right, mirrored = (int(torch.randint(*ends, (1,), generator=generator)) for ends in _SHIFTS)
        pixels = torch.roll(as_floats(images.train[rows]), (down, right), (2, 3))
        logits = judge(pixel_values=pixels.flip(3) if mirrored else pixels).logits
        return functional.cross_entropy(logits, images.kinds[rows])

    return loss


def autoencoder_loss(autoencoder: Any, images: CaptionedImages) -> Loss:
    """Return the L1 and squared error of the pixels plus the KL divergence of the latents."""

    def loss(generator: torch.Generator) -> torch.Tensor:
        pixels = as_floats(images.train[torch.randint(len(images.train), (64,), generator=generator)])
        posterior = autoencoder.encode(pixels).latent_dist
        error = autoencoder.decode(posterior.sample(generator)).sample - pixels
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss_value: torch.Tensor = error.abs().mean() + error.square().mean() + _KL_WEIGHT * divergence
        return loss_value

    return loss


def denoising_loss(unet: Any, images: CaptionedImages, latents: torch.Tensor, states: torch.Tensor) -> Loss:
    """Return the squared error of the velocity (Salimans and Ho 2022, section 4), with equal weights of the timesteps.

    Weights that decrease with the noise, like Min-SNR, would not train the first sampling step, which has pure noise.
    ``latents`` [n, 2, 4, 8, 8] are mean and standard deviation per image, ``states`` [captions + 1, 16, 384] the text
    states, those of the empty prompt last, which replaces one prompt in ten (Ho and Salimans 2022).
    """
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(**{name: value for name, value in SCHEDULE.items() if name != "steps_offset"})

    def loss(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(images.train), (128,), generator=generator)
        mean, spread = latents[rows].unbind(1)
        noise, sample = torch.randn(2, *mean.shape, generator=generator).unbind(0)
        clean = mean + spread * sample
        times = torch.randint(schedule.config.num_train_timesteps, (128,), generator=generator)
        dropped = torch.rand(128, generator=generator) < _UNCONDITIONAL
        prompts = states[torch.where(dropped, len(states) - 1, images.texts[rows])]
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
            prediction = unet(schedule.add_noise(clean, noise, times), times, prompts).sample
        error = prediction.float() - schedule.get_velocity(clean, noise, times)
        squared: torch.Tensor = error.square().mean()
        return squared

    return loss
