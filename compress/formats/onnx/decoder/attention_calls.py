"""What the attention calls of a model are, and which of them ONNX Runtime's operators compute.

Masks and rotary positions are recognised by their numbers, not by a model's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

CAUSAL, EVERYTHING = -1, 0
"""Masks that are no window of so many tokens."""
BIAS = "position_bias"
_EXTRA = (BIAS, "indices", "block_indices")
"""Arguments of attention functions that change what is computed."""
_HEAD_UNIT = 8
"""ONNX Runtime's grouped attention takes heads of a multiple of this."""
_ROTARY_UNIT, _PAIRS_UNIT = 16, 8
"""It rotates heads of a multiple of 16, by 8 pairs each."""
_TOLERANCE = 1e-4
_FAR = (300_000, 997, 40, 3)
"""Positions at which a mask is asked what it lets through."""


@dataclass(frozen=True)
class Rotation:
    """Rotary positions that the operator applies itself. ``frequencies``: the angle of each pair for one position;
    ``factor`` of cosine and sine.

    Pairs lie half of the rotated width apart, or side by side where ``interleaved``.
    """

    frequencies: tuple[float, ...]
    factor: float
    positions: int
    interleaved: bool = False

    def proven(self, query: Any, key: Any, rotated: tuple[Any, Any]) -> Rotation | None:
        """This rotation as it gives ``rotated`` of ``query`` and ``key`` [batch, heads, length, size], or None."""
        half = len(self.frequencies)
        if query.ndim != 4 or 2 * half > query.shape[-1]:
            return None
        angles = torch.arange(query.shape[2], dtype=torch.float32)[:, None] * torch.tensor(self.frequencies)
        cosines, sines = angles.cos() * self.factor, angles.sin() * self.factor
        for interleaved in (False, True):
            pairs = [
                (_rotate(value, cosines, sines, interleaved), found)
                for value, found in zip((query, key), rotated, strict=True)
            ]
            if all(torch.allclose(ours, found, atol=_TOLERANCE) for ours, found in pairs):
                return replace(self, interleaved=interleaved)
        return None


@dataclass(frozen=True)
class AttentionCall:
    """What an attention call of the model is. ``layer`` of the cache, if any, as `Slot.name` has it.

    ``window``: how many tokens it looks back, or `CAUSAL` or `EVERYTHING`, or None for none of them. ``biased``: by
    relative positions. ``problem``: why ONNX Runtime's operator does not compute it; empty where it does.
    """

    module: str
    layer: str
    heads: int
    key_value_heads: int
    size: int
    value_size: int
    scale: float
    softcap: float
    window: int | None
    rotation: Rotation | None
    biased: bool = False
    problem: str = ""


def describe_call(
    call: AttentionCall, grouped: bool, lost: bool, sinks: bool, others: Mapping[str, Any]
) -> AttentionCall:
    """``call`` with what `GroupQueryAttention`, where ``grouped``, or `MultiHeadAttention` makes of it.

    ``lost``: its keys or values aren't those that the cache gave. ``others``: its arguments by name.
    """
    bias, extra = others.get(BIAS), [name for name in _EXTRA if others.get(name) is not None]
    taken = extra if grouped else [name for name in extra if name != BIAS]
    wanted = CAUSAL if call.layer.isdecimal() else EVERYTHING
    problems = {
        "its keys are changed after the cache": lost,
        "its mask is neither causal nor a window": grouped and call.window in (None, EVERYTHING),
        "its mask is neither causal nor everything, as its place wants it": not grouped and call.window != wanted,
        f"it takes {', '.join(taken)}": bool(taken),
        f"its heads of {call.size} are no multiple of {_HEAD_UNIT}": grouped and bool(call.size % _HEAD_UNIT),
        "its values are wider than its keys": grouped and call.value_size > call.size,
        "its heads share keys": not grouped and call.heads != call.key_value_heads,
        "it caps scores or has sinks": not grouped and (bool(call.softcap) or sinks),
    }
    turned = call.rotation
    if turned is not None and (call.size % _ROTARY_UNIT or len(turned.frequencies) % _PAIRS_UNIT):
        turned = None
    problem = next((text for text, so in problems.items() if so), "")
    return replace(call, rotation=turned, biased=bias is not None and bool(bias.any()), problem=problem)


def classify_mask(mask_function: Any) -> int | None:
    """What a mask is, by its own function, far from any beginning."""
    counts = []
    for query in _FAR:
        keys, zero = torch.arange(query + 4), torch.zeros((), dtype=torch.long)
        try:
            seen = mask_function(zero, zero, torch.tensor(query), keys).expand(keys.shape).nonzero().flatten()
        except (IndexError, RuntimeError, TypeError):
            return None
        if len(seen) == 0 or int(seen[-1]) - int(seen[0]) + 1 != len(seen):
            return None
        if int(seen[-1]) != query and len(seen) != query + 4:
            return None
        counts.append(len(seen) if int(seen[-1]) == query else EVERYTHING)
    size = counts[0]
    if any(count != min(query + 1, size) for query, count in zip(_FAR, counts, strict=True)):
        return None
    return CAUSAL if size == _FAR[0] + 1 else size


def read_rotation(module: Any, cosine: torch.Tensor, layer_type: str | None) -> Rotation | None:
    """The rotation whose cosines a module of rotary positions gave for positions 0, 1, ..., or None."""
    prefix = f"{layer_type}_" if layer_type else ""
    frequencies = getattr(module, f"{prefix}inv_freq", None)
    kinds = getattr(module, "rope_type", "default")
    kind = kinds.get(layer_type) if isinstance(kinds, dict) else kinds
    if frequencies is None or kind in ("dynamic", "longrope") or cosine.ndim != 3:
        return None
    factor = float(getattr(module, f"{prefix}attention_scaling", 1.0))
    positions = getattr(module, "max_seq_len_cached", None) or getattr(module.config, "max_position_embeddings", None)
    if not positions:
        return None
    return Rotation(tuple(frequencies.float().tolist()), factor, int(positions))


def _rotate(value: Any, cosines: torch.Tensor, sines: torch.Tensor, interleaved: bool) -> torch.Tensor:
    width, axis = 2 * cosines.shape[-1], -1 if interleaved else -2
    first, second = value[..., :width].unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(axis)
    turned = torch.stack([first * cosines - second * sines, second * cosines + first * sines], dim=axis)
    return torch.cat([turned.flatten(-2), value[..., width:]], dim=-1)
