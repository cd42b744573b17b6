"""Pruning of blocks, heads and feed-forward neurons found by `structure`, verified with the model's config.

Sizes that the architecture's config cannot express are recorded in it, and `pruned_model` applies them on loading.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.models.attention_pruning import keep_attention_units, keep_columns, keep_rows, unprunable_reason
from compress.models.config_checks import load_error_types
from compress.models.folder_checks import weight_files
from compress.models.pruned_layer_sizes import CHANNELS_KEY, resize_to_recorded
from compress.models.safetensors_file import read_header
from compress.models.structure import Attention, TransformerBlock, blocks, stacks
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


HEADS_KEY = "compress_attention_heads"
"""Config key that records each layer's remaining heads, or groups of heads with their keys and values."""
NEURONS_KEY = "compress_feed_forward_neurons"
"""Config key that records each layer's neurons if the architecture has no config field for them."""
_WIDTHS = ("intermediate_size", "hidden_dim", "ffn_dim", "n_inner", "d_ff", "dim_feedforward", "d_inner")
_OF_LAYERS = ("layer", "block", "pattern", "intermediate", "compress_")
"""Substrings of config fields with one entry per layer."""
_FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")
_OF_BACKBONES = ("stage_names", "out_features", "out_indices")
"""Config fields that follow from the number of layers."""
_NOT_OF_INFERENCE = ("training", "drop_prob", "p", "seed")
_BY_FIRST = "all layers share the position bias of the first layer"
_BY_NUMBER = "the slope of each head follows from the number of heads (ALiBi)"
_WHOLE = {
    **dict.fromkeys(("t5", "mt5", "longt5", "switch_transformers"), _BY_FIRST),
    "bloom": _BY_NUMBER,
    "mpt": _BY_NUMBER,
    "big_bird": "its attention module is replaced while it runs",
    "convbert": "half of its attention output comes from a convolution",
    "pvt_v2": "their width is that of the layer",
}
"""Reasons why heads of an architecture cannot be pruned that its modules do not show."""


def layer_list(module: PreTrainedModel) -> nn.ModuleList:
    """Return the only list of a model's blocks. Raises `StageError` for a model with several lists or none."""
    return _only_stack(module)[1]


