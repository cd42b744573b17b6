"""Which channels of diffusers' UNets stand or fall together.

diffusers' config knows one width for all that lies in a stage, so that all its sets of channels get as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.models.channel_coupling import CoupledLayer, Coupling, Side
from compress.plugins.diffusion.sampling_settings import import_diffusers
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


_KNOWN = frozenset(
    {"DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D"}
    | {"UNetMidBlock2D", "UNetMidBlock2DCrossAttn"}
)


@dataclass(frozen=True)
class ChannelSet:
    """A coupling of ``times`` as many channels as its stage is wide.

    ``unit`` channels side by side are one thing: a head's. Of each of ``groups`` parts of equal size, those of a group
    norm, as many stay.
    """

    coupling: Coupling
    stage: int
    unit: int = 1
    groups: int = 1
    times: int = 1

    def kept(self, gates: torch.Tensor, width: int) -> torch.Tensor:
        """The channels that stay in a stage of ``width``: those with the largest sums of ``gates`` [size] by unit."""
        scores = self.scores(gates)
        count = width * self.times // (self.unit * self.groups)
        best = scores.view(self.groups, -1).sort(dim=1, descending=True, stable=True).indices[:, :count].sort().values
        units = (best + torch.arange(self.groups)[:, None] * (len(scores) // self.groups)).flatten()
        return (units[:, None] * self.unit + torch.arange(self.unit)).flatten()

    def scores(self, gates: torch.Tensor) -> torch.Tensor:
        """The importance |dL/d xi| of one gate xi on each unit [size / unit], of ``gates`` [size] on its channels."""
        return gates.view(-1, self.unit).sum(1).abs()


def channel_sets(unet: UNet2DConditionModel) -> list[ChannelSet]:
    """Every set of channels of a UNet's stages, but for what the config fixes: time embedding, text states, latents.

    Raises `StageError` for blocks that are not known here.
    """
    _check_known(unet)
    return _Walk(unet).sets()


def _check_known(unet: UNet2DConditionModel) -> None:
    blocks = [*unet.down_blocks, *unet.up_blocks, *([] if unet.mid_block is None else [unet.mid_block])]
    strange = next((type(block).__name__ for block in blocks if type(block).__name__ not in _KNOWN), None)
    config = unet.config
    if strange is None and config.norm_num_groups is None:
        strange = "a UNet without group norms"
    if strange is None and config.get("attention_type", "default") != "default":
        strange = f"attention_type {config.attention_type!r}"
    if strange is None and "cross_attention_dim" not in config and config.attention_head_dim is None:
        strange = "attention in one head of a stage's width"
    if strange is None and config.get("dual_cross_attention"):
        strange = "dual_cross_attention"
    if strange is not None:
        raise StageError(
            f"The channels of this UNet cannot be cut: {strange} is not known here.",
            expected="blocks of " + ", ".join(sorted(_KNOWN)),
            hint="remove blocks in place of channels, and report the architecture",
        )


class _Walk:
    """Goes through a UNet as its forward pass does, and notes who makes and who reads which channels."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._unet, self._models = unet, import_diffusers().models
        self._groups = int(unet.config.norm_num_groups)
        self._about: list[tuple[int, int, int, int, int]] = []
        """Size, stage, unit, groups and times of each set."""
        self._parts: list[list[CoupledLayer]] = []

    def sets(self) -> list[ChannelSet]:
        """Of the whole UNet."""
        unet = self._unet
        hidden = self._stream(0)
        self._note(hidden, "conv_in", "out")
        skipped = [hidden]
        for stage, block in enumerate(unet.down_blocks):
            name = f"down_blocks.{stage}"
            for place in range(len(block.resnets)):
                hidden = self._pair(name, block, place, [hidden], stage)
                skipped.append(hidden)
            for place, sampler in enumerate(block.downsamplers or ()):
                hidden = self._resampled(f"{name}.downsamplers.{place}", sampler, hidden, stage)
                skipped.append(hidden)
        last = len(unet.down_blocks) - 1
        if unet.mid_block is not None:
            hidden = self._resnet("mid_block.resnets.0", unet.mid_block.resnets[0], [hidden], last)
            for place, resnet in enumerate(list(unet.mid_block.resnets)[1:]):
                self._attention(f"mid_block.attentions.{place}", unet.mid_block.attentions[place], hidden, last)
                hidden = self._resnet(f"mid_block.resnets.{place + 1}", resnet, [hidden], last)
        for number, block in enumerate(unet.up_blocks):
            name, stage = f"up_blocks.{number}", last - number
            for place in range(len(block.resnets)):
                hidden = self._pair(name, block, place, [hidden, skipped.pop()], stage)
            for place, sampler in enumerate(block.upsamplers or ()):
                hidden = self._resampled(f"{name}.upsamplers.{place}", sampler, hidden, stage)
        self._note(hidden, "conv_norm_out", "both")
        self._note(hidden, "conv_out", "in")
        return [
            ChannelSet(Coupling(size, 1, tuple(parts)), stage, unit, groups, times)
            for (size, stage, unit, groups, times), parts in zip(self._about, self._parts, strict=True)
        ]

    def _new(self, size: int, stage: int, unit: int = 1, groups: int = 1, times: int = 1) -> int:
        self._about.append((size, stage, unit, groups, times))
        self._parts.append([])
        return len(self._about) - 1

    def _stream(self, stage: int) -> int:
        return self._new(int(self._unet.config.block_out_channels[stage]), stage, groups=self._groups)

    def _note(self, one: int, layer: str, side: Side, offset: int = 0, repeats: int = 1) -> None:
        """The channels of a set are those of a layer from ``offset`` on, ``repeats`` times behind each other."""
        size = self._about[one][0]
        features = torch.arange(size * repeats)
        self._parts[one].append(CoupledLayer(layer, side, features + offset, features % size))

    def _pair(self, name: str, block: Any, place: int, inputs: Sequence[int], stage: int) -> int:
        hidden = self._resnet(f"{name}.resnets.{place}", block.resnets[place], inputs, stage)
        if hasattr(block, "attentions"):
            self._attention(f"{name}.attentions.{place}", block.attentions[place], hidden, stage)
        return hidden

    def _resnet(self, name: str, resnet: object, inputs: Sequence[int], stage: int) -> int:
        """What it gives: a set of its own, or what it is given where nothing but itself is added to that."""
        if not isinstance(resnet, self._models.resnet.ResnetBlock2D):
            raise self._strange(name, resnet)
        around, offset = resnet.conv_shortcut is not None, 0
        for one in inputs:
            readers: tuple[tuple[str, Side], ...] = (("norm1", "both"), ("conv1", "in"))
            for layer, side in (*readers, *([("conv_shortcut", "in")] if around else [])):
                self._note(one, f"{name}.{layer}", side, offset)  # type: ignore[arg-type]
            offset += self._about[one][0]
        inner = self._stream(stage)
        self._note(inner, f"{name}.conv1", "out")
        if resnet.time_emb_proj is not None:
            doubled = resnet.time_emb_proj.out_features // resnet.conv1.out_channels
            self._note(inner, f"{name}.time_emb_proj", "out", repeats=doubled)
        self._note(inner, f"{name}.norm2", "both")
        self._note(inner, f"{name}.conv2", "in")
        given = self._stream(stage) if around else inputs[0]
        self._note(given, f"{name}.conv2", "out")
        if around:
            self._note(given, f"{name}.conv_shortcut", "out")
        return given

    def _resampled(self, name: str, sampler: object, hidden: int, stage: int) -> int:
        if isinstance(sampler, self._models.resnet.ResnetBlock2D):
            return self._resnet(name, sampler, [hidden], stage)
        if not isinstance(getattr(sampler, "conv", None), nn.Conv2d):
            return hidden
        self._note(hidden, f"{name}.conv", "in")
        given = self._stream(stage)
        self._note(given, f"{name}.conv", "out")
        return given

    def _attention(self, name: str, module: object, hidden: int, stage: int) -> None:
        if module is None:
            return
        if isinstance(module, self._models.attention_processor.Attention):
            self._note(hidden, f"{name}.group_norm", "both")
            self._heads(name, module, hidden, stage)
        elif isinstance(module, self._models.Transformer2DModel):
            inner = self._new(module.inner_dim, stage)
            self._note(hidden, f"{name}.norm", "both")
            self._note(hidden, f"{name}.proj_in", "in")
            self._note(inner, f"{name}.proj_in", "out")
            for place, block in enumerate(module.transformer_blocks):
                self._transformer_block(f"{name}.transformer_blocks.{place}", block, inner, stage)
            self._note(inner, f"{name}.proj_out", "in")
            self._note(hidden, f"{name}.proj_out", "out")
        else:
            raise self._strange(name, module)

    def _transformer_block(self, name: str, block: Any, inner: int, stage: int) -> None:
        for norm in ("norm1", "norm2", "norm3"):
            if getattr(block, norm) is not None:
                self._note(inner, f"{name}.{norm}", "both")
        for attention in ("attn1", "attn2"):
            if getattr(block, attention) is not None:
                self._heads(f"{name}.{attention}", getattr(block, attention), inner, stage)
        rises, falls = block.ff.net[0].proj, block.ff.net[2]
        size = falls.in_features
        neurons = self._new(size, stage, times=size // self._about[inner][0])
        self._note(inner, f"{name}.ff.net.0.proj", "in")
        self._note(neurons, f"{name}.ff.net.0.proj", "out", repeats=rises.out_features // size)
        self._note(neurons, f"{name}.ff.net.2", "in")
        self._note(inner, f"{name}.ff.net.2", "out")

    def _heads(self, name: str, attention: Any, stream: int, stage: int) -> None:
        """Queries, keys and values by head; keys and values of a text are made of its states, which stay."""
        heads = self._new(attention.inner_dim, stage, unit=attention.inner_dim // attention.heads)
        for layer in ("to_q", "to_k", "to_v"):
            if layer == "to_q" or not attention.is_cross_attention:
                self._note(stream, f"{name}.{layer}", "in")
            self._note(heads, f"{name}.{layer}", "out")
        self._note(heads, f"{name}.to_out.0", "in")
        self._note(stream, f"{name}.to_out.0", "out")

    def _strange(self, name: str, module: object) -> StageError:
        return StageError(
            f"The channels of this UNet cannot be cut: {name} is a {type(module).__name__}.",
            hint="remove blocks in place of channels, and report the architecture",
        )
