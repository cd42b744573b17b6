"""The parts of a transformer encoder, of text or images, that compression cuts: blocks, heads, feed-forward neurons."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.checkpoints.channel_record import CHANNELS_KEY
from compress.errors import StageError

HEADS_KEY = "compress_attention_heads"
"""Config key that records the heads of each layer once they differ from ``num_attention_heads``."""


@dataclass(frozen=True)
class Block:
    """One encoder layer. Projections have weights [out_features, in_features]."""

    module: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    feed_forward_in: nn.Linear
    feed_forward_out: nn.Linear
    head_size: int

    @property
    def heads(self) -> int:
        """Attention heads left in this block."""
        return self.query.out_features // self.head_size


@dataclass(frozen=True)
class _Family:
    """Where an architecture keeps its blocks; paths are relative to one block."""

    layers: str
    query: str
    key: str
    value: str
    attention_output: str
    feed_forward_in: str
    feed_forward_out: str


_BERT = _Family(
    "encoder.layer",
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
_DISTILBERT = _Family(
    "transformer.layer",
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    "ffn.lin1",
    "ffn.lin2",
)
_VIT = _Family(
    "layers",
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.o_proj",
    "mlp.fc1",
    "mlp.fc2",
)
FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
    "deit": _VIT,
    "vit": _VIT,
}
BERT_FAMILIES = tuple(name for name, family in FAMILIES.items() if family is _BERT)
"""Architectures built like BERT, whose classifiers read the first token."""


def _family(module: PreTrainedModel) -> _Family:
    family = FAMILIES.get(module.config.model_type)
    if family is None:
        raise StageError(
            f"The layers of a {module.config.model_type!r} model cannot be cut yet.",
            expected=f"one of {', '.join(FAMILIES)}",
            mend="leave the stage out, or add the architecture to compress/architectures/transformer.py",
        )
    return family


def layer_list(module: PreTrainedModel) -> nn.ModuleList:
    """The list of encoder layers. Raises `StageError` for an architecture outside `FAMILIES`."""
    layers = module.base_model.get_submodule(_family(module).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


@contextlib.contextmanager
def with_layers(module: PreTrainedModel, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let ``module`` pass through ``layers`` in place of its own, for the time of a context."""
    own, path = layer_list(module), _family(module).layers
    module.base_model.set_submodule(path, nn.ModuleList(layers))
    try:
        yield
    finally:
        module.base_model.set_submodule(path, own)


def blocks(module: PreTrainedModel) -> list[Block]:
    """The encoder's blocks, first to last. Raises `StageError` for an architecture outside `FAMILIES`."""
    family = _family(module)
    head_size = module.config.hidden_size // module.config.num_attention_heads
    found = []
    for layer in layer_list(module):
        linears = {}
        for name in list(_Family.__dataclass_fields__)[1:]:
            linear = layer.get_submodule(getattr(family, name))
            assert isinstance(linear, nn.Linear)
            linears[name] = linear
        found.append(Block(module=layer, head_size=head_size, **linears))
    return found


def drop_pooler(module: PreTrainedModel) -> None:
    """Take off, in place, the layer that BERT pools with in pretraining: no embedding reads it."""
    if getattr(module, "pooler", None) is not None:
        module.pooler = None


def keep_layers(module: PreTrainedModel, kept: Sequence[int]) -> None:
    """Drop the encoder layers outside ``kept`` (indices from 0), in place. Raises `StageError` for a wrong index."""
    layers = layer_list(module)
    if getattr(module.config, CHANNELS_KEY, None):
        raise StageError("Layers cannot go once channels have been cut.", mend="remove the layers first")
    wrong = [index for index in kept if not 0 <= index < len(layers)]
    if wrong or len(set(kept)) != len(kept):
        raise StageError(f"Cannot keep layers {list(kept)}.", expected=f"distinct indices from 0 to {len(layers) - 1}")
    remaining = [layers[index] for index in sorted(kept)]
    heads = _recorded_heads(module)
    del layers[len(remaining) :]
    for index, layer in enumerate(remaining):
        layers[index] = layer
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                setattr(part, "layer_idx", index)  # noqa: B010
    module.config.num_hidden_layers = len(remaining)
    if heads:
        setattr(module.config, HEADS_KEY, [heads[index] for index in sorted(kept)])


def _recorded_heads(module: PreTrainedModel) -> list[int] | None:
    heads: list[int] | None = getattr(module.config, HEADS_KEY, None)
    return heads


def keep_heads(module: PreTrainedModel, kept: Sequence[Sequence[int]]) -> None:
    """Cut each block's attention down to the heads in ``kept[layer]``, in place, and record the counts."""
    for block, heads in zip(blocks(module), kept, strict=True):
        rows = _rows_of_heads(heads, block.head_size)
        for projection in (block.query, block.key, block.value):
            _keep_rows(projection, rows)
        _keep_columns(block.attention_output, rows)
    setattr(module.config, HEADS_KEY, [len(heads) for heads in kept])


def keep_neurons(module: PreTrainedModel, kept: Sequence[torch.Tensor]) -> None:
    """Cut each block's feed-forward layer down to the neurons in ``kept[layer]``, in place.

    All blocks keep the same number, which the config's ``intermediate_size`` (``hidden_dim``) then says.
    """
    for block, neurons in zip(blocks(module), kept, strict=True):
        _keep_rows(block.feed_forward_in, neurons)
        _keep_columns(block.feed_forward_out, neurons)
    name = "hidden_dim" if module.config.model_type == "distilbert" else "intermediate_size"
    setattr(module.config, name, len(kept[0]))


def shrink_to_recorded_heads(module: PreTrainedModel) -> None:
    """Give a freshly built model the projection sizes that `HEADS_KEY` records, before its weights are loaded."""
    heads = _recorded_heads(module)
    if heads:
        keep_heads(module, [range(count) for count in heads])


def _rows_of_heads(heads: Iterable[int], head_size: int) -> torch.Tensor:
    return torch.tensor([head * head_size + offset for head in heads for offset in range(head_size)])


@torch.no_grad()
def _keep_rows(linear: nn.Linear, rows: torch.Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight[rows].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[rows].clone())
    linear.out_features = len(rows)


@torch.no_grad()
def _keep_columns(linear: nn.Linear, columns: torch.Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight[:, columns].clone())
    linear.in_features = len(columns)
