"""transformers' own modules with names in place of weights, and ONNX Runtime's operators in place of attention.

A `Plug` stands behind attention, linear layers, tables and every parameter while a model runs inside `plugged`. In a
*rehearsal* the numbers are arbitrary and what each attention call is gets recorded; in a *trace* each of these becomes
one node that carries the name of a module or tensor, and no weight is needed or kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.onnx import ops

from compress.checkpoints.experts import DOWN, GATE, UP
from compress.checkpoints.transposed_linear import TransposedLinear
from compress.formats.onnx.decoder.calls import BIAS, CAUSAL, EVERYTHING, EXTRA, Call, mask_of
from compress.formats.onnx.decoder.rotary import Rotation, rotation_of

DOMAIN = "compress"
PARAMETER, LINEAR, TABLE, LENGTHS, ROTARY, CROSS_ATTENTION = (
    "Parameter",
    "Linear",
    "Table",
    "Lengths",
    "Rotary",
    "CrossAttention",
)
TAKE, GIVE, ENTER, LEAVE, SHARE = "Take", "Give", "Enter", "Leave", "Share"
"""The nodes that stand in a trace for what the checkpoint, or the finished graph, puts there."""

_ROTARY_UNIT, _PAIRS_UNIT = 16, 8
"""ONNX Runtime's attention rotates heads of a multiple of 16, by 8 pairs each."""
Attributes = dict[str, int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]]


@dataclass
class _Rotated:
    query: torch.Tensor
    key: torch.Tensor


