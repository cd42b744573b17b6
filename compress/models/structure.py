"""Structure of a transformer, discovered in its module tree: blocks, attention heads and groups, feed-forward layers.

Few names of layers occur over all architectures, and shapes determine the rest. Tables are needed only for the
order of queries, keys and values in a joint projection. Code that prunes verifies the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.utils.errors import StageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


Linear = Any
"""An `nn.Linear`, or GPT-2's `Conv1D`, whose weight is transposed."""

_QUERIES = ("q_proj", "query", "q_lin", "q", "query_proj", "q_head", "wq", "q_b_proj")
_LATENT = ("kv_b_proj",)
"""Projection from a shared latent to keys and values of every head (multi-head latent attention)."""
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
"""Architectures whose joint projection interleaves query, key and value per head or group; others concatenate them."""
_UNKNOWN_ORDER = frozenset({"codegen"})


@dataclass(frozen=True)
class Attention:
    """Attention of ``heads`` that share keys and values in ``groups``; ``owner`` holds its projections.

    ``rows`` maps `query`, `key` and `value` to their output rows [heads or groups, rows of each] in their layer, which
    may be one for all three. ``output`` has [heads * head_size] inputs. All layers are in ``block``.
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
        """Return its four layers; a joint one occurs several times."""
        return self.query, self.key, self.value, self.output

    @property
    def width(self) -> int:
        """Return the number of inputs of the output projection."""
        return self.heads * self.head_size

    @property
    def prunable_units(self) -> int:
        """Return the number of units that can be pruned: groups with their heads, or heads if all share one group."""
        return self.groups if self.groups > 1 else self.heads


@dataclass(frozen=True)
class FeedForward:
    """Matrices with ``neurons`` outputs each, one or several per layer, and the output matrix.

    ``depthwise`` convolutions between them process each neuron separately.
    """

    inputs: tuple[Linear, ...]
    output: Linear
    depthwise: tuple[nn.Conv2d, ...] = ()

    @property
    def neurons(self) -> int:
        """Return the number of inputs of the output matrix."""
        return in_features(self.output)

    def rows(self, layer: Linear, neurons: torch.Tensor) -> torch.Tensor:
        """Return the output rows of an input layer for some neurons; a gated layer has several rows per neuron."""
        rows_per_neuron = out_features(layer) // self.neurons
        return torch.cat([neurons + share * self.neurons for share in range(rows_per_neuron)])


@dataclass(frozen=True)
class TransformerBlock:
    """One block of a stack."""

    module: nn.Module
    name: str
    attention: Attention | None
    feed_forward: FeedForward | None

    @property
    def prunable_units(self) -> int:
        """Return the number of units of its attention that can be pruned; 0 without a supported attention."""
        return 0 if self.attention is None else self.attention.prunable_units

    @property
    def neurons(self) -> int:
        """Return the number of its prunable feed-forward neurons; 0 if there are none."""
        return 0 if self.feed_forward is None else self.feed_forward.neurons

    def require_attention(self) -> Attention:
        """Return its attention. Raises `StageError` without a supported one."""
        if self.attention is None:
            raise StageError(
                f"Heads cannot be distinguished in the attention of {self.name} ({type(self.module).__name__}).",
                expected="separate or joint projections of queries, keys and values, and an output projection",
                hint="leave heads out",
            )
        return self.attention

    def require_feed_forward(self) -> FeedForward:
        """Return its feed-forward layers. Raises `StageError` without supported ones."""
        if self.feed_forward is None:
            raise StageError(
                f"{self.name} ({type(self.module).__name__}) has no feed-forward layer that can be cut.",
                expected="one or two linear layers to the neurons, and an output layer",
                hint="leave feed_forward out",
            )
        return self.feed_forward


def in_features(layer: Linear) -> int:
    """Return the number of inputs of a linear layer."""
    return int(layer.nx if isinstance(layer, Conv1D) else layer.in_features)


def out_features(layer: Linear) -> int:
    """Return the number of outputs of a linear layer."""
    return int(layer.nf if isinstance(layer, Conv1D) else layer.out_features)


def stacks(module: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of blocks by name: the innermost ones whose members have attention, else feed-forward layers.

    Raises `StageError` if there is none.
    """
    lists = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    # Attention identifies blocks most reliably; convolutional networks only have feed-forward layers.
    for roles in (_QUERIES + _JOINT, _EXPANDING):
        candidates = {
            name: part
            for name, part in lists.items()
            if any(_is(layer_name, roles) for item in part for layer_name, _ in _linears(item))
        }
        # A list of stages that contain blocks is not a list of blocks itself.
        innermost = {
            name: part for name, part in candidates.items() if not any(o.startswith(f"{name}.") for o in candidates)
        }
        if innermost:
            return innermost
    raise StageError(
        f"No blocks were found in a {type(module).__name__}.",
        expected="a torch.nn.ModuleList whose members attend or have feed-forward layers",
        hint="leave the stage out",
    )


def blocks(module: Any) -> list[TransformerBlock]:
    """Return all blocks, first to last. Raises `StageError` if there are none."""
    return [
        _block(item, f"{name}.{index}", module.config)
        for name, stack in stacks(module).items()
        for index, item in enumerate(stack)
    ]


def _linears(module: nn.Module) -> Iterator[tuple[str, Linear]]:
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | Conv1D):
            yield name, part


def _is(name: str, roles: tuple[str, ...]) -> bool:
    return any(name == role or name.endswith(f".{role}") for role in roles)


