"""Selection of blocks of diffusers' UNets, as a new UNet that its own config describes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from compress.plugins.diffusion.pipeline_model import import_diffusers
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from diffusers import ModelMixin, UNet2DConditionModel

BKSDMSize = Literal["base", "small", "tiny"]
_BY_STAGE = (
    *("block_out_channels", "down_block_types", "only_cross_attention", "cross_attention_dim"),
    *("attention_head_dim", "transformer_layers_per_block"),
)
"""Config fields that have, or may have, a value for each stage, from the outermost to the innermost."""
_STAGE_TENSOR = re.compile(r"^(down_blocks|up_blocks)\.(\d+)\.(?:(resnets|attentions)\.(\d+)\.)?(.*)$")


def require_unet(component: nn.Module) -> UNet2DConditionModel:
    """Return the component itself. Raises `StageError` if it is no UNet of Stable Diffusion."""
    is_unet, config = isinstance(component, import_diffusers().UNet2DConditionModel), getattr(component, "config", {})
    if not is_unet or config.get("reverse_transformer_layers_per_block"):
        raise StageError(
            f"The denoiser is a {type(component).__name__}, whose blocks and channels are not known here.",
            expected="a UNet2DConditionModel with the same transformer layers on the way down and up",
            hint="leave the stage out",
        )
    return component


def select_bk_sdm_blocks(unet: UNet2DConditionModel, size: BKSDMSize) -> UNet2DConditionModel:
    """Return a new UNet with the blocks of BK-SDM (Kim et al. 2023, section 3.1), and its own weights.

    Each stage keeps its first pair of resnet and attention on the way down, and its first and last pair on the way up,
    of which the last reads the stage above. ``small`` also has no middle block, and ``tiny`` no innermost stage.

    Raises:
        StageError: Nothing would be removed, the UNet has a single stage, or a remaining block would get inputs of
            another width than it takes.
    """
    removed_stages = int(size == "tiny")
    if len(unet.down_blocks) == removed_stages:
        raise StageError("A UNet of one stage has none to lose.", expected="base or small")
    changes: dict[str, object] = {"layers_per_block": 1}
    if size != "base":
        changes["mid_block_type"] = None
    if removed_stages:
        values = {name: unet.config.get(name) for name in _BY_STAGE}
        changes |= {name: tuple(value[:-1]) for name, value in values.items() if isinstance(value, list | tuple)}
        changes["up_block_types"] = tuple(unet.config.up_block_types[1:])
    smaller, state = build_like_on_meta(unet, changes), unet.state_dict()
    if len(smaller.state_dict()) == len(state):
        raise StageError(
            f"BK-SDM's {size} would leave this UNet as it is.", hint="choose a smaller one, or prune channels"
        )

    def source_name(name: str) -> str:
        """Return the tensor's name in ``unet``."""
        match = _STAGE_TENSOR.match(name)
        if match is None:
            return name
        side, block, layers, index, suffix = match.groups()
        if side == "down_blocks":
            return name
        # Up blocks are numbered from the innermost stage. The second of their pairs is the last one of ``unet``.
        number = int(block) + removed_stages
        if layers is None:
            return f"{side}.{number}.{suffix}"
        pair = len(unet.up_blocks[number].resnets) - 1 if int(index) else 0
        return f"{side}.{number}.{layers}.{pair}.{suffix}"

    sources = {name: source_name(name) for name in smaller.state_dict()}
    misfit = _first_misfit(smaller, sources, state)
    if misfit is not None:
        raise StageError(
            f"Without these blocks {misfit} would be given another number of channels than it takes.",
            expected="bk-sdm-base or bk-sdm-small, where the innermost stage is not as wide as the next",
        )
    return _load(smaller, {name: state[source] for name, source in sources.items()})


def _first_misfit(module: nn.Module, sources: Mapping[str, str], state: Mapping[str, torch.Tensor]) -> str | None:
    """Return the first layer whose source tensor is absent or has another shape."""
    for name, tensor in module.state_dict().items():
        source = state.get(sources[name])
        if source is None or source.shape != tensor.shape:
            return sources[name].rpartition(".")[0]
    return None


def build_like_on_meta(module: ModelMixin, changes: Mapping[str, object]) -> ModelMixin:
    """Build a module of the same class with a changed config, without weights.

    Raises:
        StageError: diffusers cannot build a module of the config.
    """
    config = {name: value for name, value in module.config.items() if not name.startswith("_")}
    try:
        with torch.device("meta"):
            return type(module).from_config({**config, **changes})
    except (ValueError, TypeError, RuntimeError, ArithmeticError, IndexError) as error:
        raise StageError(f"diffusers makes no {type(module).__name__} of {dict(changes)}: {error}") from error


def copy_with_config(module: ModelMixin, changes: Mapping[str, object]) -> ModelMixin:
    """Return a copy with a changed config, of a module whose tensors already have the shapes of that config.

    Raises:
        StageError: A layer has another shape.
    """
    copy, state = build_like_on_meta(module, changes), module.state_dict()
    misfit = _first_misfit(copy, {name: name for name in copy.state_dict()}, state)
    if misfit is None:
        misfit = next((name for name in state if name not in copy.state_dict()), None)
    if misfit is not None:
        raise StageError(
            f"The layer {misfit} of this {type(module).__name__} is not as its config would have it after pruning.",
            expected="a UNet of blocks that are known here",
            hint="remove blocks in place of channels, and report the architecture",
        )
    return _load(copy, state)


def _load(module: ModelMixin, state: Mapping[str, torch.Tensor]) -> ModelMixin:
    module.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    return module.eval()


def stage_blocks(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """Return the blocks by names that a UNet shares with its pruned version: `down 0` ..., `middle`, `up 0` ..."""
    blocks: dict[str, nn.Module] = {f"down {stage}": block for stage, block in enumerate(unet.down_blocks)}
    if unet.mid_block is not None:
        blocks["middle"] = unet.mid_block
    return blocks | {f"up {stage}": block for stage, block in enumerate(reversed(unet.up_blocks))}
