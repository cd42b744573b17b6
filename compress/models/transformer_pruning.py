"""Cutting what `description` finds: whole blocks, heads and feed-forward neurons, each cut proven by the config.

A cut that the architecture's config has no words for is recorded in it, and `cut_model` makes the same cut again as it
loads the model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from compress.models.attention_pruning import keep_columns, keep_places, keep_rows, why_whole
from compress.models.folder_checks import weight_files
from compress.models.pruned_layer_sizes import CHANNELS_KEY
from compress.models.safetensors_file import read_header
from compress.models.structure import Attention, Block, blocks, stacks
from compress.utils.errors import StageError

HEADS_KEY = "compress_attention_heads"
"""Config key that records what is left of each layer's heads, or groups of heads with their keys and values."""
NEURONS_KEY = "compress_feed_forward_neurons"
"""Config key that records each layer's neurons where no field of the architecture's own says them."""
_WIDTHS = ("intermediate_size", "hidden_dim", "ffn_dim", "n_inner", "d_ff", "dim_feedforward", "d_inner")
_OF_LAYERS = ("layer", "block", "pattern", "intermediate", "compress_")
"""Words in the names of config fields that say something of each layer."""
_FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")
_OF_BACKBONES = ("stage_names", "out_features", "out_indices")
"""Config fields that follow from how many layers there are."""
_NOT_OF_INFERENCE = ("training", "drop_prob", "p", "seed")
_BY_FIRST = "all layers share the first one's bias of positions"
_BY_NUMBER = "how far each looks back follows from their number (ALiBi)"
_WHOLE = {
    **dict.fromkeys(("t5", "mt5", "longt5", "switch_transformers"), _BY_FIRST),
    "bloom": _BY_NUMBER,
    "mpt": _BY_NUMBER,
    "big_bird": "its attention is made anew as it runs",
    "convbert": "half of what is attended to comes from a convolution",
    "pvt_v2": "their width is that of the layer",
}
"""Why heads of an architecture cannot go, where its modules don't show it."""
_FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    AssertionError,
    StrictDataclassError,
)


def layer_list(module: PreTrainedModel) -> nn.ModuleList:
    """The one list of a model's blocks. Raises `StageError` for a model that has several, or none."""
    return _only_stack(module)[1]