def _block(module: nn.Module, name: str, config: PretrainedConfig) -> TransformerBlock:
    layers = dict(_linears(module))
    # Layers belong to attention if they are inside a module with such a name, or beside a query projection.
    owners = {name.rpartition(".")[0] for name in layers if _is(name, _QUERIES)}
    # A joint projection counts only inside a module whose class is called attention: convolutions use such
    # names too.
    owners |= {
        owner
        for owner in (name.rpartition(".")[0] for name in layers if _is(name, _JOINT))
        if "attention" in type(module.get_submodule(owner)).__name__.lower()
    }
    named = {name for name in layers if any("att" in part.lower() for part in name.split(".")[:-1])}
    attention_names = named | {
        name for name in layers if any(owner and name.startswith(f"{owner}.") for owner in owners)
    }
    attention = _attention(module, {name: part for name, part in layers.items() if name in attention_names}, config)
    other_layers = {name: part for name, part in layers.items() if name not in attention_names}
    return TransformerBlock(module, name, attention, _feed_forward(module, other_layers))


def _only(layers: Mapping[str, Linear], roles: tuple[str, ...]) -> tuple[str, Linear] | None:
    matches = [(name, layer) for name, layer in layers.items() if _is(name, roles)]
    return matches[0] if len(matches) == 1 else None


def _attention(module: nn.Module, layers: Mapping[str, Linear], config: PretrainedConfig) -> Attention | None:
    output, joint, latent = (_only(layers, roles) for roles in (_ATTENTION_OUTPUTS, _JOINT, _LATENT))
    query, key, value = (_only(layers, roles) for roles in (_QUERIES, _KEYS, _VALUES))
    # A latent or joint projection takes the place of separate ones.
    if latent is not None:
        key = value = latent
    elif joint is not None:
        query = key = value = joint
    if output is None or query is None or key is None or value is None:
        return None
    owner = module.get_submodule(query[0].rpartition(".")[0])
    # With latent attention, values have their own head size.
    size = int(config.v_head_dim) if latent is not None else _head_size(owner, config)
    if not size or in_features(output[1]) % size:
        return None
    # The output projection reads all heads, so its width gives their number.
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
    """Return the rows of three separate projections; values are ``size`` wide, queries may include a gate."""
    query, key, value = widths
    # Grouped-query attention has fewer key and value heads than query heads.
    groups = value // size
    if not groups or value % size or heads % groups or query % heads or key % groups:
        return None
    parts = zip(("query", "key", "value"), widths, (heads, groups, groups), strict=True)
    return {name: torch.arange(width).view(count, -1) for name, width, count in parts}


def _latent_rows(widths: tuple[int, ...], heads: int, size: int) -> Rows | None:
    """Return the rows of a joint projection to keys and values, which are interleaved per head."""
    query, key_value_rows, _ = widths
    if query % heads or key_value_rows % heads or key_value_rows // heads <= size:
        return None
    parts = torch.arange(key_value_rows).view(heads, -1)
    return {"query": torch.arange(query).view(heads, -1), "key": parts[:, :-size], "value": parts[:, -size:]}


def _head_size(owner: nn.Module, config: PretrainedConfig) -> int:
    for name in _HEAD_SIZES:
        if isinstance(getattr(owner, name, None), int):
            return int(getattr(owner, name))
    # Without an explicit size, heads divide the hidden size evenly.
    heads = getattr(config, "num_attention_heads", None)
    head_size = getattr(config, "head_dim", None)
    if head_size or not isinstance(heads, int):
        return int(head_size or 0)
    return int(config.hidden_size) // heads


def _joint_rows(config: PretrainedConfig, rows: int, heads: int, size: int) -> Rows | None:
    """Return the rows of queries [heads, size], keys and values [groups, size] in a joint projection, or None."""
    # A joint projection has rows for all heads and twice for all groups.
    groups = (rows // size - heads) // 2
    if config.model_type in _UNKNOWN_ORDER or rows % size or groups < 1 or heads % groups:
        return None
    indices = torch.arange(rows)
    # Layout: for each group its queries, then one key and one value.
    if config.model_type in _BY_HEAD:
        parts = indices.view(groups, heads // groups + 2, size)
        return {"query": parts[:, :-2].reshape(heads, size), "key": parts[:, -2], "value": parts[:, -1]}
    # Layout: all queries, then all keys, then all values.
    queries, keys = heads * size, (heads + groups) * size
    return {
        "query": indices[:queries].view(heads, size),
        "key": indices[queries:keys].view(groups, size),
        "value": indices[keys:].view(groups, size),
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
    # Any other module with a size of neurons would break when neurons are removed, except depthwise
    # convolutions.
    between = _between(module, [*inputs, output[0]], neurons)
    depthwise = tuple(part for part in between if isinstance(part, nn.Conv2d) and part.groups == neurons)
    if len(depthwise) < len(between):
        return None
    return FeedForward(tuple(inputs.values()), output[1], depthwise)


def _between(module: nn.Module, paths: list[str], neurons: int) -> list[nn.Module]:
    """Return other modules of the feed-forward layer that have parameters per neuron."""
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


class TransposedLinear(nn.Linear):
    """Linear layer whose float weight is stored as [in_features, out_features]."""


def linear_for_conv1d(model: PreTrainedModel) -> frozenset[str]:
    """Replace every `Conv1D` by a `TransposedLinear` on the meta device, in place, and return their names."""
    convolutions = {name: part for name, part in model.named_modules() if isinstance(part, Conv1D)}
    for name, part in convolutions.items():
        replacement = TransposedLinear(part.nx, part.nf, bias=part.bias is not None, device="meta")
        model.set_submodule(name, replacement.requires_grad_(False))
    return frozenset(convolutions)