def _only_stack(module: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    lists = stacks(module)
    # Encoder-decoders and hierarchical vision models have one list per stack or stage.
    if len(lists) > 1:
        raise StageError(
            f"The layers of a {module.config.model_type!r} model lie in several lists.",
            expected="one list of layers",
            hint=f"cut heads or neurons instead; its lists are {', '.join(lists)}",
        )
    return next(iter(lists.items()))


@contextlib.contextmanager
def replaced_layers(module: PreTrainedModel, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let ``module`` run ``layers`` in place of its own blocks while the context is active."""
    path, original = _only_stack(module)
    module.set_submodule(path, nn.ModuleList(layers))
    try:
        yield
    finally:
        module.set_submodule(path, original)


def drop_pooler(module: PreTrainedModel) -> None:
    """Remove, in place, the pooling layer of BERT's pretraining, which embeddings do not use."""
    if getattr(module, "pooler", None) is not None:
        module.pooler = None


class FirstToken(nn.Module):
    """Pooling of hidden states [B, L, H] by the first token."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the first token's states [B, H]."""
        return hidden[:, 0]


def pool_first_token(module: PreTrainedModel, directory: Path) -> None:
    """Pool by the first token, in place, if the checkpoint in ``directory`` has no weights for the pooling layer."""
    has_pooler = any(name.startswith("pooler.") for name, _ in module.named_parameters())
    stored = (tensor.name for file in weight_files(directory) for tensor in read_header(file))
    if has_pooler and not any("pooler." in name for name in stored):
        module.pooler = FirstToken()


def keep_layers(module: PreTrainedModel, kept: Sequence[int]) -> None:
    """Remove the blocks outside ``kept`` (indices from 0), in place.

    Raises `StageError` for an invalid index, and for an architecture whose config cannot express the result.
    """
    lists = stacks(module)
    all_layers = [layer for layers in lists.values() for layer in layers]
    if getattr(module.config, CHANNELS_KEY, None):
        raise StageError("Layers cannot be removed after channels have been pruned.", hint="remove the layers first")
    wrong = [index for index in kept if not 0 <= index < len(all_layers)]
    if wrong or len(set(kept)) != len(kept):
        raise StageError(
            f"Layers {list(kept)} cannot be kept in a model with {len(all_layers)}.",
            expected=f"distinct indices from 0 to {len(all_layers) - 1}",
            hint="keep others, evenly spread",
        )
    old = {path: list(layers) for path, layers in lists.items()}
    # Indices count over all lists; each list keeps its share.
    remaining = {id(all_layers[index]) for index in kept}
    remaining_lists = {path: [layer for layer in layers if id(layer) in remaining] for path, layers in old.items()}
    fields = _fields_of_layers(module.config, len(all_layers), sorted(kept))
    if len(lists) > 1:
        # Hierarchical vision models give the number of blocks per stage.
        fields["depths"] = [len(layers) for layers in remaining_lists.values()]
    # A config that does not rebuild the original model cannot prove anything about the pruned one.
    is_rebuildable = _makes(module, module.config, alike=True)
    for path, layers in lists.items():
        _put(layers, remaining_lists[path])
    changed = updated_config(module.config, fields)
    # Undo the change if the new config does not build the pruned model.
    is_expressible = is_rebuildable and all(remaining_lists.values())
    if not (is_expressible and _makes(module, changed, alike=True) and _same_beside(module, changed)):
        for path, layers in lists.items():
            _put(layers, old[path])
        raise StageError(
            f"The config of a {module.config.model_type!r} model cannot say which of {', '.join(lists)} are left.",
            expected="layers that are all alike, or a list of their kinds in config.json",
            hint="cut heads or neurons instead",
        )
    # Fields of backbones follow from the number of layers and are set by the config class.
    for name in (*fields, *(name for name in vars(changed) if name.lstrip("_") in _OF_BACKBONES)):
        setattr(module.config, name, getattr(changed, name))


def _put(layers: nn.ModuleList, new_layers: Sequence[nn.Module]) -> None:
    del layers[:]
    layers.extend(new_layers)
    for index, layer in enumerate(layers):
        # Attention modules index the cache by the number of their layer.
        for part in layer.modules():
            for name in ("layer_idx", "layer_id"):
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, index)


def _fields_of_layers(config: PretrainedConfig, count: int, kept: Sequence[int]) -> dict[str, Any]:
    """Return the config fields with the number of layers or an entry per layer, with their new values."""
    fields: dict[str, Any] = {}
    count_field = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for name, value in vars(config).items():
        if name == count_field and value == count:
            fields[name] = len(kept)
        # Such a field counts leading layers of a kind; count those that remain.
        elif name in _FIRST_LAYERS and isinstance(value, int):
            fields[name] = sum(index < value for index in kept)
        elif isinstance(value, list | tuple) and len(value) == count and any(word in name for word in _OF_LAYERS):
            fields[name] = [value[index] for index in kept]
    return fields


def keep_heads(module: PreTrainedModel, kept: Sequence[Sequence[int]]) -> None:
    """Keep only the heads ``kept[layer]`` of each block's attention, in place; empty for a block without attention.

    If heads share keys and values, indices count groups. Raises `StageError` for unsupported attention.
    """
    attentions = [block.require_attention() for block in _those_with(blocks(module), "attention")]
    check_heads_prunable(module)
    chosen = [units for units in kept if len(units)]
    for attention, units in zip(attentions, chosen, strict=True):
        keep_attention_units(attention, list(units))
    counts = [len(units) for units in kept]
    # Prefer the architecture's own fields: every reader understands them.
    fields = head_config_fields(module.config, attentions[0], [len(units) for units in chosen])
    changed = updated_config(module.config, fields)
    if fields and _makes(module, changed) and _same_beside(module, changed):
        for name, value in fields.items():
            setattr(module.config, name, value)
    else:
        setattr(module.config, HEADS_KEY, counts)


def remaining_count(total: int, share_removed: float, what: str) -> int:
    """Return the number of parts that remain when a share is removed. Raises `StageError` if none would."""
    count = round(total * (1 - share_removed))
    if count < 1 and total:
        raise StageError(f"Removing {share_removed:.0%} of {total} {what} leaves none.", hint="remove a smaller share")
    return count


def check_heads_prunable(module: PreTrainedModel) -> None:
    """Raise `StageError` with the reason if no head can be removed without changing the others."""
    config = module.config
    attention_blocks = _those_with(blocks(module), "attention")
    # Known architectures, ALiBi slopes, shared position tables, and norms over all heads.
    reasons = [_WHOLE.get(config.model_type), _BY_NUMBER if getattr(config, "alibi", False) else None]
    attentions = [block.require_attention() for block in attention_blocks]
    inside = tuple(f"{path}." for path in stacks(module))
    reasons += [
        f"all layers share {name}"
        for name, part in module.named_modules()
        if isinstance(part, nn.Embedding) and part.embedding_dim == attentions[0].heads and not name.startswith(inside)
    ]
    reasons += map(unprunable_reason, attentions)
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None:
        raise StageError(f"Heads of a {config.model_type!r} model cannot be pruned: {reason}.", hint="leave heads out")


def _those_with(layer_blocks: Sequence[TransformerBlock], part: str) -> list[TransformerBlock]:
    """Return the blocks with supported attention or feed-forward layers; all blocks if none has any."""
    return [block for block in layer_blocks if getattr(block, part) is not None] or list(layer_blocks)


def head_config_fields(config: PretrainedConfig, attention: Attention, counts: Sequence[int]) -> dict[str, Any]:
    """Return the architecture's own config fields for the remaining heads; empty if it has no independent head size.

    Args:
        config: Config of the model.
        attention: Attention before pruning.
        counts: Remaining units of each layer.
    """
    supported = {"head_dim", "num_key_value_heads"} & set(vars(config))
    if len(set(counts)) > 1 or getattr(config, HEADS_KEY, None) or not supported:
        return {}
    fields = {
        "head_dim": attention.head_size,
        "num_attention_heads": counts[0] * attention.heads // attention.prunable_units,
    }
    if "num_key_value_heads" in supported:
        fields["num_key_value_heads"] = counts[0] if attention.groups > 1 else 1
    return {config.attribute_map.get(name, name): value for name, value in fields.items()}


def keep_neurons(module: PreTrainedModel, kept: Sequence[torch.Tensor]) -> None:
    """Keep only the neurons ``kept[layer]`` of each block's feed-forward layer, in place; empty for none.

    If all blocks keep the same number, the architecture's own config field records it if there is one.
    """
    chosen = [neurons for neurons in kept if len(neurons)]
    feed_forwards = [block.require_feed_forward() for block in _those_with(blocks(module), "feed_forward")]
    for feed_forward, neurons in zip(feed_forwards, chosen, strict=True):
        for layer in feed_forward.inputs:
            keep_rows(layer, feed_forward.rows(layer, neurons))
        keep_columns(feed_forward.output, neurons)
        for convolution in feed_forward.depthwise:
            keep_rows(convolution, neurons)
    counts = [len(neurons) for neurons in kept]
    config = module.config
    # Prefer the architecture's own field if the config then builds the pruned model.
    for name in (config.attribute_map.get(name, name) for name in _WIDTHS):
        if len(set(counts)) > 1 or name not in vars(config) or getattr(config, NEURONS_KEY, None):
            continue
        changed = updated_config(config, {name: counts[0]})
        if _makes(module, changed) and _same_beside(module, changed):
            setattr(config, name, counts[0])
            return
    setattr(config, NEURONS_KEY, counts)


def resize_to_recorded_parts(module: PreTrainedModel) -> None:
    """Resize a freshly built model to the sizes that its config records, before its weights are loaded."""
    heads, neurons = (getattr(module.config, key, None) for key in (HEADS_KEY, NEURONS_KEY))
    if heads:
        for block, count in zip(blocks(module), heads, strict=True):
            if count:
                keep_attention_units(block.require_attention(), range(count))
    if neurons:
        keep_neurons(module, [torch.arange(count) for count in neurons])


def updated_config(config: PretrainedConfig, fields: Mapping[str, Any]) -> PretrainedConfig | None:
    """Return a config with changed fields, as if read from its file, or None if it rejects them."""
    try:
        current = {name: value for name, value in config.to_dict().items() if name.lstrip("_") not in _OF_BACKBONES}
        # The constructor checks fields and derives others, as on loading.
        changed = type(config)(**copy.deepcopy({**current, **fields}))
        changed.validate()
        return changed
    except load_error_types():
        return None


def _makes(module: PreTrainedModel, config: PretrainedConfig, alike: bool = False) -> bool:
    """Return True if ``config`` builds a model whose blocks have the parameter names and shapes of ``module``.

    With ``alike``, numeric attributes must be equal too, such as a scale that depends on the number of blocks.
    """
    if config is None:
        return False
    try:
        rebuilt = _hollow(module, config)
        return _shapes(rebuilt) == _shapes(module) and (not alike or _numbers(rebuilt) == _numbers(module))
    except StageError:
        return False
    except load_error_types():
        return False


def _same_beside(module: PreTrainedModel, config: PretrainedConfig) -> bool:
    """Return True if ``config`` builds everything outside the blocks like the model's own config does."""
    original, other = (_hollow(module, tried) for tried in (module.config, config))
    # Only parameters outside the blocks are compared; the blocks were checked by `_makes`.
    inside = tuple(f"{path}." for path in stacks(original))
    before, after = (
        {name: part.shape for name, part in built.named_parameters() if not name.startswith(inside)}
        for built in (original, other)
    )
    return before == after


def _hollow(module: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Build the model of ``config`` without weights, as it would be loaded."""
    with torch.device("meta"):
        built = type(module)(config)
        resize_to_recorded_parts(built)
    return built


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    lists = stacks(module).items()
    return {name: part.shape for path, stack in lists for name, part in stack.named_parameters(prefix=path)}


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Return the numeric attributes of the blocks' modules."""
    return {
        f"{name}.{key}": value
        for path, stack in stacks(module).items()
        for name, part in stack.named_modules(prefix=path)
        for key, value in vars(part).items()
        if isinstance(value, int | float) and key not in _NOT_OF_INFERENCE and key[0] != "_"
    }


def is_pruned(config: PretrainedConfig) -> bool:
    """Return True if ``config`` records pruned heads, neurons or channels."""
    return any(getattr(config, key, None) for key in (HEADS_KEY, NEURONS_KEY, CHANNELS_KEY))


def load_pruned(auto: Any, directory: Path, config: PretrainedConfig) -> PreTrainedModel:
    """Load the model of auto class ``auto`` that `TorchModel.save` wrote to ``directory``.

    transformers loads the weights, because only it maps stored names to an architecture's modules. It gets a subclass
    whose layers are resized right after construction. Raises `ModelError` if recorded sizes do not fit.
    """
    with torch.device("meta"):
        model_class: type[Any] = type(auto.from_config(config))

    def init(module: Any, own: Any, *arguments: Any, **options: Any) -> None:
        model_class.__init__(module, own, *arguments, **options)
        resize_to_recorded_parts(module)
        resize_to_recorded(module, own, str(directory / "config.json"))

    resized_class = type(model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__})
    module = resized_class.from_pretrained(directory, config=config, use_safetensors=True)  # type: ignore[attr-defined]
    # The subclass has done its work; the model is an instance of the original class.
    module.__class__ = model_class
    return module
