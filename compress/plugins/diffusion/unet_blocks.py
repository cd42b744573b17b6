"""Selection of blocks of diffusers' UNets, as a new UNet that its own config describes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import torch
from torch import nn

from compress.utils.errors import StageError

if TYPE_CHECKING:
    from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel

    UNet: TypeAlias = UNet2DConditionModel | UNet2DModel

BKSDMSize = Literal["base", "small", "tiny"]
_Layers = TypeVar("_Layers")
_BY_STAGE = (
    *("block_out_channels", "down_block_types", "up_block_types", "only_cross_attention", "cross_attention_dim"),
    *("attention_head_dim", "transformer_layers_per_block", "layers_per_block"),
)
"""Config fields that have, or may have, a value for each stage, from the outermost to the innermost."""
_STAGE_TENSOR = re.compile(r"^(down_blocks|up_blocks)\.(\d+)\.(?:(resnets|attentions)\.(\d+)\.)?(.*)$")


@dataclass(frozen=True)
class UNetBlocks:
    """Selected pairs of a resnet and its attention, by their indices in a stage. Stages count from the outermost.

    ``down[i]`` are the pairs of stage i on the way down. ``up[i]`` are those of the up block that reads the skip
    connections of stage i: one more, because diffusers' config has one number of layers for both. Stages that are not
    listed, the innermost first, are removed. ``middle`` is whether the middle block is selected.
    """

    down: tuple[tuple[int, ...], ...]
    up: tuple[tuple[int, ...], ...]
    middle: bool

    def without(self, stage: int, down: int, up: int) -> UNetBlocks:
        """Return the selection without one pair on the way down and one pair that reads its stage.

        Args:
            stage: Index of the stage.
            down: Index of the pair on the way down.
            up: Index of the pair on the way up.
        """

        def remove(stages: tuple[tuple[int, ...], ...], pair: int) -> tuple[tuple[int, ...], ...]:
            remaining = tuple(index for index in stages[stage] if index != pair)
            return (*stages[:stage], remaining, *stages[stage + 1 :])

        return replace(self, down=remove(self.down, down), up=remove(self.up, up))


def require_unet(component: nn.Module) -> UNet:
    """Return the component itself. Raises `StageError` if it is no UNet of diffusers for images."""
    if type(component).__name__ not in ("UNet2DConditionModel", "UNet2DModel"):
        raise StageError(
            f"The denoiser is a {type(component).__name__}, whose blocks and channels are not known here.",
            expected="a UNet2DConditionModel or UNet2DModel",
            hint="leave the stage out",
        )
    return component


def all_blocks(unet: UNet) -> UNetBlocks:
    """Return the selection of every block."""
    down = tuple(tuple(range(len(block.resnets))) for block in unet.down_blocks)
    up = tuple(tuple(range(len(block.resnets))) for block in reversed(unet.up_blocks))
    return UNetBlocks(down, up, unet.mid_block is not None)


def bk_sdm_blocks(unet: UNet, size: BKSDMSize) -> UNetBlocks:
    """Return the blocks of BK-SDM (Kim et al. 2023, section 3.1).

    Each stage keeps its first pair on the way down, and its first and last pair on the way up, of which the last reads
    the stage above. ``small`` also has no middle block, and ``tiny`` no innermost stage.

    Raises:
        StageError: Nothing would be removed, or the UNet has a single stage.
    """
    full = all_blocks(unet)
    down = tuple(pairs[:1] for pairs in full.down)
    up = tuple((pairs[0], pairs[-1]) for pairs in full.up)
    stages = len(down) - (size == "tiny")
    if not stages:
        raise StageError("A UNet of one stage has none to lose.", expected="base or small")
    selected = UNetBlocks(down[:stages], up[:stages], middle=full.middle and size == "base")
    if selected == full:
        raise StageError(
            f"BK-SDM's {size} would leave this UNet as it is.", hint="choose a smaller one, or prune channels"
        )
    return selected


def select_blocks(unet: UNet, blocks: UNetBlocks) -> UNet:
    """Return a new UNet of the same class with only the selected blocks, and its own weights.

    Raises:
        StageError: A selected block would get inputs of another width than it takes.
    """
    smaller, misfit = _select(unet, blocks, share=False)
    if misfit is not None:
        raise StageError(
            f"Without these blocks {misfit} would be given another number of channels than it takes.",
            expected="in each stage, the first pair on the way down, and the first and last on the way up, to stay "
            "where a stage is not as wide as the next",
        )
    return smaller


def select_shared_blocks(unet: UNet, blocks: UNetBlocks) -> UNet | None:
    """Return a UNet of the selected blocks that shares the tensors of ``unet``, or None if the blocks do not fit."""
    smaller, misfit = _select(unet, blocks, share=True)
    return smaller if misfit is None else None


def _select(unet: UNet, blocks: UNetBlocks, share: bool) -> tuple[UNet, str | None]:
    """Return the UNet of the selected blocks, and the first layer that does not fit."""
    smaller = build_like_on_meta(unet, _blocks_config(unet, blocks))
    num_stages, num_stages_before = len(blocks.down), len(unet.down_blocks)

    def source_name(name: str) -> str:
        """Return the tensor's name in ``unet``."""
        match = _STAGE_TENSOR.match(name)
        if match is None:
            return name
        side, block, layers, index, suffix = match.groups()
        # Down blocks are numbered from the outermost stage, up blocks from the innermost.
        stage = int(block) if side == "down_blocks" else num_stages - 1 - int(block)
        number = stage if side == "down_blocks" else num_stages_before - 1 - stage
        if layers is None:
            return f"{side}.{number}.{suffix}"
        pairs = (blocks.down if side == "down_blocks" else blocks.up)[stage]
        return f"{side}.{number}.{layers}.{pairs[int(index)]}.{suffix}"

    sources, state = {name: source_name(name) for name in smaller.state_dict()}, unet.state_dict()
    misfit = _first_misfit(smaller, sources, state)
    if misfit is None:
        _load(smaller, {name: state[source] for name, source in sources.items()}, share)
    return smaller, misfit


