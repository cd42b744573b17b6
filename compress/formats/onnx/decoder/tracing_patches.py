"""Replacements of transformers' functions that trace placeholders for weights and operators for attention.

`TracingPatches` replaces attention, linear layers, tables and every parameter while a model runs inside `patched`.
In a dry run all numbers are arbitrary, and each attention call is recorded. In a trace each replaced call becomes
one node with the name of a module or tensor, and no weight is needed.

Properties of a mask, of rotated queries and keys, and of those from the cache are attributes of the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from torch.onnx import ops

from compress.formats.onnx.decoder.attention_calls import (
    BIAS,
    CAUSAL,
    EVERYTHING,
    AttentionCall,
    classify_mask,
    describe_call,
)
from compress.models.experts import DOWN, GATE, UP
from compress.models.structure import TransposedLinear

DOMAIN = "compress"
_GROUPED, _MANY = "com.microsoft::GroupQueryAttention", "com.microsoft::MultiHeadAttention"


class Placeholder(StrEnum):
    """Operators of the domain `DOMAIN` that stand in a trace for nodes that are written later."""

    PARAMETER = "Parameter"
    LINEAR = "Linear"
    EMBEDDING = "Embedding"
    LENGTHS = "Lengths"
    ROTARY = "Rotary"
    CROSS_ATTENTION = "CrossAttention"
    DELTA_RULE = "GatedDeltaRule"
    SELECTIVE_SCAN = "SelectiveScan"
    EXPERT_INPUT = "ExpertInput"
    EXPERT_OUTPUT = "ExpertOutput"
    BLOCK_INPUT = "BlockInput"
    BLOCK_OUTPUT = "BlockOutput"
    SHARED_OUTPUT = "SharedOutput"


@dataclass
class CacheSlot:
    """A layer of the cache: the ``new`` keys and values, and in a trace those of the ``past``.

    The attention operator appends the new ones and returns those that are ``present``.
    """

    name: str
    past: Sequence[torch.Tensor] = ()
    new: Sequence[torch.Tensor] = ()
    present: Sequence[torch.Tensor] = ()


@dataclass
class TracingPatches:
    """State of the functions that transformers calls from inside a model, and the functions.

    ``calls`` holds the dry run's calls by module. ``fused``: attention becomes one operator in a trace. ``grouped``:
    `GroupQueryAttention` for a decoder without an encoder, which ``rotates`` queries and keys if possible; otherwise
    `MultiHeadAttention`, with ``padding`` [batch, positions] for attention to all positions, and ``cached`` if keys
    are carried from token to token.
    """

    grouped: bool = True
    cached: bool = True
    rotates: bool = True
    tracing: bool = False
    fused: bool = False
    calls: dict[str, AttentionCall] = field(default_factory=dict)
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)
    lengths: Sequence[torch.Tensor] = ()
    padding: torch.Tensor | None = None
    state: torch.Tensor | None = None
    """That of a recurrence, where a layer last asked its cache for it; some begin anew with each call all the same."""

    def parameter(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return a parameter: a placeholder with its name, or arbitrary numbers."""
        # Random values are positive and away from zero, so that norms and divisions stay finite.
        return _node(Placeholder.PARAMETER, [], shape, name=name) if self.tracing else torch.rand(shape) * 0.5 + 0.5

    def product(self, layer: Any, value: torch.Tensor) -> torch.Tensor:
        """Return the output of a linear layer."""
        shape = [*value.shape[:-1], layer.out_features]
        if not self.tracing:
            return torch.randn(shape) * 0.5
        about = {"module": layer.compress_module_name, "transposed": int(isinstance(layer, TransposedLinear))}
        return _node(Placeholder.LINEAR, [value], shape, value.dtype, **about)

    def rows(self, table: Any, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of an embedding table."""
        shape = [*ids.shape, table.embedding_dim]
        if not self.tracing:
            return torch.randn(shape)
        return _node(Placeholder.EMBEDDING, [ids], shape, module=table.compress_module_name)

    def norm(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Return root mean square normalisation as one operator."""
        epsilon, offset = self.norms[module.compress_module_name]
        scale = module.weight + offset if offset else module.weight
        about: dict[str, Any] = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
        kind = "SimplifiedLayerNormalization"
        return ops.symbolic(kind, [hidden, scale], about, dtype=hidden.dtype, shape=hidden.shape)

    def mark(self, kind: str, value: torch.Tensor, index: int) -> torch.Tensor:
        """Mark ``value`` where it enters or leaves a block."""
        return _node(kind, [value], value.shape, value.dtype, index=index) if self.tracing else value

    def mix(self, experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Return the output [tokens, hidden] of a mixture of experts.

        A trace holds only the first expert, between two placeholders, and gives it all rows. In the finished graph
        every expert gets the rows that are routed to it.

        Args:
            experts: The module of all experts.
            hidden: Hidden states [tokens, hidden].
            chosen: Experts that the router chose [tokens, k].
            shares: Their weights [tokens, k].
        """
        if not self.tracing:
            return torch.zeros_like(hidden)
        about = {"module": experts.compress_module_name, "count": experts.count}
        expert_input = _node(Placeholder.EXPERT_INPUT, [hidden, chosen], hidden.shape, hidden.dtype, **about)
        beside = [experts.linear(0, role)(expert_input) for role in (GATE, UP) if role in experts.names]
        part = experts.linear(0, DOWN)(experts._activate(torch.cat(beside, dim=-1)))
        return _node(Placeholder.EXPERT_OUTPUT, [part, hidden, chosen, shares], hidden.shape, hidden.dtype, **about)

    def mask(self, *arguments: object, **named: object) -> Any:
        """Return the mask of a dry run, with its kind as an attribute."""
        from transformers.masking_utils import sdpa_mask

        never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask: Any = sdpa_mask(*arguments, **named | never)
        mask.compress_window = classify_mask(named.get("mask_function"))
        return mask

    def rotate(self, function: Any, *arguments: Any, **named: Any) -> Any:
        """Apply a model's rotation of queries and keys, and mark the results if the kernel can rotate instead."""
        rotated = function(*arguments, **named)
        # The attribute holds the kernel's rotation in a dry run, and the tensor before rotation in a trace.
        originals = [*arguments, *(named[name] for name in ("q", "k", "cos", "sin") if name in named)]
        if isinstance(rotated, tuple) and len(rotated) == 2 and len(originals) >= 4:
            rotation = getattr(originals[2], "compress_rotation", None)
            proven = rotation and rotation.proven(*originals[:2], rotated)
            for rotated_tensor, plain in zip(rotated, originals, strict=False):
                rotated_tensor.compress_rotary = plain if self.tracing else proven
        return rotated

    def attend(
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Any = None,
        sinks: Any = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """Trace or record an attention call with the interface of transformers' attention functions.

        Args:
            module: The attention module.
            query: Queries [batch, heads, length, size].
            key: Keys [batch, key heads, length, size].
            value: Values [batch, key heads, length, size].
            attention_mask: The mask.
            scaling: Factor of the scores; by default size to the power of -1/2.
            softcap: Soft cap of the scores.
            s_aux: Attention sinks.
            sinks: Attention sinks, by another name.
            **others: Further arguments.

        Returns:
            The output [batch, length, heads, size], and None for the attention weights.
        """
        sinks = sinks if s_aux is None else s_aux
        if self.tracing:
            call = self.calls[module.compress_module_name]
            if self.grouped:
                return self._grouped(call, query, key, value, sinks), None
            return self._many_heads(call, query, key, value, others.get(BIAS)), None
        # Recorded in the dry run: the kind of the mask, the cache's slot, and the rotation.
        window = EVERYTHING if attention_mask is None else getattr(attention_mask, "compress_window", None)
        slots = [getattr(tensor, "compress_slot", None) for tensor in (key, value)]
        turned = [getattr(tensor, "compress_rotary", None) for tensor in (query, key)]
        name, layer = module.compress_module_name, slots[0].name if slots[0] else ""
        sizes = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        rotation = turned[0] if self.rotates and turned[0] is turned[1] else None
        call = AttentionCall(name, layer, *sizes, scale, float(softcap or 0.0), window, rotation)
        lost = self.cached and None in slots
        self.calls[call.module] = describe_call(call, self.grouped, lost, sinks is not None, others)
        return torch.randn(query.shape[0], query.shape[2], query.shape[1], call.value_size), None

    def _many_heads(self, call: AttentionCall, query: Any, key: Any, value: Any, bias: Any) -> torch.Tensor:
        """Trace `MultiHeadAttention`: within an encoder, of a decoder, or of a decoder to its encoder."""
        batch, heads, length, _ = query.shape
        slot: CacheSlot | None = getattr(key, "compress_slot", None)
        key, value = (key, value) if slot is None else slot.new
        past = () if slot is None else slot.past
        padding = self.padding if call.window == EVERYTHING else None
        flat = [tensor.transpose(1, 2).reshape(batch, tensor.shape[2], -1) for tensor in (query, key, value)]
        others = [padding, bias if call.biased else None, *past]
        about: dict[str, Any] = {"num_heads": heads, "scale": call.scale}
        kind: str = _MANY
        # Keys and values of an encoder's output are cached or computed, which is decided in the graph.
        if slot is not None and not call.layer.isdecimal():
            kind, inputs, presents = Placeholder.CROSS_ATTENTION, [flat[0], key, value], [key.shape, value.shape]
        else:
            inputs = [*flat, None]
            presents = [[*old.shape[:2], old.shape[2] + length, old.shape[3]] for old in past]
            about["unidirectional"] = int(call.window == CAUSAL)
        shape = [batch, length, heads * call.value_size]
        return _attention(kind, [*inputs, *others], about, shape, presents, slot).reshape(batch, length, heads, -1)

    def _grouped(self, call: AttentionCall, query: Any, key: Any, value: Any, sinks: Any) -> torch.Tensor:
        """Trace `GroupQueryAttention`."""
        slot: CacheSlot = key.compress_slot
        tables: Sequence[Any] = [None, None]
        if call.rotation is not None:
            # The operator rotates, so it gets queries and keys from before the rotation.
            query, key = query.compress_rotary, key.compress_rotary
            # The placeholder of cosines and sines, each [positions, pairs].
            frequencies, positions = list(call.rotation.frequencies), call.rotation.positions
            angles: dict[str, Any] = {"frequencies": frequencies, "factor": call.rotation.factor}
            shape = [positions, len(frequencies)]
            tables = nodes_of(Placeholder.ROTARY, [], [shape, shape], **angles, positions=positions)
        batch, heads, length, size = query.shape
        # The operator requires values as wide as keys; the padding is cut off afterwards.
        if value.shape[-1] < size:
            value = nn.functional.pad(value, (0, size - value.shape[-1]))
        flat = [tensor.transpose(1, 2).reshape(batch, length, -1) for tensor in (query, key, value)]
        inputs = [*flat, *slot.past, *self.lengths, *tables, None, None, sinks]
        about = {
            "num_heads": heads,
            "kv_num_heads": key.shape[1],
            "local_window_size": -1 if call.window is None else call.window,
            "do_rotary": int(call.rotation is not None),
            "rotary_interleaved": int(call.rotation is not None and call.rotation.interleaved),
            **({} if call.scale == size**-0.5 else {"scale": call.scale}),
            **({"softcap": call.softcap} if call.softcap else {}),
        }
        presents = [[batch, key.shape[1], slot.past[0].shape[2] + length, size]] * 2
        attended = _attention(_GROUPED, inputs, about, [batch, length, heads * size], presents, slot)
        heads_apart = attended.reshape(batch, length, heads, size)
        return heads_apart[..., : call.value_size] if call.value_size < size else heads_apart


def lengths_of(mask: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the placeholder of the attention's lengths: of each row minus one [batch], and in total."""
    return nodes_of(Placeholder.LENGTHS, [mask], [[mask.shape[0]], []], torch.int32)


def _attention(
    kind: str, inputs: list[Any], about: dict[str, Any], shape: Any, presents: Any, slot: CacheSlot | None
) -> torch.Tensor:
    """Trace an attention operator; its updated cache is stored in the slot."""
    # Optional inputs at the end are left out.
    while inputs[-1] is None:
        inputs.pop()
    attended, *updated_cache = nodes_of(kind, inputs, [shape, *presents], inputs[0].dtype, **about)
    if slot is not None and not slot.present:
        slot.present = updated_cache
    return attended


def _node(kind: str, inputs: Any, shape: Any, dtype: torch.dtype = torch.float32, **about: Any) -> torch.Tensor:
    """Trace a placeholder with one output."""
    return ops.symbolic(f"{DOMAIN}::{kind}", inputs, about, dtype=dtype, shape=shape, version=1)


def nodes_of(
    kind: str, inputs: Any, shapes: Any, dtype: torch.dtype = torch.float32, **about: Any
) -> Sequence[torch.Tensor]:
    """Trace a node and return its outputs; it is a placeholder unless ``kind`` names a domain.

    Args:
        kind: Placeholder or operator, the latter with its domain.
        inputs: Inputs of the node.
        shapes: Shape of each output.
        dtype: Type of all outputs.
        **about: Attributes of the node.
    """
    shapes, kind = list(map(list, shapes)), kind if "::" in kind else f"{DOMAIN}::{kind}"
    return ops.symbolic_multi_out(kind, inputs, about, dtypes=[dtype] * len(shapes), shapes=shapes, version=1)