class Slot:
    """Stands in a layer of the cache: takes new keys and values as they are; the attention appends them."""

    def __init__(self, past: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.past = self.given = past
        self.present: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass
class Plug:
    """What the functions that transformers calls from deep inside a model read and write.

    ``calls`` of the rehearsal by module. ``fused``: whether attention becomes one operator in a trace. ``grouped``:
    `GroupQueryAttention` for a decoder by itself; else `MultiHeadAttention`, whose ``padding`` [batch, positions] hides
    from those who look at everything, and ``cached`` where keys go from token to token.
    """

    grouped: bool = True
    cached: bool = True
    tracing: bool = False
    fused: bool = False
    calls: dict[str, Call] = field(default_factory=dict)
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)
    updated: dict[int, str] = field(default_factory=dict)
    lengths: tuple[torch.Tensor, torch.Tensor] | None = None
    padding: torch.Tensor | None = None
    state: torch.Tensor | None = None
    """That of a recurrence, where a layer last asked its cache for it; some begin anew with each call all the same."""
    missed: list[str] = field(default_factory=list)
    """Layers of the cache whose attention went past the interface."""
    _windows: dict[int, int | None] = field(default_factory=dict)
    _rotations: dict[int, Rotation | None] = field(default_factory=dict)
    _rotated: dict[int, _Rotated | Rotation | None] = field(default_factory=dict)
    _kept: list[Any] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the tensors of the last run."""
        for one in (self.slots, self.updated, self._windows, self._rotated, self._kept, self._rotations):
            one.clear()
        self.lengths = self.padding = None

    def note_update(self, layer: str, given: tuple[Any, Any], found: tuple[Any, Any]) -> None:
        """That a layer of the cache was ``given`` a key and a value, and gave back those that it ``found``."""
        self.updated |= dict.fromkeys(map(id, found), layer)
        if id(given[0]) in self._rotated:
            self._rotated[id(found[0])] = self._rotated[id(given[0])]
        if layer in self.slots:
            self.slots[layer].given = given
        self._kept += [*given, *found]  # lest another tensor gets the identity of one of them

    # ------------------------------------------------------------------ weights

    def parameter(self, name: str, shape: torch.Size) -> torch.Tensor:
        """A parameter: a node with its name, or arbitrary numbers."""
        if self.tracing:
            return ops.symbolic(
                f"{DOMAIN}::{PARAMETER}", [], {"name": name}, dtype=torch.float32, shape=shape, version=1
            )
        return torch.rand(shape) * 0.5 + 0.5

    def product(self, layer: Any, value: torch.Tensor) -> torch.Tensor:
        """What a linear layer gives."""
        shape = [*value.shape[:-1], layer.out_features]
        if not self.tracing:
            return torch.randn(shape) * 0.5
        about: Attributes = {"module": layer.compress_name, "transposed": int(isinstance(layer, TransposedLinear))}
        return ops.symbolic(f"{DOMAIN}::{LINEAR}", [value], about, dtype=value.dtype, shape=shape, version=1)

    def rows(self, table: Any, ids: torch.Tensor) -> torch.Tensor:
        """What an embedding table gives."""
        shape = [*ids.shape, table.embedding_dim]
        if not self.tracing:
            return torch.randn(shape)
        about = {"module": table.compress_name}
        return ops.symbolic(f"{DOMAIN}::{TABLE}", [ids], about, dtype=torch.float32, shape=shape, version=1)

    def norm(self, module: Any, hidden: torch.Tensor, epsilon: float, offset: float) -> torch.Tensor:
        """Root mean square normalisation as one operator."""
        scale = module.weight + offset if offset else module.weight
        about: Attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
        kind = "SimplifiedLayerNormalization"
        return ops.symbolic(kind, [hidden, scale], about, dtype=hidden.dtype, shape=hidden.shape)

    def mark(self, kind: str, value: torch.Tensor, index: int) -> torch.Tensor:
        """``value`` where it enters or leaves a block."""
        if not self.tracing:
            return value
        about: Attributes = {"index": index}
        return ops.symbolic(f"{DOMAIN}::{kind}", [value], about, dtype=value.dtype, shape=value.shape, version=1)

    # ------------------------------------------------------------------ experts

    def mix(self, experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] of a mixture; a trace has the first expert only, between a `TAKE` and a `GIVE`.

        The first expert is given all rows in the trace; in the finished graph each is given those sent to it.
        """
        if not self.tracing:
            return torch.zeros_like(hidden)
        about = {"module": experts.compress_name, "count": experts.count}
        given = ops.symbolic(
            f"{DOMAIN}::{TAKE}", [hidden, chosen], about, dtype=hidden.dtype, shape=hidden.shape, version=1
        )
        beside = [experts.linear(0, role)(given) for role in (GATE, UP) if role in experts.names]
        part = experts.linear(0, DOWN)(experts._activate(torch.cat(beside, dim=-1)))
        inputs = [part, hidden, chosen, shares]
        return ops.symbolic(f"{DOMAIN}::{GIVE}", inputs, about, dtype=hidden.dtype, shape=hidden.shape, version=1)

    # ------------------------------------------------------------------ attention

    def mask(self, **arguments: Any) -> torch.Tensor:
        """The mask of a rehearsal, and what it is."""
        from transformers.masking_utils import sdpa_mask

        never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        made: torch.Tensor = sdpa_mask(**{**arguments, **never})
        self._windows[id(made)] = mask_of(arguments.get("mask_function"))
        self._kept.append(made)
        return made

    def rotary_tables(self, module: Any, found: Any, layer_type: str | None) -> Any:
        """What a module of rotary positions gave, recognised again where it is used."""
        if isinstance(found, tuple) and len(found) == 2 and not self.tracing:
            self._rotations[id(found[0])] = rotation_of(module, found[0], layer_type)
            self._kept.append(found)
        elif isinstance(found, tuple) and self.tracing:
            self._kept.append(found)
        return found

    def rotate(self, function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A model's own rotation of queries and keys, noted where it is one that the kernel knows."""
        rotated = function(*arguments, **named)
        given = [*arguments, *(named[name] for name in ("q", "k", "cos", "sin") if name in named)]
        if not (isinstance(rotated, tuple) and len(rotated) == 2 and len(given) >= 4):
            return rotated
        query, key, cosine, sine = given[:4]
        self._kept += [rotated, given]
        if self.tracing:
            self._rotated[id(rotated[0])] = self._rotated[id(rotated[1])] = _Rotated(query, key)
            return rotated
        rotation = self._rotations.get(id(cosine))
        proven = rotation and rotation.proven(query, key, cosine, sine, rotated)
        self._rotated[id(rotated[0])] = self._rotated[id(rotated[1])] = proven or None
        return rotated

    def attend(
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        scale: float | None,
        softcap: Any,
        sinks: Any,
        others: Any,
    ) -> torch.Tensor:
        """[batch, length, heads, size]: in a rehearsal computed and recorded, in a trace one node."""
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        bias = others.get(BIAS)
        if self.tracing and not self.grouped:
            return self._many_heads(self.calls[module.compress_name], query, key, value, bias)
        if self.tracing:
            return self._operator(module, query, key, value, scale, sinks)
        layer = self.updated.get(id(key), "")
        window = EVERYTHING if mask is None else self._windows.get(id(mask))
        sizes = query.shape[-1], value.shape[-1]
        rotation = self._rotated.get(id(query))
        both = rotation if isinstance(rotation, Rotation) and self._rotated.get(id(key)) is rotation else None
        if both is not None and (sizes[0] % _ROTARY_UNIT or len(both.frequencies) % _PAIRS_UNIT):
            both = None
        call = Call(
            module.compress_name,
            layer,
            query.shape[1],
            key.shape[1],
            *sizes,
            scale,
            float(softcap or 0.0),
            window,
            both,
            bias is not None and bool(bias.any()),
        )
        lost = self.cached and (not layer or id(value) not in self.updated)
        extra = [name for name in EXTRA if others.get(name) is not None]
        problem = "its keys are changed after the cache" if lost else ""
        problem = problem or (
            call.against_groups(extra) if self.grouped else call.against_many(extra, sinks is not None)
        )
        self.calls[call.module] = replace(call, problem=problem)
        return torch.randn(query.shape[0], query.shape[2], query.shape[1], sizes[1])

    def _many_heads(self, call: Call, query: Any, key: Any, value: Any, bias: Any) -> torch.Tensor:
        """Attention with as many heads of keys: within an encoder, of a decoder, or of a decoder to its encoder."""
        batch, heads, length, _ = query.shape
        slot = self.slots.get(call.layer)
        key, value = (key, value) if slot is None else slot.given
        past: Sequence[Any] = () if slot is None else slot.past
        crossing = slot is not None and not call.layer.isdecimal()
        bias = bias if call.biased else None
        padding = self.padding if call.window == EVERYTHING else None
        flat = [one.transpose(1, 2).reshape(batch, one.shape[2], -1) for one in (query, key, value)]
        about: Attributes = {"num_heads": heads, "scale": call.scale}
        if crossing:
            kind, inputs = f"{DOMAIN}::{CROSS_ATTENTION}", [flat[0], key, value, padding, bias, *past]
            presents = [key.shape, value.shape]
        else:
            kind, inputs = "com.microsoft::MultiHeadAttention", [*flat, None, padding, bias, *past]
            presents = [[*old.shape[:2], old.shape[2] + length, old.shape[3]] for old in past]
            about["unidirectional"] = int(call.window == CAUSAL)
        while inputs[-1] is None:
            inputs.pop()
        shapes = [[batch, length, heads * call.value_size], *map(list, presents)]
        found = ops.symbolic_multi_out(
            kind, inputs, about, dtypes=[query.dtype] * len(shapes), shapes=shapes, version=1
        )
        if slot is not None and slot.present is None:
            slot.present = (found[1], found[2])
        return found[0].reshape(batch, length, heads, call.value_size)

    def _operator(self, module: Any, query: Any, key: Any, value: Any, scale: float, sinks: Any) -> torch.Tensor:
        call = self.calls[module.compress_name]
        slot = self.slots[self.updated[id(key)]]
        rotated = self._rotated.get(id(query))
        rotation: Rotation | None = None
        tables: list[Any] = [None, None]
        if call.rotation is not None and isinstance(rotated, _Rotated):
            query, key, rotation = rotated.query, rotated.key, call.rotation
            tables = _tables(rotation)
        batch, heads, length, size = query.shape
        if value.shape[-1] < size:
            value = nn.functional.pad(value, (0, size - value.shape[-1]))
        flat = [one.transpose(1, 2).reshape(batch, length, -1) for one in (query, key, value)]
        inputs = [
            *flat,
            *slot.past,
            *(self.lengths or ()),
            *tables,
            *([None, None, sinks] if sinks is not None else []),
        ]
        while inputs[-1] is None:
            inputs.pop()
        present = [batch, key.shape[1], slot.past[0].shape[2] + length, size]
        about: Attributes = {
            "num_heads": heads,
            "kv_num_heads": key.shape[1],
            "local_window_size": -1 if call.window is None else call.window,
            "do_rotary": int(rotation is not None),
            "rotary_interleaved": int(rotation is not None and rotation.interleaved),
        }
        if call.scale != size**-0.5:
            about["scale"] = scale
        if call.softcap:
            about["softcap"] = call.softcap
        attended, *presents = ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            about,
            dtypes=[query.dtype] * 3,
            shapes=[[batch, length, heads * size], present, present],
            version=1,
        )
        if slot.present is None:
            slot.present = (presents[0], presents[1])
        apart = attended.reshape(batch, length, heads, size)
        return apart[..., : call.value_size] if call.value_size < size else apart


def lengths_of(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The node that gives the attention its lengths: of each row less one, [batch], and in all."""
    kinds, shapes = [torch.int32, torch.int32], [[mask.shape[0]], []]
    rows, total = ops.symbolic_multi_out(f"{DOMAIN}::{LENGTHS}", [mask], {}, dtypes=kinds, shapes=shapes, version=1)
    return rows, total


def _tables(rotation: Rotation) -> list[torch.Tensor]:
    """The node that gives the attention its cosines and sines, each [positions, pairs]."""
    shape, kinds = [rotation.positions, len(rotation.frequencies)], [torch.float32] * 2
    about: Attributes = {
        "frequencies": list(rotation.frequencies),
        "factor": rotation.factor,
        "positions": rotation.positions,
    }
    return list(
        ops.symbolic_multi_out(f"{DOMAIN}::{ROTARY}", [], about, dtypes=kinds, shapes=[shape, shape], version=1)
    )
