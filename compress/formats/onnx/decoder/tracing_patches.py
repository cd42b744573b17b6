"""transformers' own modules with names in place of weights, and ONNX Runtime's operators in place of attention.

A `TracingPatches` stands behind attention, linear layers, tables and every parameter while a model runs inside `patched`. In a
*rehearsal* the numbers are arbitrary and what each attention call is gets recorded; in a *trace* each of these becomes
one node that carries the name of a module or tensor, and no weight is needed or kept.

What is known of a mask, of rotated queries and keys, and of those that come out of the cache is kept on the tensors.
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
    Rotation,
    classify_mask,
    describe_call,
)
from compress.models.experts import DOWN, GATE, UP
from compress.models.transposed_linear import TransposedLinear

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
    """A layer of the cache: new keys and values as they were ``new``, in a trace those of the ``past``.

    The attention appends them itself and says what is ``present``.
    """

    name: str
    past: Sequence[torch.Tensor] = ()
    new: Sequence[torch.Tensor] = ()
    present: Sequence[torch.Tensor] = ()


@dataclass
class TracingPatches:
    """What the functions that transformers calls from deep inside a model read and write.

    ``calls`` of the rehearsal by module. ``fused``: whether attention becomes one operator in a trace. ``grouped``:
    `GroupQueryAttention` for a decoder by itself, which ``rotates`` queries and keys where it can; else
    `MultiHeadAttention`, whose ``padding`` [batch, positions] hides from those who look at everything, and ``cached``
    where keys go from token to token.
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

    # ------------------------------------------------------------------ weights

    def parameter(self, name: str, shape: torch.Size) -> torch.Tensor:
        """A parameter: a node with its name, or arbitrary numbers."""
        return _node(Placeholder.PARAMETER, [], shape, name=name) if self.tracing else torch.rand(shape) * 0.5 + 0.5

    def product(self, layer: Any, value: torch.Tensor) -> torch.Tensor:
        """What a linear layer gives."""
        shape = [*value.shape[:-1], layer.out_features]
        if not self.tracing:
            return torch.randn(shape) * 0.5
        transposed = int(isinstance(layer, TransposedLinear))
        return _node(Placeholder.LINEAR, [value], shape, value.dtype, module=layer.compress_name, transposed=transposed)

    def rows(self, table: Any, ids: torch.Tensor) -> torch.Tensor:
        """What an embedding table gives."""
        shape = [*ids.shape, table.embedding_dim]
        return (
            _node(Placeholder.EMBEDDING, [ids], shape, module=table.compress_name)
            if self.tracing
            else torch.randn(shape)
        )

    def norm(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Root mean square normalisation as one operator."""
        epsilon, offset = self.norms[module.compress_name]
        scale = module.weight + offset if offset else module.weight
        about: dict[str, Any] = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
        kind = "SimplifiedLayerNormalization"
        return ops.symbolic(kind, [hidden, scale], about, dtype=hidden.dtype, shape=hidden.shape)

    def mark(self, kind: str, value: torch.Tensor, index: int) -> torch.Tensor:
        """``value`` where it enters or leaves a block."""
        return _node(kind, [value], value.shape, value.dtype, index=index) if self.tracing else value

    # ------------------------------------------------------------------ experts

    def mix(self, experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] of a mixture; a trace has the first expert only, between a `Placeholder.EXPERT_INPUT` and a `Placeholder.EXPERT_OUTPUT`.

        The first expert is given all rows in the trace; in the finished graph each is given those sent to it.
        """
        if not self.tracing:
            return torch.zeros_like(hidden)
        about = {"module": experts.compress_name, "count": experts.count}
        given = _node(Placeholder.EXPERT_INPUT, [hidden, chosen], hidden.shape, hidden.dtype, **about)
        beside = [experts.linear(0, role)(given) for role in (GATE, UP) if role in experts.names]
        part = experts.linear(0, DOWN)(experts._activate(torch.cat(beside, dim=-1)))
        return _node(Placeholder.EXPERT_OUTPUT, [part, hidden, chosen, shares], hidden.shape, hidden.dtype, **about)

    # ------------------------------------------------------------------ attention

    def mask(self, *arguments: Any, **named: Any) -> Any:
        """The mask of a rehearsal, and what it is."""
        from transformers.masking_utils import sdpa_mask

        never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        made: Any = sdpa_mask(*arguments, **named | never)
        made.compress_window = classify_mask(named.get("mask_function"))
        return made

    def rotate(self, function: Any, *arguments: Any, **named: Any) -> Any:
        """A model's own rotation of queries and keys, noted where it is one that the kernel knows."""
        rotated = function(*arguments, **named)
        given = [*arguments, *(named[name] for name in ("q", "k", "cos", "sin") if name in named)]
        if isinstance(rotated, tuple) and len(rotated) == 2 and len(given) >= 4:
            rotation = getattr(given[2], "compress_rotation", None)
            proven = rotation and rotation.proven(*given[:2], rotated)
            for one, plain in zip(rotated, given, strict=False):
                one.compress_turned = plain if self.tracing else proven
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
        """[batch, heads, length, size] to [batch, length, heads, size]: in a trace one node, else recorded."""
        sinks = sinks if s_aux is None else s_aux
        if self.tracing:
            call = self.calls[module.compress_name]
            if self.grouped:
                return self._grouped(call, query, key, value, sinks), None
            return self._many_heads(call, query, key, value, others.get(BIAS)), None
        window = EVERYTHING if attention_mask is None else getattr(attention_mask, "compress_window", None)
        slots = [getattr(one, "compress_slot", None) for one in (key, value)]
        turned = [getattr(one, "compress_turned", None) for one in (query, key)]
        call = AttentionCall(
            module.compress_name,
            slots[0].name if slots[0] else "",
            query.shape[1],
            key.shape[1],
            query.shape[-1],
            value.shape[-1],
            query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            float(softcap or 0.0),
            window,
            turned[0] if self.rotates and turned[0] is turned[1] else None,
        )
        lost = self.cached and None in slots
        self.calls[call.module] = describe_call(call, self.grouped, lost, sinks is not None, others)
        return torch.randn(query.shape[0], query.shape[2], query.shape[1], call.value_size), None

    def _many_heads(self, call: AttentionCall, query: Any, key: Any, value: Any, bias: Any) -> torch.Tensor:
        """Attention with as many heads of keys: within an encoder, of a decoder, or of a decoder to its encoder."""
        batch, heads, length, _ = query.shape
        slot: CacheSlot | None = getattr(key, "compress_slot", None)
        key, value = (key, value) if slot is None else slot.new
        past = () if slot is None else slot.past
        padding = self.padding if call.window == EVERYTHING else None
        flat = [one.transpose(1, 2).reshape(batch, one.shape[2], -1) for one in (query, key, value)]
        others = [padding, bias if call.biased else None, *past]
        about: dict[str, Any] = {"num_heads": heads, "scale": call.scale}
        if slot is not None and not call.layer.isdecimal():
            kind, inputs, presents = Placeholder.CROSS_ATTENTION, [flat[0], key, value], [key.shape, value.shape]
        else:
            kind, inputs = _MANY, [*flat, None]
            presents = [[*old.shape[:2], old.shape[2] + length, old.shape[3]] for old in past]
            about["unidirectional"] = int(call.window == CAUSAL)
        shape = [batch, length, heads * call.value_size]
        return _attention(kind, [*inputs, *others], about, shape, presents, slot).reshape(batch, length, heads, -1)

    def _grouped(self, call: AttentionCall, query: Any, key: Any, value: Any, sinks: Any) -> torch.Tensor:
        slot: CacheSlot = key.compress_slot
        tables: Sequence[Any] = [None, None]
        if call.rotation is not None:
            query, key, tables = query.compress_turned, key.compress_turned, _tables(call.rotation)
        batch, heads, length, size = query.shape
        if value.shape[-1] < size:
            value = nn.functional.pad(value, (0, size - value.shape[-1]))
        flat = [one.transpose(1, 2).reshape(batch, length, -1) for one in (query, key, value)]
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
        apart = attended.reshape(batch, length, heads, size)
        return apart[..., : call.value_size] if call.value_size < size else apart


def lengths_of(mask: torch.Tensor) -> Sequence[torch.Tensor]:
    """The node that gives the attention its lengths: of each row less one, [batch], and in all."""
    return nodes_of(Placeholder.LENGTHS, [mask], [[mask.shape[0]], []], torch.int32)


def _tables(rotation: Rotation) -> Sequence[torch.Tensor]:
    """The node that gives the attention its cosines and sines, each [positions, pairs]."""
    frequencies, factor, positions = list(rotation.frequencies), rotation.factor, rotation.positions
    shapes = [[positions, len(frequencies)]] * 2
    return nodes_of(Placeholder.ROTARY, [], shapes, frequencies=frequencies, factor=factor, positions=positions)


def _attention(
    kind: str, inputs: list[Any], about: dict[str, Any], shape: Any, presents: Any, slot: CacheSlot | None
) -> torch.Tensor:
    """What is attended to; what is present is left in the slot."""
    while inputs[-1] is None:
        inputs.pop()
    attended, *kept = nodes_of(kind, inputs, [shape, *presents], inputs[0].dtype, **about)
    if slot is not None and not slot.present:
        slot.present = kept
    return attended


def _node(kind: str, inputs: Any, shape: Any, dtype: torch.dtype = torch.float32, **about: Any) -> torch.Tensor:
    return ops.symbolic(f"{DOMAIN}::{kind}", inputs, about, dtype=dtype, shape=shape, version=1)


def nodes_of(
    kind: str, inputs: Any, shapes: Any, dtype: torch.dtype = torch.float32, **about: Any
) -> Sequence[torch.Tensor]:
    """The outputs of a node, ours unless ``kind`` names a domain."""
    shapes, kind = list(map(list, shapes)), kind if "::" in kind else f"{DOMAIN}::{kind}"
    return ops.symbolic_multi_out(kind, inputs, about, dtypes=[dtype] * len(shapes), shapes=shapes, version=1)
