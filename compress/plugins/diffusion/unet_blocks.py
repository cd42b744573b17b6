"""diffusers' UNets: which blocks stay, and the same UNet built with fewer of them, as its own config can say it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from compress.utils.errors import StageError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


Size = Literal["base", "small", "tiny"]
_BY_STAGE = (
    *("block_out_channels", "down_block_types", "up_block_types", "only_cross_attention", "cross_attention_dim"),
    *("attention_head_dim", "transformer_layers_per_block", "layers_per_block"),
)
"""Config fields that have, or may have, a value for each stage, from the outermost to the innermost."""
_FROM_INSIDE = frozenset({"up_block_types"})
"""Those that begin with the innermost."""
_NUMBERED = re.compile(r"^(down_blocks|up_blocks)\.(\d+)\.(?:(resnets|attentions)\.(\d+)\.)?(.*)$")


@dataclass(frozen=True)
class KeptBlocks:
    """Which pairs of a resnet and its attention stay, by their places in a stage; stages count from the outermost.

    ``down[i]`` are those of stage i on the way down, ``up[i]`` those of the up block that reads what stage i has
    skipped, one more: diffusers' config knows but one number of layers for both. Stages that are not named are gone,
    the innermost first. ``middle`` says whether the block in the middle stays.
    """

    down: tuple[tuple[int, ...], ...]
    up: tuple[tuple[int, ...], ...]
    middle: bool

    def without(self, stage: int, down: int, up: int) -> KeptBlocks:
        """The same without one pair on the way down and one of those that read its stage."""
        return replace(
            self,
            down=_replaced(self.down, stage, tuple(place for place in self.down[stage] if place != down)),
            up=_replaced(self.up, stage, tuple(place for place in self.up[stage] if place != up)),
        )


def _replaced(places: tuple[tuple[int, ...], ...], stage: int, kept: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return (*places[:stage], kept, *places[stage + 1 :])


def require_unet(part: object) -> UNet2DConditionModel:
    """The part itself. Raises `StageError` where it is none of diffusers' UNets for pictures."""
    if type(part).__name__ not in ("UNet2DConditionModel", "UNet2DModel"):
        raise StageError(
            f"The denoiser is a {type(part).__name__}, whose blocks and channels are not known here.",
            expected="a UNet2DConditionModel or UNet2DModel",
            hint="leave the stage out",
        )
    return part


def all_blocks(unet: UNet2DConditionModel) -> KeptBlocks:
    """Every block of a `UNet2DConditionModel` or `UNet2DModel`."""
    down = tuple(tuple(range(len(block.resnets))) for block in unet.down_blocks)
    up = tuple(tuple(range(len(block.resnets))) for block in reversed(unet.up_blocks))
    return KeptBlocks(down, up, unet.mid_block is not None)


def bk_sdm_blocks(unet: UNet2DConditionModel, size: Size) -> KeptBlocks:
    """What BK-SDM keeps (Kim et al. 2023, section 3.1).

    Of two pairs of a stage the first on the way down, and of three on the way up the first and the last, which reads
    the stage above: the pairs in between go, of however many. ``small`` has no block in the middle either, and
    ``tiny`` no innermost stage. Raises `StageError` where nothing of that is there to go.
    """
    whole = all_blocks(unet)
    down = tuple(places[:1] for places in whole.down)
    up = tuple((places[0], places[-1]) for places in whole.up)
    stages = len(down) - (size == "tiny")
    if not stages:
        raise StageError("A UNet of one stage has none to lose.", expected="base or small")
    kept = KeptBlocks(down[:stages], up[:stages], middle=whole.middle and size == "base")
    if kept == whole:
        raise StageError(
            f"BK-SDM's {size} would leave this UNet as it is.", hint="choose a smaller one, or cut channels"
        )
    return kept


def keep_blocks(unet: UNet2DConditionModel, kept: KeptBlocks) -> UNet2DConditionModel:
    """The UNet with no other blocks than those of ``kept``, as a new module of the same class with weights of its own.

    Raises `StageError` where a block that stays cannot stand in the place that it would have: its widths are those of
    another one.
    """
    made, misfit = _kept(unet, kept, share=False)
    if misfit is not None:
        raise StageError(
            f"Without these blocks {misfit} would be given another number of channels than it takes.",
            expected="in each stage, the first pair on the way down, and the first and last on the way up, to stay "
            "where a stage is not as wide as the next",
        )
    return made


def shared_blocks(unet: UNet2DConditionModel, kept: KeptBlocks) -> Any | None:
    """The same with the very tensors of ``unet``, for a look at it; None where a block cannot stand in its place."""
    made, misfit = _kept(unet, kept, share=True)
    return made if misfit is None else None


def _kept(unet: UNet2DConditionModel, kept: KeptBlocks, share: bool) -> tuple[Any, str | None]:
    made, origins = _hollow(unet, kept)
    state = unet.state_dict()
    misfit = _misfit(made, origins, state)
    if misfit is None:
        _loaded(made, {name: state[origin] for name, origin in origins.items()}, share)
    return made, misfit


