"""What a transformer is made of, found in its module tree: stacks of blocks, heads and groups, feed-forward layers.

Names of layers are few over all architectures, and their shapes say the rest; a row in a table stands only for the
order in which a joint projection has its queries, keys and values. What is found is proven by whoever cuts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.utils.errors import StageError

Linear = Any
"""An `nn.Linear`, or GPT-2's `Conv1D`, whose weight is its transpose."""

_QUERIES = ("q_proj", "query", "q_lin", "q", "query_proj", "q_head", "wq", "q_b_proj")
_LATENT = ("kv_b_proj",)
"""Makes keys and values of every head out of what they share."""
_KEYS = ("k_proj", "key", "k_lin", "k", "key_proj", "k_head", "wk")
_VALUES = ("v_proj", "value", "v_lin", "v", "value_proj", "v_head", "wv")
_JOINT = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj")
_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense", "out_lin", "o", "c_proj", "proj", "Wo", "post_proj")
_EXPANDING = (
    *("gate_proj", "up_proj", "gate_up_proj", "fc1", "fc11", "fc12", "fc_in", "c_fc", "lin1", "intermediate.dense"),
    *("dense_h_to_4h", "linear_1", "linear1", "ffn", "Wi", "wi", "wi_0", "wi_1", "input_linear", "dense1", "pwconv1"),
    *("w1", "w3"),
)
_CONTRACTING = (
    *("down_proj", "fc2", "fc_out", "c_proj", "lin2", "output.dense", "dense_4h_to_h", "linear_2", "linear2"),
    *("ffn_output", "Wo", "wo", "output_linear", "dense2", "pwconv2", "w2"),
)
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "dim_per_head", "key_value_proj_dim", "d_head")
_BY_HEAD = frozenset({"gpt_neox", "bloom", "deberta", "falcon"})
"""Whose joint projection has query, key and value of each head, or group of heads, side by side; others one after the
other."""
_UNKNOWN_ORDER = frozenset({"codegen"})


