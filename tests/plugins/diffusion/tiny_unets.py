"""diffusers UNets with a few thousand random weights, and their outputs for fixed noise."""

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


def conditional(seed: int = 0, **changes: Any) -> Any:
    """Return a text-conditional UNet whose weights are perturbed, so that none is exactly zero or one."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return stirred(UNet2DConditionModel(**{**SETTINGS, **changes}))


@torch.no_grad()
def stirred(module: Any) -> Any:
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return module.eval()


def conditions(rows: int) -> dict[str, torch.Tensor]:
    """Return the keyword argument with text states [rows, tokens, width]."""
    return {"encoder_hidden_states": torch.randn(rows, TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(3))}


@torch.no_grad()
def answer(unet: Any, rows: int = 2) -> torch.Tensor:
    """Return the UNet's output for fixed noise at timesteps 7 and 600."""
    sample = torch.randn(rows, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return unet.eval()(sample, torch.tensor([7, 600][:rows]), **conditions(rows), return_dict=False)[0]


def latents(rows: int = 8, seed: int = 0, text: bool = True) -> Any:
    """Return examples of random latents, and of text states that carry the mean of each latent."""
    from compress.plugins.diffusion.noised_latents import TEXT, latent_examples

    rng = np.random.default_rng(seed)
    clean = rng.standard_normal((rows, 4, SIDE, SIDE)).astype(np.float32)
    states = rng.standard_normal((rows, TOKENS, TEXT_WIDTH)).astype(np.float32)
    states[:, 0, 0] = clean.mean((1, 2, 3)) * 8
    return latent_examples(clean, {TEXT: list(states)} if text else {})


_BY_HEAD_OUT, _BY_HEAD_IN = ("to_q", "to_k", "to_v"), "to_out"


@torch.no_grad()
def doubled(make: Any, widths: tuple[int, ...], **changes: Any) -> tuple[Any, Any]:
    """Return a UNet with stages of ``widths``, and one twice as wide that computes the same function.

    In the wide one every channel, neuron and head is followed by a duplicate whose readers have zero weights, so that
    group and layer norms see the same mean and variance. Its time embedding has the same width as the small one's
    and reads every second sinusoid, which are the small one's sinusoids.
    """
    small = make(block_out_channels=widths, **changes)
    wider: dict[str, Any] = {
        "time_embedding_dim": small.time_embedding.linear_1.out_features,
        "attention_head_dim": 2 * small.config.attention_head_dim,
    }
    wide = make(block_out_channels=tuple(2 * width for width in widths), **changes, **wider)
    heads = {name: module.heads for name, module in small.named_modules() if hasattr(module, "to_q")}
    state, wide_state = small.state_dict(), wide.state_dict()
    for name, tensor in wide_state.items():
        value, layer = state[name], name.rpartition(".")[0]
        owner, _, last = layer.removesuffix(".0").rpartition(".")
        size = len(value) // heads[owner] if last in _BY_HEAD_OUT else 1
        if tensor.shape[0] == 2 * value.shape[0]:
            value = _twins(value, 0, size)
        if tensor.ndim > 1 and tensor.shape[1] == 2 * value.shape[1]:
            size = value.shape[1] // heads[owner] if last == _BY_HEAD_IN else 1
            units = torch.arange(2 * value.shape[1]) // size
            value = _twins(value, 1, size).movedim(1, 0)
            value[units % 2 == 1] = 0
            value = value.movedim(0, 1)
        tensor.copy_(value)
    return small, wide


def _twins(value: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Return the tensor with each block of ``size`` entries along ``axis`` repeated twice."""
    parts = value.movedim(axis, 0).unflatten(0, (-1, size))
    return parts.repeat_interleave(2, 0).flatten(0, 1).movedim(0, axis).clone()