def _first_misfit(module: nn.Module, sources: Mapping[str, str], state: Mapping[str, torch.Tensor]) -> str | None:
    """Return the first layer whose source tensor is absent or has another shape."""
    for name, tensor in module.state_dict().items():
        source = state.get(sources[name])
        if source is None or source.shape != tensor.shape:
            return sources[name].rpartition(".")[0]
    return None


def _blocks_config(unet: UNet, blocks: UNetBlocks) -> dict[str, object]:
    """Return the config fields that the selected blocks change."""
    config, stages, stages_before = unet.config, len(blocks.down), len(unet.down_blocks)
    changes: dict[str, object] = {}
    for name in _BY_STAGE:
        value = config.get(name)
        if isinstance(value, list | tuple) and stages < stages_before:
            changes[name] = tuple(value[stages_before - stages :] if name == "up_block_types" else value[:stages])
    counts = tuple(len(pairs) for pairs in blocks.down)
    if len(set(counts)) == 1:
        changes["layers_per_block"] = counts[0]
    elif "cross_attention_dim" in config:
        # Only UNets with cross-attention may have different numbers of layers.
        changes["layers_per_block"] = counts
    else:
        raise StageError(
            f"A {type(unet).__name__} has as many layers in each stage, and {list(counts)} are to stay.",
            hint="use BK-SDM's blocks, which remove a pair of every stage",
        )
    if not blocks.middle and unet.mid_block is not None:
        changes["mid_block_type"] = None

    def pick(layers: _Layers, pairs: tuple[int, ...]) -> _Layers | tuple[object, ...]:
        return tuple(layers[index] for index in pairs) if isinstance(layers, list | tuple) else layers

    # The number of transformer layers may be given for each attention.
    down, up = config.get("transformer_layers_per_block"), config.get("reverse_transformer_layers_per_block")
    if isinstance(down, list | tuple) and any(isinstance(layers, list | tuple) for layers in down):
        changes["transformer_layers_per_block"] = tuple(
            pick(layers, pairs) for layers, pairs in zip(down, blocks.down, strict=False)
        )
    if isinstance(up, list | tuple):
        innermost_first = [up[stages_before - 1 - stage] for stage in reversed(range(len(blocks.up)))]
        changes["reverse_transformer_layers_per_block"] = tuple(
            pick(layers, pairs) for layers, pairs in zip(innermost_first, reversed(blocks.up), strict=True)
        )
    return changes


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
    return _load(copy, state, share=False)


def _load(module: ModelMixin, state: Mapping[str, torch.Tensor], share: bool) -> ModelMixin:
    module.load_state_dict({name: value if share else value.clone() for name, value in state.items()}, assign=True)
    return module.eval()


def stage_blocks(unet: UNet) -> dict[str, nn.Module]:
    """Return the blocks by names that any selection of the same UNet shares: `down 0` ..., `middle`, `up 0` ..."""
    blocks: dict[str, nn.Module] = {f"down {stage}": block for stage, block in enumerate(unet.down_blocks)}
    if unet.mid_block is not None:
        blocks["middle"] = unet.mid_block
    return blocks | {f"up {stage}": block for stage, block in enumerate(reversed(unet.up_blocks))}