def _hollow(unet: UNet2DConditionModel, kept: KeptBlocks) -> tuple[Any, dict[str, str]]:
    """A UNet of the kept blocks without weights, and which tensor of ``unet`` each of its own is."""
    made = hollow_like(unet, _blocks_config(unet, kept))
    stages, whole = len(kept.down), len(unet.down_blocks)

    def origin(name: str) -> str:
        found = _NUMBERED.match(name)
        if found is None:
            return name
        side, block, list_name, place, rest = found.groups()
        stage = int(block) if side == "down_blocks" else stages - 1 - int(block)
        number = stage if side == "down_blocks" else whole - 1 - stage
        if list_name is None:
            return f"{side}.{number}.{rest}"
        places = kept.down if side == "down_blocks" else kept.up
        return f"{side}.{number}.{list_name}.{places[stage][int(place)]}.{rest}"

    return made, {name: origin(name) for name in made.state_dict()}


def _misfit(made: Any, origins: Mapping[str, str], state: Mapping[str, torch.Tensor]) -> str | None:
    """The first layer whose tensors are not there in its shape."""
    for name, tensor in made.state_dict().items():
        found = state.get(origins[name])
        if found is None or found.shape != tensor.shape:
            return origins[name].rpartition(".")[0]
    return None


def _blocks_config(unet: UNet2DConditionModel, kept: KeptBlocks) -> dict[str, Any]:
    """What the config must say for the kept blocks."""
    config, stages, whole = unet.config, len(kept.down), len(unet.down_blocks)
    changes: dict[str, Any] = {}
    for name in _BY_STAGE:
        value = config.get(name)
        if isinstance(value, list | tuple) and stages < whole:
            changes[name] = tuple(value[whole - stages :] if name in _FROM_INSIDE else value[:stages])
    counts = tuple(len(places) for places in kept.down)
    if len(set(counts)) == 1:
        changes["layers_per_block"] = counts[0]
    elif _has_numbers_by_stage(unet):
        changes["layers_per_block"] = counts
    else:
        raise StageError(
            f"A {type(unet).__name__} has as many layers in each stage, and {list(counts)} are to stay.",
            hint="let BK-SDM say which go, which takes a pair of every stage",
        )
    if not kept.middle and unet.mid_block is not None:
        changes["mid_block_type"] = None
    return {**changes, **_nested_layers(config, kept, whole)}


def _has_numbers_by_stage(unet: UNet2DConditionModel) -> bool:
    """Whether the config may say the layers of each stage, as text-conditional UNets' does."""
    return "cross_attention_dim" in unet.config


def _nested_layers(config: Mapping[str, Any], kept: KeptBlocks, whole: int) -> dict[str, Any]:
    """Transformer layers of the kept attentions, where the config has their number for each attention."""
    down, up = config.get("transformer_layers_per_block"), config.get("reverse_transformer_layers_per_block")
    changes: dict[str, Any] = {}
    if isinstance(down, list | tuple) and any(isinstance(one, list | tuple) for one in down):
        changes["transformer_layers_per_block"] = tuple(
            _chosen(one, places) for one, places in zip(down, kept.down, strict=False)
        )
    if isinstance(up, list | tuple):
        inside_first = [up[whole - 1 - stage] for stage in reversed(range(len(kept.up)))]
        changes["reverse_transformer_layers_per_block"] = tuple(
            _chosen(one, places) for one, places in zip(inside_first, reversed(kept.up), strict=True)
        )
    return changes


def _chosen(layers: object, places: Sequence[int]) -> Any:
    return tuple(layers[place] for place in places) if isinstance(layers, list | tuple) else layers


def hollow_like(module: Any, changes: Mapping[str, Any]) -> UNet2DConditionModel:
    """A module of diffusers of the same class without weights, on the meta device, whose config is changed.

    Raises `StageError` for a config that makes no module.
    """
    config = {name: value for name, value in module.config.items() if not name.startswith("_")}
    try:
        with torch.device("meta"):
            return type(module).from_config({**config, **changes})
    except (ValueError, TypeError, RuntimeError, ArithmeticError, IndexError) as error:
        raise StageError(f"diffusers makes no {type(module).__name__} of {dict(changes)}: {error}") from error


def with_config(module: Any, changes: Mapping[str, Any]) -> UNet2DConditionModel:
    """A copy whose config says ``changes``, of a module whose tensors have the shapes of that config already.

    Raises `StageError` naming the layer that hasn't.
    """
    made, state = hollow_like(module, changes), module.state_dict()
    misfit = _misfit(made, {name: name for name in made.state_dict()}, state)
    if misfit is None:
        misfit = next((name for name in state if name not in made.state_dict()), None)
    if misfit is not None:
        raise StageError(
            f"The layer {misfit} of this {type(module).__name__} is not as its config would have it after the cut.",
            expected="a UNet of blocks that are known here",
            hint="remove blocks in place of channels, and report the architecture",
        )
    return _loaded(made, state, share=False)


def _loaded(made: Any, state: Mapping[str, torch.Tensor], share: bool) -> UNet2DConditionModel:
    made.load_state_dict({name: value if share else value.clone() for name, value in state.items()}, assign=True)
    return made.eval()


def stage_ends(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """The blocks by what they are to any cut of the same UNet: `down 0` ..., `middle`, and `up 0` of the same stage."""
    ends: dict[str, nn.Module] = {f"down {stage}": block for stage, block in enumerate(unet.down_blocks)}
    if unet.mid_block is not None:
        ends["middle"] = unet.mid_block
    return ends | {f"up {stage}": block for stage, block in enumerate(reversed(unet.up_blocks))}
