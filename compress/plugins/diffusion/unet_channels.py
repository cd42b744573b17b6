"""Coupled channels of diffusers' UNets, and UNets with narrower stages.

diffusers' config has one width for all layers of a stage, so that all sets of channels of a stage get the same width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.models.channel_coupling import CoupledLayer, Coupling, Side, remove_channels
from compress.plugins.diffusion.pipeline_model import import_diffusers
from compress.plugins.diffusion.unet_blocks import copy_with_config
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UpBlock2D

_SUPPORTED_BLOCKS = frozenset(
    {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn"}
)
_RCOND = 1e-5
"""Directions of sinusoids that are shorter than this share of the longest are rounding errors, and are not fitted."""
_SHIFTS = 8
"""Number of steps between the two ways to choose frequencies."""


@dataclass(frozen=True)
class ChannelSet:
    """A coupling of ``times`` as many channels as its stage is wide.

    ``unit`` adjacent channels, such as those of a head, stay or go together. Each of ``groups`` parts of equal size,
    the groups of a group norm, keeps equally many.
    """

    coupling: Coupling
    stage: int
    unit: int = 1
    groups: int = 1
    times: int = 1

    def select(self, gates: torch.Tensor, width: int) -> torch.Tensor:
        """Return the channels of a stage of ``width``: those with the largest sums of ``gates`` [size] by unit."""
        scores = self.scores(gates)
        count = width * self.times // (self.unit * self.groups)
        best = scores.view(self.groups, -1).sort(dim=1, descending=True, stable=True).indices[:, :count].sort().values
        units = (best + torch.arange(self.groups)[:, None] * (len(scores) // self.groups)).flatten()
        return (units[:, None] * self.unit + torch.arange(self.unit)).flatten()

    def scores(self, gates: torch.Tensor) -> torch.Tensor:
        """Return the importance |dL/d xi| of a gate xi on each unit [size / unit], from ``gates`` on channels."""
        return gates.view(-1, self.unit).sum(1).abs()

    def lost(self, gates: torch.Tensor, width: int) -> float:
        """Return the importance of the channels that a stage of ``width`` removes."""
        scores = self.scores(gates)
        remaining = self.select(gates, width)[:: self.unit] // self.unit
        return float(scores.sum() - scores[remaining].sum())


def channel_sets(unet: UNet2DConditionModel) -> list[ChannelSet]:
    """Return all sets of coupled channels, except those that the config fixes: time embedding, text states, latents.

    Raises:
        StageError: The UNet has blocks that are not supported.
    """
    blocks = [*unet.down_blocks, *unet.up_blocks, *([] if unet.mid_block is None else [unet.mid_block])]
    unknown = [name for block in blocks if (name := type(block).__name__) not in _SUPPORTED_BLOCKS]
    config = unet.config
    if config.norm_num_groups is None:
        unknown.append("a UNet without group norms")
    if config.get("attention_type", "default") != "default":
        unknown.append(f"attention_type {config.attention_type!r}")
    if config.get("dual_cross_attention"):
        unknown.append("dual_cross_attention")
    if unknown:
        raise StageError(
            f"The channels of this UNet cannot be pruned: {unknown[0]} is not known here.",
            expected="blocks of " + ", ".join(sorted(_SUPPORTED_BLOCKS)),
            hint="remove blocks in place of channels, and report the architecture",
        )
    return _ChannelTracer(unet).trace()


class _ChannelTracer:
    """Tracer that follows a UNet's forward pass and records which layers write and read each set of channels.

    Sets are named by their index.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._unet, self._models = unet, import_diffusers().models
        self._groups = int(unet.config.norm_num_groups)
        self._sizes: list[tuple[int, int, int, int, int]] = []
        """Size, stage, unit, groups and times of each set."""
        self._layers: list[list[CoupledLayer]] = []

    def trace(self) -> list[ChannelSet]:
        """Return the sets of the whole UNet."""
        unet = self._unet
        hidden = self._add_stream(0)
        self._couple(hidden, "conv_in", "out")
        # Skip connections are read in reverse order on the way up.
        skipped = [hidden]
        for stage, block in enumerate(unet.down_blocks):
            name = f"down_blocks.{stage}"
            for index in range(len(block.resnets)):
                hidden = self._trace_pair(name, block, index, [hidden], stage)
                skipped.append(hidden)
            for index, sampler in enumerate(block.downsamplers or ()):
                hidden = self._trace_resampler(f"{name}.downsamplers.{index}", sampler, hidden, stage)
                skipped.append(hidden)
        last = len(unet.down_blocks) - 1
        if unet.mid_block is not None:
            hidden = self._trace_resnet("mid_block.resnets.0", unet.mid_block.resnets[0], [hidden], last)
            for index, resnet in enumerate(list(unet.mid_block.resnets)[1:]):
                self._trace_attention(f"mid_block.attentions.{index}", unet.mid_block.attentions[index], hidden, last)
                hidden = self._trace_resnet(f"mid_block.resnets.{index + 1}", resnet, [hidden], last)
        for number, block in enumerate(unet.up_blocks):
            name, stage = f"up_blocks.{number}", last - number
            for index in range(len(block.resnets)):
                hidden = self._trace_pair(name, block, index, [hidden, skipped.pop()], stage)
            for index, sampler in enumerate(block.upsamplers or ()):
                hidden = self._trace_resampler(f"{name}.upsamplers.{index}", sampler, hidden, stage)
        self._couple(hidden, "conv_norm_out", "both")
        self._couple(hidden, "conv_out", "in")
        return [
            ChannelSet(Coupling(size, 1, tuple(layers)), stage, unit, groups, times)
            for (size, stage, unit, groups, times), layers in zip(self._sizes, self._layers, strict=True)
        ]

    def _add_set(self, size: int, stage: int, unit: int = 1, groups: int = 1, times: int = 1) -> int:
        self._sizes.append((size, stage, unit, groups, times))
        self._layers.append([])
        return len(self._sizes) - 1

    def _add_stream(self, stage: int) -> int:
        return self._add_set(int(self._unet.config.block_out_channels[stage]), stage, groups=self._groups)

    def _couple(self, channels: int, layer: str, side: Side, offset: int = 0, repeats: int = 1) -> None:
        """Add a layer to a set: its features from ``offset`` on are the channels, ``repeats`` times in a row."""
        size = self._sizes[channels][0]
        features = torch.arange(size * repeats)
        self._layers[channels].append(CoupledLayer(layer, side, features + offset, features % size))

    def _connect(self, layer: str, source: int, target: int) -> None:
        """Add a layer that reads one set and writes another."""
        self._couple(source, layer, "in")
        self._couple(target, layer, "out")

    def _trace_pair(
        self, name: str, block: DownBlock2D | UpBlock2D, index: int, inputs: Sequence[int], stage: int
    ) -> int:
        hidden = self._trace_resnet(f"{name}.resnets.{index}", block.resnets[index], inputs, stage)
        if hasattr(block, "attentions"):
            self._trace_attention(f"{name}.attentions.{index}", block.attentions[index], hidden, stage)
        return hidden

    def _trace_resnet(self, name: str, resnet: object, inputs: Sequence[int], stage: int) -> int:
        """Return the output's set: a new one, or that of the input if the resnet only adds to it."""
        if not isinstance(resnet, self._models.resnet.ResnetBlock2D):
            raise self._unsupported(name, resnet)
        has_shortcut, offset = resnet.conv_shortcut is not None, 0
        # The inputs are concatenated: the hidden states, then a skip connection.
        for channels in inputs:
            self._couple(channels, f"{name}.norm1", "both", offset)
            self._couple(channels, f"{name}.conv1", "in", offset)
            if has_shortcut:
                self._couple(channels, f"{name}.conv_shortcut", "in", offset)
            offset += self._sizes[channels][0]
        inner = self._add_stream(stage)
        self._couple(inner, f"{name}.conv1", "out")
        if resnet.time_emb_proj is not None:
            # The time embedding may give a scale and a shift of each channel.
            repeats = resnet.time_emb_proj.out_features // resnet.conv1.out_channels
            self._couple(inner, f"{name}.time_emb_proj", "out", repeats=repeats)
        self._couple(inner, f"{name}.norm2", "both")
        output = self._add_stream(stage) if has_shortcut else inputs[0]
        self._connect(f"{name}.conv2", inner, output)
        if has_shortcut:
            self._couple(output, f"{name}.conv_shortcut", "out")
        return output

    def _trace_resampler(self, name: str, sampler: object, hidden: int, stage: int) -> int:
        if not isinstance(getattr(sampler, "conv", None), nn.Conv2d):
            return hidden
        output = self._add_stream(stage)
        self._connect(f"{name}.conv", hidden, output)
        return output

    def _trace_attention(self, name: str, module: object, hidden: int, stage: int) -> None:
        if not isinstance(module, self._models.Transformer2DModel):
            raise self._unsupported(name, module)
        inner = self._add_set(module.inner_dim, stage)
        self._couple(hidden, f"{name}.norm", "both")
        self._connect(f"{name}.proj_in", hidden, inner)
        for index, block in enumerate(module.transformer_blocks):
            self._trace_transformer_block(f"{name}.transformer_blocks.{index}", block, inner, stage)
        self._connect(f"{name}.proj_out", inner, hidden)

    def _trace_transformer_block(self, name: str, block: BasicTransformerBlock, inner: int, stage: int) -> None:
        for norm in ("norm1", "norm2", "norm3"):
            if getattr(block, norm) is not None:
                self._couple(inner, f"{name}.{norm}", "both")
        for part in ("attn1", "attn2"):
            if (attention := getattr(block, part)) is not None:
                self._trace_heads(f"{name}.{part}", attention, inner, stage)
        up, down = block.ff.net[0].proj, block.ff.net[2]
        size = down.in_features
        neurons = self._add_set(size, stage, times=size // self._sizes[inner][0])
        self._couple(inner, f"{name}.ff.net.0.proj", "in")
        # A gated activation has two outputs for each neuron.
        self._couple(neurons, f"{name}.ff.net.0.proj", "out", repeats=up.out_features // size)
        self._connect(f"{name}.ff.net.2", neurons, inner)

    def _trace_heads(self, name: str, attention: Attention, stream: int, stage: int) -> None:
        """Couple queries, keys and values by head. Keys and values of cross-attention read text states, which stay."""
        channels = self._add_set(attention.inner_dim, stage, unit=attention.inner_dim // attention.heads)
        for layer in ("to_q", "to_k", "to_v"):
            if layer == "to_q" or not attention.is_cross_attention:
                self._couple(stream, f"{name}.{layer}", "in")
            self._couple(channels, f"{name}.{layer}", "out")
        self._connect(f"{name}.to_out.0", channels, stream)

    def _unsupported(self, name: str, module: object) -> StageError:
        return StageError(
            f"The channels of this UNet cannot be pruned: {name} is a {type(module).__name__}.",
            hint="remove blocks in place of channels, and report the architecture",
        )


def width_steps(unet: UNet2DConditionModel, sets: Sequence[ChannelSet]) -> list[int]:
    """Return the number that each stage's width must be a multiple of, for group norms and whole heads."""
    units: list[list[int]] = [[int(unet.config.norm_num_groups)] for _ in unet.config.block_out_channels]
    for channel_set in sets:
        units[channel_set.stage].append(channel_set.unit)
    return [math.lcm(*stage_units) for stage_units in units]


def tied_stages(unet: UNet2DConditionModel) -> list[list[int]]:
    """Return groups of stages that must stay equally wide: resnets between them have no shortcut convolution."""
    widths = unet.config.block_out_channels
    return [list(stages) for _, stages in groupby(range(len(widths)), key=lambda stage: widths[stage])]


def narrow_unet(
    unet: UNet2DConditionModel,
    sets: Sequence[ChannelSet],
    gates: Sequence[torch.Tensor],
    widths: Sequence[int],
    timesteps: int = 1000,
) -> UNet2DConditionModel:
    """Return a UNet with narrower stages; the weights of ``unet`` are consumed.

    The time embedding keeps its width. If the outermost stage gets narrower, the timestep has fewer sinusoids.

    Args:
        unet: UNet to prune.
        sets: Its sets of coupled channels.
        gates: Importance of the channels of each set, [size]. Those with the largest stay.
        widths: Channels of each stage.
        timesteps: Number of timesteps at which the time embedding is fitted.

    Raises:
        StageError: The config cannot describe the widths.
    """
    cuts = [
        (channel_set.coupling, channel_set.select(scores, widths[channel_set.stage]))
        for channel_set, scores in zip(sets, gates, strict=True)
    ]
    changes = narrow_config(unet, sets, widths)
    if widths[0] != unet.config.block_out_channels[0]:
        changes["freq_shift"] = _fit_time_embedding(unet, widths[0], timesteps)
    remove_channels(unet, cuts)
    return copy_with_config(unet, changes)


def narrow_config(unet: UNet2DConditionModel, sets: Sequence[ChannelSet], widths: Sequence[int]) -> dict[str, object]:
    """Return the config fields that narrower stages change. Heads keep their size, so their number falls."""
    config, before = unet.config, unet.config.block_out_channels
    changes: dict[str, object] = {"block_out_channels": tuple(widths)}
    if widths[0] != before[0]:
        changes["time_embedding_dim"] = int(unet.time_embedding.linear_1.out_features)
    # diffusers' attention_head_dim is the number of heads.
    heads = config.attention_head_dim
    heads = [heads] * len(before) if isinstance(heads, int) else list(heads)
    attended = {channel_set.stage for channel_set in sets if channel_set.coupling.name.endswith(".to_q")}
    changes["attention_head_dim"] = tuple(
        count * widths[stage] // before[stage] if stage in attended else count for stage, count in enumerate(heads)
    )
    return changes


@torch.no_grad()
def _fit_time_embedding(unet: UNet2DConditionModel, width: int, timesteps: int) -> int:
    """Fit the layer that reads sinusoids to ``width`` of them, in place, and return their ``freq_shift``.

    Raises:
        StageError: The UNet has no sinusoids of the timestep.
    """
    config = unet.config
    if config.time_embedding_type != "positional":
        raise StageError(
            f"The outermost stage of a UNet with time_embedding_type {config.time_embedding_type!r} cannot be pruned.",
            expected="time_embedding_type positional",
            hint="remove blocks in place of channels",
        )
    reader, steps = unet.time_embedding.linear_1, torch.arange(timesteps)
    first_weight = reader.weight.double()
    target = unet.time_proj(steps).double() @ first_weight.T

    def fit(shift: int) -> tuple[float, torch.Tensor]:
        """Return the squared error of the least-squares weights [out, width] for sinusoids of a shift, and these."""
        sinusoids = import_diffusers().models.embeddings.Timesteps(width, config.flip_sin_to_cos, shift)(steps).double()
        weights = torch.linalg.lstsq(sinusoids, target, rcond=_RCOND, driver="gelsd").solution
        return float((sinusoids @ weights - target).square().mean()), weights.T

    # The shift spreads the frequencies over the former range, selects the highest of them, or something between.
    removed = int(unet.time_proj.num_channels) // 2 - width // 2
    shifts = sorted({config.freq_shift - round(removed * step / _SHIFTS) for step in range(_SHIFTS + 1)}, reverse=True)
    fits = {shift: fit(shift) for shift in shifts}
    best = min(fits, key=lambda shift: fits[shift][0])
    reader.weight, reader.in_features = nn.Parameter(fits[best][1].to(reader.weight.dtype)), width
    condition = unet.time_embedding.cond_proj
    if condition is not None:
        # The guidance embedding is added to the sinusoids. Solve for one that has the same effect on the next layer.
        product = first_weight @ condition.weight.double()
        solved = torch.linalg.lstsq(reader.weight.double(), product).solution
        condition.weight, condition.out_features = nn.Parameter(solved.to(condition.weight.dtype)), width
    return int(best)