@dataclass(frozen=True)
class Attention:
    """Attention of ``heads`` that share keys and values in ``groups``; ``owner`` holds its projections.

    ``rows``: of query, key and value, their outputs [heads or groups, rows of each] in their layer, which may be one
    for all three. ``output`` reads [heads * head_size]. All lie in ``block``.
    """

    block: nn.Module
    owner: nn.Module
    query: Linear
    key: Linear
    value: Linear
    rows: Mapping[str, torch.Tensor]
    output: Linear
    heads: int
    groups: int
    head_size: int

    @property
    def projections(self) -> tuple[Linear, ...]:
        """Its four layers, a joint one more than once."""
        return self.query, self.key, self.value, self.output

    @property
    def width(self) -> int:
        """Inputs of the projection back."""
        return self.heads * self.head_size

    @property
    def places(self) -> int:
        """What can be cut one by one: groups with their heads, or heads where all have the same keys and values."""
        return self.groups if self.groups > 1 else self.heads

    def of(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """The queries, keys or values [..., width] in the output of their layer."""
        rows = self.rows[name].flatten()
        return output if len(rows) == output.shape[-1] else output[..., rows]


@dataclass(frozen=True)
class FeedForward:
    """Matrices that lead to ``neurons`` each, one or several in a layer, and the one that leads back.

    ``depthwise`` convolutions lie between them and see one neuron at a time.
    """

    inputs: tuple[Linear, ...]
    output: Linear
    depthwise: tuple[nn.Conv2d, ...] = ()

    @property
    def neurons(self) -> int:
        """Inputs of the matrix that leads back."""
        return in_features(self.output)

    def rows(self, layer: Linear, neurons: torch.Tensor) -> torch.Tensor:
        """Outputs of an input layer that make some neurons: a gate and what it opens may be one layer."""
        shares = out_features(layer) // self.neurons
        return torch.cat([neurons + share * self.neurons for share in range(shares)])


@dataclass(frozen=True)
class Block:
    """One layer of a stack."""

    module: nn.Module
    name: str
    attention: Attention | None
    feed_forward: FeedForward | None

    @property
    def places(self) -> int:
        """What of its attention can be cut one by one; 0 where it has none that is known."""
        return 0 if self.attention is None else self.attention.places

    @property
    def neurons(self) -> int:
        """Its feed-forward neurons that can be cut; 0 where there are none."""
        return 0 if self.feed_forward is None else self.feed_forward.neurons

    def attended(self) -> Attention:
        """Its attention. Raises `StageError` where there is none that is known."""
        if self.attention is None:
            raise StageError(
                f"Heads cannot be told apart in the attention of {self.name} ({type(self.module).__name__}).",
                expected="projections of queries, keys and values, or one of all three, and one back",
                hint="leave heads out",
            )
        return self.attention

    def fed_forward(self) -> FeedForward:
        """Its feed-forward layers. Raises `StageError` where there are none that are known."""
        if self.feed_forward is None:
            raise StageError(
                f"{self.name} ({type(self.module).__name__}) has no feed-forward layer that can be cut.",
                expected="one or two linear layers that lead to neurons, and one that leads back",
                hint="leave feed_forward out",
            )
        return self.feed_forward


def in_features(layer: Linear) -> int:
    """Inputs of a linear layer."""
    return int(layer.nx if isinstance(layer, Conv1D) else layer.in_features)


def out_features(layer: Linear) -> int:
    """Outputs of a linear layer."""
    return int(layer.nf if isinstance(layer, Conv1D) else layer.out_features)


def stacks(module: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of blocks by their names: the innermost whose members attend, or else compute feed-forward layers.

    Raises `StageError` where there is none.
    """
    lists = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    for roles in (_QUERIES + _JOINT, _EXPANDING):
        found = {name: part for name, part in lists.items() if any(_has(item, roles) for item in part)}
        innermost = {name: part for name, part in found.items() if not any(o.startswith(f"{name}.") for o in found)}
        if innermost:
            return innermost
    raise StageError(
        f"No blocks were found in a {type(module).__name__}.",
        expected="a torch.nn.ModuleList whose members attend or have feed-forward layers",
        hint="leave the stage out",
    )


def blocks(module: Any) -> list[Block]:
    """All blocks, first to last. Raises `StageError` where none are found."""
    return [
        _block(item, f"{name}.{index}", module.config)
        for name, stack in stacks(module).items()
        for index, item in enumerate(stack)
    ]


def _linears(module: nn.Module) -> Iterator[tuple[str, Linear]]:
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | Conv1D):
            yield name, part


def _has(module: nn.Module, roles: tuple[str, ...]) -> bool:
    return any(_is(name, roles) for name, _ in _linears(module))


def _is(name: str, roles: tuple[str, ...]) -> bool:
    return any(name == role or name.endswith(f".{role}") for role in roles)


def _block(module: nn.Module, name: str, config: Any) -> Block:
    layers = dict(_linears(module))
    attends = _attention_paths(module, layers)
    attention = _attention(module, {name: part for name, part in layers.items() if name in attends}, config)
    rest = {name: part for name, part in layers.items() if name not in attends}
    return Block(module, name, attention, _feed_forward(module, rest))


def _attention_paths(module: nn.Module, layers: Mapping[str, Linear]) -> set[str]:
    """Layers that belong to attention: under a module called so, or beside a projection of queries."""
    owners = {name.rpartition(".")[0] for name in layers if _is(name, _QUERIES)}
    owners |= {
        owner
        for owner in (name.rpartition(".")[0] for name in layers if _is(name, _JOINT))
        if "attention" in type(module.get_submodule(owner)).__name__.lower()
    }
    called = {name for name in layers if any("att" in part.lower() for part in name.split(".")[:-1])}
    return called | {name for name in layers if any(owner and name.startswith(f"{owner}.") for owner in owners)}


def _only(layers: Mapping[str, Linear], roles: tuple[str, ...]) -> tuple[str, Linear] | None:
    found = [(name, layer) for name, layer in layers.items() if _is(name, roles)]
    return found[0] if len(found) == 1 else None


def _attention(module: nn.Module, layers: Mapping[str, Linear], config: Any) -> Attention | None:
    output, joint, latent = (_only(layers, roles) for roles in (_ATTENTION_OUTPUTS, _JOINT, _LATENT))
    query, key, value = (_only(layers, roles) for roles in (_QUERIES, _KEYS, _VALUES))
    if latent is not None:
        key = value = latent
    elif joint is not None:
        query = key = value = joint
    if output is None or query is None or key is None or value is None:
        return None
    owner = module.get_submodule(query[0].rpartition(".")[0])
    size = int(config.v_head_dim) if latent is not None else _head_size(owner, config)
    if not size or in_features(output[1]) % size:
        return None
    heads = in_features(output[1]) // size
    widths = tuple(out_features(layer) for _, layer in (query, key, value))
    if latent is not None:
        rows = _latent_rows(widths, heads, size)
    elif joint is not None:
        rows = _joint_rows(config, widths[0], heads, size)
    else:
        rows = _rows_apart(widths, heads, size)
    if rows is None:
        return None
    return Attention(module, owner, query[1], key[1], value[1], rows, output[1], heads, len(rows["key"]), size)


Rows = dict[str, torch.Tensor]


def _rows_apart(widths: tuple[int, ...], heads: int, size: int) -> Rows | None:
    """Of three projections; values are ``size`` wide, queries may have a gate beside them."""
    query, key, value = widths
    groups = value // size
    if not groups or value % size or heads % groups or query % heads or key % groups:
        return None
    found = zip(("query", "key", "value"), widths, (heads, groups, groups), strict=True)
    return {name: torch.arange(width).view(count, -1) for name, width, count in found}


def _latent_rows(widths: tuple[int, ...], heads: int, size: int) -> Rows | None:
    """Of a projection to keys and values, those of each head side by side."""
    query, both, _ = widths
    if query % heads or both % heads or both // heads <= size:
        return None
    parts = torch.arange(both).view(heads, -1)
    return {"query": torch.arange(query).view(heads, -1), "key": parts[:, :-size], "value": parts[:, -size:]}


def _head_size(owner: nn.Module, config: Any) -> int:
    for name in _HEAD_SIZES:
        if isinstance(getattr(owner, name, None), int):
            return int(getattr(owner, name))
    heads = getattr(config, "num_attention_heads", None)
    given = getattr(config, "head_dim", None)
    if given or not isinstance(heads, int):
        return int(given or 0)
    return int(config.hidden_size) // heads


def _joint_rows(config: Any, rows: int, heads: int, size: int) -> Rows | None:
    """Where a joint projection has its queries [heads, size], keys and values [groups, size]; None if unknown."""
    groups = (rows // size - heads) // 2
    if config.model_type in _UNKNOWN_ORDER or rows % size or groups < 1 or heads % groups:
        return None
    places = torch.arange(rows)
    if config.model_type in _BY_HEAD:
        parts = places.view(groups, heads // groups + 2, size)
        return {"query": parts[:, :-2].reshape(heads, size), "key": parts[:, -2], "value": parts[:, -1]}
    queries, keys = heads * size, (heads + groups) * size
    return {
        "query": places[:queries].view(heads, size),
        "key": places[queries:keys].view(groups, size),
        "value": places[keys:].view(groups, size),
    }


def _feed_forward(module: nn.Module, layers: Mapping[str, Linear]) -> FeedForward | None:
    output = _only(layers, _CONTRACTING)
    inputs = {name: layer for name, layer in layers.items() if _is(name, _EXPANDING)}
    if output is None or not inputs:
        return None
    neurons = in_features(output[1])
    if any(out_features(layer) % neurons for layer in inputs.values()):
        return None
    if len({in_features(layer) for layer in inputs.values()}) > 1:
        return None
    between = _between(module, [*inputs, output[0]], neurons)
    depthwise = tuple(part for part in between if isinstance(part, nn.Conv2d) and part.groups == neurons)
    if len(depthwise) < len(between):
        return None
    return FeedForward(tuple(inputs.values()), output[1], depthwise)


def _between(module: nn.Module, paths: list[str], neurons: int) -> list[nn.Module]:
    """What else in the feed-forward layer's module has something of each neuron."""
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*(path.split(".")[:-1] for path in paths), strict=False))
    common = ".".join(parts[0] for parts in shared)
    if not common:
        return []
    layers = {id(module.get_submodule(path)) for path in paths}
    return [
        part
        for part in module.get_submodule(common).modules()
        if id(part) not in layers and any(neurons in tensor.shape for tensor in part.parameters(recurse=False))
    ]