def _only_stack(module: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    found = stacks(module)
    if len(found) > 1:
        raise StageError(
            f"The layers of a {module.config.model_type!r} model lie in several lists.",
            expected="one list of layers",
            hint=f"cut heads or neurons instead; its lists are {', '.join(found)}",
        )
    return next(iter(found.items()))


@contextlib.contextmanager
def with_layers(module: PreTrainedModel, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let ``module`` pass through ``layers`` in place of its own, for the time of a context."""
    path, own = _only_stack(module)
    module.set_submodule(path, nn.ModuleList(layers))
    try:
        yield
    finally:
        module.set_submodule(path, own)


def drop_pooler(module: PreTrainedModel) -> None:
    """Take off, in place, the layer that BERT pools with in pretraining: no embedding reads it."""
    if getattr(module, "pooler", None) is not None:
        module.pooler = None


class FirstToken(nn.Module):
    """Pools hidden states [B, L, H] by their first token, as it is."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, H]."""
        return hidden[:, 0]


def pool_first_token(module: PreTrainedModel, directory: Path) -> None:
    """Where the checkpoint in ``directory`` has no weights for a layer that pools, take the first token, in place."""
    made = any(name.startswith("pooler.") for name, _ in module.named_parameters())
    stored = (tensor.name for file in weight_files(directory) for tensor in read_header(file))
    if made and not any("pooler." in name for name in stored):
        module.pooler = FirstToken()


def keep_layers(module: PreTrainedModel, kept: Sequence[int]) -> None:
    """Drop the blocks outside ``kept`` (indices from 0), in place.

    Raises `StageError` for a wrong index, and for an architecture whose config cannot say which are left.
    """
    found = stacks(module)
    before = [layer for layers in found.values() for layer in layers]
    if getattr(module.config, CHANNELS_KEY, None):
        raise StageError("Layers cannot go once channels have been cut.", hint="remove the layers first")
    wrong = [index for index in kept if not 0 <= index < len(before)]
    if wrong or len(set(kept)) != len(kept):
        raise StageError(
            f"Layers {list(kept)} can't be kept of a model that has {len(before)}.",
            expected=f"distinct indices from 0 to {len(before) - 1}",
            hint="keep others, evenly spread",
        )
    old = {path: list(layers) for path, layers in found.items()}
    remaining = {id(before[index]) for index in kept}
    left = {path: [layer for layer in layers if id(layer) in remaining] for path, layers in old.items()}
    fields = _fields_of_layers(module.config, len(before), sorted(kept))
    if len(found) > 1:
        fields["depths"] = [len(layers) for layers in left.values()]
    whole = _makes(module, module.config, alike=True)
    for path, layers in found.items():
        _put(layers, left[path])
    changed = config_with(module.config, fields)
    if not (whole and all(left.values()) and _makes(module, changed, alike=True) and _same_beside(module, changed)):
        for path, layers in found.items():
            _put(layers, old[path])
        raise StageError(
            f"The config of a {module.config.model_type!r} model cannot say which of {', '.join(found)} are left.",
            expected="layers that are all alike, or a list of their kinds in config.json",
            hint="cut heads or neurons instead",
        )
    for name in (*fields, *(name for name in vars(changed) if name.lstrip("_") in _OF_BACKBONES)):
        setattr(module.config, name, getattr(changed, name))


def _put(layers: nn.ModuleList, wanted: Sequence[nn.Module]) -> None:
    del layers[:]
    layers.extend(wanted)
    for index, layer in enumerate(layers):
        for part in layer.modules():
            for name in ("layer_idx", "layer_id"):
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, index)


def _fields_of_layers(config: Any, count: int, kept: Sequence[int]) -> dict[str, Any]:
    """The config's fields that say how many layers there are, or something of each."""
    fields: dict[str, Any] = {}
    own = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for name, value in vars(config).items():
        if name == own and value == count:
            fields[name] = len(kept)
        elif name in _FIRST_LAYERS and isinstance(value, int):
            fields[name] = sum(index < value for index in kept)
        elif isinstance(value, list | tuple) and len(value) == count and any(word in name for word in _OF_LAYERS):
            fields[name] = [value[index] for index in kept]
    return fields


def keep_heads(module: PreTrainedModel, kept: Sequence[Sequence[int]]) -> None:
    """Cut each block's attention down to the heads in ``kept[layer]``, in place; a block without any has none there.

    Where heads share keys and values, their groups are counted. Raises `StageError` for attention that isn't known.
    """
    found = [block.attended() for block in _those_with(blocks(module), "attention")]
    check_heads_apart(module)
    chosen = [places for places in kept if len(places)]
    for attention, places in zip(found, chosen, strict=True):
        keep_places(attention, list(places))
    counts = [len(places) for places in kept]
    fields = fields_of_heads(module.config, found[0], [len(places) for places in chosen])
    changed = config_with(module.config, fields)
    if fields and _makes(module, changed) and _same_beside(module, changed):
        for name, value in fields.items():
            setattr(module.config, name, value)
    else:
        setattr(module.config, HEADS_KEY, counts)


def left(before: int, share_removed: float, what: str) -> int:
    """How many of so many parts are left when a share goes. Raises `StageError` where none are."""
    count = round(before * (1 - share_removed))
    if count < 1 and before:
        raise StageError(f"Removing {share_removed:.0%} of {before} {what} leaves none.", hint="remove a smaller share")
    return count


def check_heads_apart(module: PreTrainedModel) -> None:
    """Raise `StageError`, with the reason, for a model of which no head can go without changing the others."""
    config = module.config
    found = _those_with(blocks(module), "attention")
    reasons = [_WHOLE.get(config.model_type), _BY_NUMBER if getattr(config, "alibi", False) else None]
    reasons += [_why_shared(module, found[0].attended()), *(why_whole(block.attended()) for block in found)]
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None:
        raise StageError(f"Heads of a {config.model_type!r} model cannot go: {reason}.", hint="leave heads out")


def _those_with(found: Sequence[Block], part: str) -> list[Block]:
    """The blocks with attention, or a feed-forward layer, that is known; all of them where none has."""
    return [block for block in found if getattr(block, part) is not None] or list(found)


def fields_of_heads(config: Any, attention: Attention, counts: Sequence[int]) -> dict[str, Any]:
    """The config's own fields for so many heads in all layers; none where it has no size of a head of its own."""
    known = {"head_dim", "num_key_value_heads"} & set(vars(config))
    if len(set(counts)) > 1 or getattr(config, HEADS_KEY, None) or not known:
        return {}
    fields = {"head_dim": attention.head_size, "num_attention_heads": counts[0] * attention.heads // attention.places}
    if "num_key_value_heads" in known:
        fields["num_key_value_heads"] = counts[0] if attention.groups > 1 else 1
    return {config.attribute_map.get(name, name): value for name, value in fields.items()}


def _why_shared(module: PreTrainedModel, attention: Attention) -> str | None:
    """That a table outside the blocks has an entry for each head, or None."""
    inside = tuple(f"{path}." for path in stacks(module))
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding) and part.embedding_dim == attention.heads and not name.startswith(inside):
            return f"all layers share {name}"
    return None


def keep_neurons(module: PreTrainedModel, kept: Sequence[torch.Tensor]) -> None:
    """Cut each block's feed-forward layer down to the neurons in ``kept[layer]``, in place; one without has none there.

    Where all blocks keep the same number, the architecture's own field of the config says it if it has one.
    """
    chosen = [neurons for neurons in kept if len(neurons)]
    found = [block.fed_forward() for block in _those_with(blocks(module), "feed_forward")]
    for feed_forward, neurons in zip(found, chosen, strict=True):
        for layer in feed_forward.inputs:
            keep_rows(layer, feed_forward.rows(layer, neurons))
        keep_columns(feed_forward.output, neurons)
        for convolution in feed_forward.depthwise:
            keep_rows(convolution, neurons)
    counts = [len(neurons) for neurons in kept]
    config = module.config
    for name in (config.attribute_map.get(name, name) for name in _WIDTHS):
        if len(set(counts)) > 1 or name not in vars(config) or getattr(config, NEURONS_KEY, None):
            continue
        changed = config_with(config, {name: counts[0]})
        if _makes(module, changed) and _same_beside(module, changed):
            setattr(config, name, counts[0])
            return
    setattr(config, NEURONS_KEY, counts)


def shrink_to_recorded_parts(module: PreTrainedModel) -> None:
    """Give a freshly built model the sizes that its config records, before its weights are loaded."""
    heads, neurons = (getattr(module.config, key, None) for key in (HEADS_KEY, NEURONS_KEY))
    if heads:
        for block, count in zip(blocks(module), heads, strict=True):
            if count:
                keep_places(block.attended(), range(count))
    if neurons:
        keep_neurons(module, [torch.arange(count) for count in neurons])


def config_with(config: Any, fields: Mapping[str, Any]) -> Any:
    """A config with other fields, as it is read from its file. None for fields that it refuses."""
    try:
        own = {name: value for name, value in config.to_dict().items() if name.lstrip("_") not in _OF_BACKBONES}
        made = type(config)(**copy.deepcopy({**own, **fields}))
        made.validate()
        return made
    except _FAILURES:
        return None


def _makes(module: PreTrainedModel, config: Any, alike: bool = False) -> bool:
    """Whether ``config`` makes a model whose blocks have the parameters of ``module``, in name and shape.

    ``alike``: and the same numbers, such as a scale that follows from how many blocks there are.
    """
    if config is None:
        return False
    try:
        made = _hollow(module, config)
        return _shapes(made) == _shapes(module) and (not alike or _numbers(made) == _numbers(module))
    except (*_FAILURES, StageError):
        return False


def _same_beside(module: PreTrainedModel, config: Any) -> bool:
    """Whether ``config`` makes all that lies outside the blocks as the model's own config does."""
    own, other = (_hollow(module, one) for one in (module.config, config))
    inside = tuple(f"{path}." for path in stacks(own))
    shapes = (
        {name: part.shape for name, part in made.named_parameters() if not name.startswith(inside)}
        for made in (own, other)
    )
    return next(shapes) == next(shapes)


def _hollow(module: PreTrainedModel, config: Any) -> PreTrainedModel:
    """What ``config`` makes, as it would be loaded, without weights."""
    with torch.device("meta"):
        made = type(module)(config)
        shrink_to_recorded_parts(made)
    return made


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    lists = stacks(module).items()
    return {name: part.shape for path, stack in lists for name, part in stack.named_parameters(prefix=path)}


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Whole and real numbers that the blocks' modules have as attributes."""
    return {
        f"{name}.{key}": value
        for path, stack in stacks(module).items()
        for name, part in stack.named_modules(prefix=path)
        for key, value in vars(part).items()
        if isinstance(value, int | float) and key not in _NOT_OF_INFERENCE and key[0] != "_"
    }
