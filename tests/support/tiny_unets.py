"""UNets of diffusers with a few thousand random weights, and what they answer to the same noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

SIDE, TOKENS, TEXT_WIDTH = 8, 3, 12
SETTINGS: dict[str, Any] = {
    "sample_size": SIDE,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
}
THREE: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
UNCONDITIONAL: dict[str, Any] = {
    "sample_size": SIDE,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "norm_num_groups": 2,
}


def conditional(seed: int = 0, **changes: Any) -> Any:
    """A text-conditional one, with no weight at zero or one."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return stirred(UNet2DConditionModel(**{**SETTINGS, **changes}))


def unconditional(seed: int = 0, **changes: Any) -> Any:
    """One that is told the timestep alone."""
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    return stirred(UNet2DModel(**{**UNCONDITIONAL, **changes}))


@torch.no_grad()
def stirred(module: Any) -> Any:
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return module.eval()


def conditions(rows: int) -> dict[str, torch.Tensor]:
    """Text states [rows, tokens, width]."""
    return {"encoder_hidden_states": torch.randn(rows, TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(3))}


@torch.no_grad()
def answer(unet: Any, rows: int = 2) -> torch.Tensor:
    """What a UNet makes of the same noise at two timesteps."""
    sample = torch.randn(rows, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    arguments = conditions(rows) if "cross_attention_dim" in unet.config else {}
    found: torch.Tensor = unet.eval()(sample, torch.tensor([7, 600][:rows]), **arguments, return_dict=False)[0]
    return found


def latents(rows: int = 8, seed: int = 0, text: bool = True) -> Any:
    """Examples of latents, and of text states that say a little of them."""
    from compress.training.noised_latents import TEXT, latent_examples

    rng = np.random.default_rng(seed)
    clean = rng.standard_normal((rows, 4, SIDE, SIDE)).astype(np.float32)
    states = rng.standard_normal((rows, TOKENS, TEXT_WIDTH)).astype(np.float32)
    states[:, 0, 0] = clean.mean((1, 2, 3)) * 8
    return latent_examples(clean, {TEXT: list(states)} if text else {})
