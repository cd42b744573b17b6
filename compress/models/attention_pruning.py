"""Pruning of heads of one attention: its projections, and all other parameters per head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.models.structure import Attention, Linear

_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")
_GROUP_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_HEAD_WIDTHS = ("all_head_size", "split_size", "inner_dim", "embed_dim", "hidden_size", "d_attn")


def unprunable_reason(attention: Attention) -> str | None:
    """Return the reason why heads cannot be pruned separately, or None."""
    layers = {id(layer) for layer in attention.projections}
    for name, part in attention.owner.named_modules():
        # A norm over the features of all heads mixes them; the layer's output has a norm of its own.
        leaf = name.rpartition(".")[2].lower()
        is_norm = "norm" in name.lower() and leaf.replace("_", "") != "layernorm" and id(part) not in layers
        if is_norm and any(tensor.shape == (attention.width,) for tensor in part.parameters(recurse=False)):
            return f"{name} normalises all of them at once"
    return None


@torch.no_grad()
def keep_attention_units(attention: Attention, units: Sequence[int]) -> None:
    """Keep only ``units`` (groups, or heads of a single group) of an attention, in place."""
    heads_per_unit = attention.heads // attention.prunable_units
    # A group is removed with all of its query heads.
    heads = [unit * heads_per_unit + offset for unit in units for offset in range(heads_per_unit)]
    groups = list(units) if attention.groups > 1 else [0]
    # First everything except the projections, while the old sizes still identify its axes.
    _cut_per_head(attention, {attention.groups: groups, attention.heads: heads})
    remaining = {"query": heads, "key": groups, "value": groups}
    # Collect the rows per layer, since a joint projection must be cut once.
    rows: dict[int, tuple[Linear, list[torch.Tensor]]] = {}
    for name, layer in (("query", attention.query), ("key", attention.key), ("value", attention.value)):
        rows.setdefault(id(layer), (layer, []))[1].append(attention.rows[name][remaining[name]].flatten())
    for layer, parts in rows.values():
        # Rows of a joint projection keep their order.
        keep_rows(layer, torch.cat(parts).sort().values if len(parts) > 1 else parts[0])
    # The output projection reads the features of the heads.
    columns = torch.arange(attention.heads * attention.head_size).view(attention.heads, -1)[heads].flatten()
    keep_columns(attention.output, columns)
    _count_again(attention, len(heads), len(groups))


def _cut_per_head(attention: Attention, kept: Mapping[int, Sequence[int]]) -> None:
    """Prune parameters per head outside the projections: sinks, gates, position biases, norms.

    ``kept`` maps a number of heads or groups to the indices that stay.
    """
    layers = {id(layer) for layer in attention.projections}
    # Tables of relative positions may lie outside the attention module.
    positions = [part for name, part in attention.block.named_modules() if "relative_position" in name]
    inside = [*attention.owner.named_modules(), *((f"positions{n}", part) for n, part in enumerate(positions))]
    done: set[int] = set()
    for name, part in inside:
        if id(part) in layers | done:
            continue
        done.add(id(part))
        # Some architectures have a module per head.
        if isinstance(part, nn.ModuleList) and len(part) in kept:
            kept_parts = [part[index] for index in kept[len(part)]]
            del part[:]
            part.extend(kept_parts)
        for leaf, tensor in [*part.named_parameters(recurse=False)]:
            # A norm within each head has no axis of heads.
            if not ("norm" in name.lower() and tensor.ndim == 1):
                _cut_parameter(attention, part, leaf, kept)


def _cut_parameter(attention: Attention, part: nn.Module, leaf: str, kept: Mapping[int, Sequence[int]]) -> None:
    """Prune one parameter along the axis that has an entry per head, or per feature of all heads."""
    tensor = getattr(part, leaf)
    # Only depthwise convolutions process heads separately.
    if isinstance(part, nn.Conv2d) and part.groups < part.in_channels:
        return
    sizes = {size: torch.tensor(list(indices)) for size, indices in kept.items()}
    columns = torch.arange(attention.width).view(attention.heads, -1)[sizes[attention.heads]].flatten()
    sizes = {attention.width: columns, **sizes}
    # The inputs of a layer are hidden states, which do not shrink.
    axes = tensor.shape[:1] if isinstance(part, nn.Linear | nn.Conv2d) else tensor.shape
    axis = next((axis for axis, size in enumerate(axes) if size in sizes), None)
    if axis is None:
        return
    selected = sizes[tensor.shape[axis]]
    pruned = tensor.detach().index_select(axis, selected.to(tensor.device)).clone()
    setattr(part, leaf, nn.Parameter(pruned, requires_grad=tensor.requires_grad))
    if isinstance(part, nn.Embedding) and axis == 1:
        part.embedding_dim = len(selected)
    elif isinstance(part, nn.Linear):
        part.out_features = len(selected)
    elif isinstance(part, nn.Conv2d):
        part.groups = part.in_channels = part.out_channels = len(selected)


def _count_again(attention: Attention, heads: int, groups: int) -> None:
    """Update the numbers of heads, groups and features in the attention's modules."""
    counted = dict.fromkeys(_HEAD_COUNTS, (attention.heads, heads))
    counted |= dict.fromkeys(_GROUP_COUNTS, (attention.groups, groups))
    counted |= dict.fromkeys(_HEAD_WIDTHS, (attention.heads * attention.head_size, heads * attention.head_size))
    counted["num_key_value_groups"] = (attention.heads // attention.groups, heads // groups)
    for part in attention.owner.modules():
        if isinstance(part, nn.Linear | Conv1D):
            continue
        for name, (old, new) in counted.items():
            # Change an attribute only if it has the old value: names have other meanings in some modules.
            if vars(part).get(name) == old:
                setattr(part, name, new)


@torch.no_grad()
def keep_rows(layer: Linear | nn.Conv2d, rows: torch.Tensor) -> None:
    """Keep only some output rows of a linear layer or channels of a depthwise convolution, in place."""
    weight = layer.weight[:, rows] if isinstance(layer, Conv1D) else layer.weight[rows]
    layer.weight = nn.Parameter(weight.clone())
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[rows].clone())
    if isinstance(layer, nn.Conv2d):
        layer.groups = layer.in_channels = layer.out_channels = len(rows)
    else:
        setattr(layer, "nf" if isinstance(layer, Conv1D) else "out_features", len(rows))


@torch.no_grad()
def keep_columns(layer: Linear, columns: torch.Tensor) -> None:
    """Keep only some input columns of a linear layer, in place."""
    weight = layer.weight[columns] if isinstance(layer, Conv1D) else layer.weight[:, columns]
    layer.weight = nn.Parameter(weight.clone())
    setattr(layer, "nx" if isinstance(layer, Conv1D) else "in_features", len(columns))
