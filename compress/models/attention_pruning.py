"""Cutting one attention down to some of its heads: projections, and whatever else it has of each head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.models.structure import Attention, Linear

_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")
_GROUP_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_HEAD_WIDTHS = ("all_head_size", "split_size", "inner_dim", "embed_dim", "hidden_size", "d_attn")


def why_whole(attention: Attention) -> str | None:
    """Why heads cannot be told apart, or None."""
    layers = {id(layer) for layer in attention.projections}
    for name, part in attention.owner.named_modules():
        if id(part) in layers:
            continue
        if _is_norm_of_heads(name) and any(
            tensor.shape == (attention.width,) for tensor in part.parameters(recurse=False)
        ):
            return f"{name} normalises all of them at once"
    return None


def _is_norm_of_heads(name: str) -> bool:
    """Whether a module normalises queries, keys or what is attended to, rather than what the layer gives."""
    leaf = name.rpartition(".")[2].lower()
    return "norm" in name.lower() and leaf.replace("_", "") != "layernorm"


@torch.no_grad()
def keep_places(attention: Attention, places: Sequence[int]) -> None:
    """Cut one attention down to ``places``, in place."""
    each = attention.heads // attention.places
    heads = [place * each + offset for place in places for offset in range(each)]
    groups = list(places) if attention.groups > 1 else [0]
    _cut_per_head(attention, {attention.groups: groups, attention.heads: heads})
    chosen = {"query": heads, "key": groups, "value": groups}
    rows: dict[int, tuple[Linear, list[torch.Tensor]]] = {}
    for name, layer in (("query", attention.query), ("key", attention.key), ("value", attention.value)):
        rows.setdefault(id(layer), (layer, []))[1].append(attention.rows[name][chosen[name]].flatten())
    for layer, parts in rows.values():
        keep_rows(layer, torch.cat(parts).sort().values if len(parts) > 1 else parts[0])
    columns = torch.arange(attention.heads * attention.head_size).view(attention.heads, -1)[heads].flatten()
    keep_columns(attention.output, columns)
    _count_again(attention, len(heads), len(groups))


def _cut_per_head(attention: Attention, kept: Mapping[int, Sequence[int]]) -> None:
    """Cut what the attention has of each head beside its projections: sinks, gates, biases of positions, norms.

    ``kept``: those that stay of so many.
    """
    layers = {id(layer) for layer in attention.projections}
    positions = [part for name, part in attention.block.named_modules() if "relative_position" in name]
    inside = [*attention.owner.named_modules(), *((f"positions{n}", part) for n, part in enumerate(positions))]
    done: set[int] = set()
    for name, part in inside:
        if id(part) in layers | done:
            continue
        done.add(id(part))
        if isinstance(part, nn.ModuleList) and len(part) in kept:
            stays = [part[index] for index in kept[len(part)]]
            del part[:]
            part.extend(stays)
        for leaf, tensor in [*part.named_parameters(recurse=False)]:
            if not ("norm" in name.lower() and tensor.ndim == 1):
                _cut_parameter(attention, part, leaf, kept)


def _cut_parameter(attention: Attention, part: nn.Module, leaf: str, kept: Mapping[int, Sequence[int]]) -> None:
    """Cut one parameter along the axis that has an entry for each head, or for each feature of all heads."""
    tensor = getattr(part, leaf)
    if isinstance(part, nn.Conv2d) and part.groups < part.in_channels:
        return
    sizes = {size: torch.tensor(list(places)) for size, places in kept.items()}
    columns = torch.arange(attention.width).view(attention.heads, -1)[sizes[attention.heads]].flatten()
    sizes = {attention.width: columns, **sizes}
    axes = tensor.shape[:1] if isinstance(part, nn.Linear | nn.Conv2d) else tensor.shape
    axis = next((axis for axis, size in enumerate(axes) if size in sizes), None)
    if axis is None:
        return
    chosen = sizes[tensor.shape[axis]]
    smaller = tensor.detach().index_select(axis, chosen.to(tensor.device)).clone()
    setattr(part, leaf, nn.Parameter(smaller, requires_grad=tensor.requires_grad))
    if isinstance(part, nn.Embedding) and axis == 1:
        part.embedding_dim = len(chosen)
    elif isinstance(part, nn.Linear):
        part.out_features = len(chosen)
    elif isinstance(part, nn.Conv2d):
        part.groups = part.in_channels = part.out_channels = len(chosen)


def _count_again(attention: Attention, heads: int, groups: int) -> None:
    """Let the attention's modules say how many heads they have."""
    counted = dict.fromkeys(_HEAD_COUNTS, (attention.heads, heads))
    counted |= dict.fromkeys(_GROUP_COUNTS, (attention.groups, groups))
    counted |= dict.fromkeys(_HEAD_WIDTHS, (attention.heads * attention.head_size, heads * attention.head_size))
    counted["num_key_value_groups"] = (attention.heads // attention.groups, heads // groups)
    for part in attention.owner.modules():
        if isinstance(part, nn.Linear | Conv1D):
            continue
        for name, (old, new) in counted.items():
            if vars(part).get(name) == old:
                setattr(part, name, new)


@torch.no_grad()
def keep_rows(layer: Linear | nn.Conv2d, rows: torch.Tensor) -> None:
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
    weight = layer.weight[columns] if isinstance(layer, Conv1D) else layer.weight[:, columns]
    layer.weight = nn.Parameter(weight.clone())
    setattr(layer, "nx" if isinstance(layer, Conv1D) else "in_features", len(columns))
