"""diffusers' UNets with narrower stages, as their own config can say it: one width for all that lies in a stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.models.channel_coupling import Cut, remove_channels
from compress.plugins.diffusion.sampling_settings import import_diffusers
from compress.plugins.diffusion.unet_blocks import with_config
from compress.plugins.diffusion.unet_channels import ChannelSet
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


_SMALLEST = 1e-5
"""Directions of sinusoids that are so much shorter than the longest are not fitted: they are rounding."""
_TRIED = 8
"""Steps between the two ways to choose frequencies."""


def width_steps(unet: UNet2DConditionModel, sets: Sequence[ChannelSet]) -> list[int]:
    """The number of which each stage's width must be a multiple: of groups, and of whole heads."""
    groups = int(unet.config.norm_num_groups)
    inside = int(unet.config.get("attn_norm_num_groups") or 1)
    units: list[list[int]] = [[groups] for _ in unet.config.block_out_channels]
    units[-1].append(inside)
    for one in sets:
        units[one.stage].append(one.unit)
    return [math.lcm(*found) for found in units]


def tied_stages(unet: UNet2DConditionModel) -> list[list[int]]:
    """Stages that must be equally wide, since they are now: a resnet between them then has no convolution around it."""
    tied: list[list[int]] = []
    widths = unet.config.block_out_channels
    for stage, width in enumerate(widths):
        if stage and width == widths[stage - 1]:
            tied[-1].append(stage)
        else:
            tied.append([stage])
    return tied


def check_widths(unet: UNet2DConditionModel, widths: Sequence[int], sets: Sequence[ChannelSet]) -> None:
    """Raises `StageError` for widths that the UNet's config, groups and heads don't allow."""
    before, steps = unet.config.block_out_channels, width_steps(unet, sets)
    if len(widths) != len(before) or any(
        new < 1 or new > old or new % step for new, old, step in zip(widths, before, steps, strict=True)
    ):
        raise StageError(
            f"A UNet with stages of {list(before)} channels cannot be cut to {list(widths)}.",
            where="block_out_channels",
            expected=f"as many or fewer in each stage, in multiples of {steps}: of the groups of group norm and of "
            "whole attention heads",
        )
    for stage in range(1, len(widths)):
        if (before[stage] == before[stage - 1]) != (widths[stage] == widths[stage - 1]):
            raise StageError(
                f"Stages {stage - 1} and {stage} have {before[stage - 1]} and {before[stage]} channels and would have "
                f"{widths[stage - 1]} and {widths[stage]}.",
                where="block_out_channels",
                expected="neighbours that are equally wide to stay so, and others to stay apart: diffusers puts a "
                "convolution between these alone",
            )


def narrow(
    unet: UNet2DConditionModel,
    sets: Sequence[ChannelSet],
    gates: Sequence[torch.Tensor],
    widths: Sequence[int],
    timesteps: int = 1000,
) -> UNet2DConditionModel:
    """A UNet with stages of ``widths`` channels: those of each set with the largest ``gates`` [size].

    ``unet`` is spent. The time embedding keeps its width. Where the outermost stage gets narrower, there are fewer
    sinusoids of the timestep; the layer that reads them is fitted to what it made of all of them at ``timesteps`` steps
    (least squares), and ``freq_shift`` says which frequencies they have: those with which that fits best.
    Raises `StageError` for widths that the config cannot say.
    """
    check_widths(unet, widths, sets)
    cuts: list[Cut] = [
        (one.coupling, one.kept(scores, widths[one.stage])) for one, scores in zip(sets, gates, strict=True)
    ]
    changes = narrow_config(unet, sets, widths)
    if widths[0] != unet.config.block_out_channels[0]:
        changes["freq_shift"] = _fit_time_embedding(unet, widths[0], timesteps)
    remove_channels(unet, cuts)
    return with_config(unet, changes)


def narrow_config(unet: UNet2DConditionModel, sets: Sequence[ChannelSet], widths: Sequence[int]) -> dict[str, Any]:
    """What the config says of a UNet with stages of ``widths``, where it says otherwise: heads keep their size."""
    config, before = unet.config, unet.config.block_out_channels
    changes: dict[str, Any] = {"block_out_channels": tuple(widths)}
    if widths[0] != before[0]:
        changes["time_embedding_dim"] = int(unet.time_embedding.linear_1.out_features)
    if "cross_attention_dim" in config:
        heads = config.attention_head_dim
        heads = [heads] * len(before) if isinstance(heads, int) else list(heads)
        attended = {one.stage for one in sets if one.coupling.name.endswith(".to_q")}
        changes["attention_head_dim"] = tuple(
            count * widths[stage] // before[stage] if stage in attended else count for stage, count in enumerate(heads)
        )
    return changes


@torch.no_grad()
def _fit_time_embedding(unet: UNet2DConditionModel, width: int, timesteps: int) -> int:
    """Let the layers that read sinusoids read ``width`` of them, in place; gives their ``freq_shift``.

    Spread over all frequencies there are, or the highest of these, or something between. Raises `StageError`.
    """
    config = unet.config
    if config.time_embedding_type != "positional":
        raise StageError(
            f"The outermost stage of a UNet with time_embedding_type {config.time_embedding_type!r} cannot be cut.",
            where="block_out_channels",
            expected="time_embedding_type positional",
            hint="leave the first of block_out_channels as it is",
        )
    readers = [unet.time_embedding.linear_1]
    if config.class_embed_type == "timestep":
        readers.append(unet.class_embedding.linear_1)
    steps = torch.arange(timesteps)
    wanted = unet.time_proj(steps).double() @ torch.cat([layer.weight.double() for layer in readers]).T
    gone = int(unet.time_proj.num_channels) // 2 - width // 2
    shifts = sorted({config.freq_shift - round(gone * place / _TRIED) for place in range(_TRIED + 1)}, reverse=True)
    fits = [_fit(width, config, shift, steps, wanted) for shift in shifts]
    best = min(range(len(fits)), key=lambda place: fits[place][0])
    before = readers[0].weight.double()
    weights, start = fits[best][1], 0
    for layer in readers:
        own = weights[start : start + layer.out_features]
        layer.weight, layer.in_features = nn.Parameter(own.to(layer.weight.dtype)), width
        start += layer.out_features
    told = unet.time_embedding.cond_proj
    if told is not None:
        # What it adds to the sinusoids is to be read as it was.
        solved = torch.linalg.lstsq(readers[0].weight.double(), before @ told.weight.double()).solution
        told.weight, told.out_features = nn.Parameter(solved.to(told.weight.dtype)), width
    return int(shifts[best])


def _fit(width: int, config: Any, shift: int, steps: torch.Tensor, wanted: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The squared error of the best weights [out, width] for sinusoids of that shift, and these."""
    sinusoids = import_diffusers().models.embeddings.Timesteps(width, config.flip_sin_to_cos, shift)(steps).double()
    weights = torch.linalg.lstsq(sinusoids, wanted, rcond=_SMALLEST, driver="gelsd").solution
    return float((sinusoids @ weights - wanted).square().mean()), weights.T
