"""Description of a model's attention calls, and the decision which of them ONNX Runtime's operators compute.

Masks and rotary positions are recognized by their numbers, not by a model's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

CAUSAL, EVERYTHING = -1, 0
"""Values of ``window`` for masks that are no sliding window."""
BIAS = "position_bias"
_EXTRA = (BIAS, "indices", "block_indices")
"""Arguments of attention functions that change the result."""
_HEAD_UNIT = 8
"""ONNX Runtime's grouped attention requires head sizes that are multiples of this."""
_ROTARY_UNIT, _PAIRS_UNIT = 16, 8
"""Rotation in the operator requires head sizes that are multiples of 16 and multiples of 8 pairs."""
_TOLERANCE = 1e-4
_FAR = (300_000, 997, 40, 3)
"""Positions at which a mask is evaluated."""


@dataclass(frozen=True)
class Rotation:
    """Rotary positions that the operator can apply.

    ``frequencies`` holds the angle of each pair for one position; ``factor`` multiplies cosine and sine. The elements
    of a pair are half of the rotated width apart, or adjacent if ``interleaved``.
    """

    frequencies: tuple[float, ...]
    factor: float
    positions: int
    interleaved: bool = False

    def proven(
        self, query: torch.Tensor, key: torch.Tensor, rotated: tuple[torch.Tensor, torch.Tensor]
    ) -> Rotation | None:
        """Return this rotation with the layout that turns query and key into ``rotated``, or None.

        All tensors are [batch, heads, length, size].
        """
        half = len(self.frequencies)
        if query.ndim != 4 or 2 * half > query.shape[-1]:
            return None
        angles = torch.arange(query.shape[2], dtype=torch.float32)[:, None] * torch.tensor(self.frequencies)
        cosines, sines = angles.cos() * self.factor, angles.sin() * self.factor
        # Models pair elements of either layout; the one that reproduces the model's result is used.
        for interleaved in (False, True):
            pairs = [
                (_rotate(value, cosines, sines, interleaved), expected)
                for value, expected in zip((query, key), rotated, strict=True)
            ]
            if all(torch.allclose(ours, expected, atol=_TOLERANCE) for ours, expected in pairs):
                return replace(self, interleaved=interleaved)
        return None


@dataclass(frozen=True)
class AttentionCall:
    """Properties of one attention call. ``layer`` is the layer of the cache, if any, as in `CacheSlot.name`.

    ``window`` is the number of tokens that it looks back, or `CAUSAL` or `EVERYTHING`, or None for another mask.
    ``biased``: by relative positions. ``problem`` is the reason why ONNX Runtime's operator does not compute it, or "".
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
    """Return ``call`` with the reason why an operator does not compute it, if there is one.

    Args:
        call: The call without a problem.
        grouped: Whether the operator is `GroupQueryAttention`, else `MultiHeadAttention`.
        lost: Whether keys or values are not those that the cache returned.
        sinks: Whether the call has attention sinks.
        others: Further arguments of the call by name.
    """
    bias, extra = others.get(BIAS), [name for name in _EXTRA if others.get(name) is not None]
    unsupported = extra if grouped else [name for name in extra if name != BIAS]
    # Attention within the decoder is causal, to the encoder it sees everything.
    required_window = CAUSAL if call.layer.isdecimal() else EVERYTHING
    problems = {
        "its keys or values are changed after the cache": lost,
        "its mask is neither causal nor a window": grouped and call.window in (None, EVERYTHING),
        "its mask is neither causal nor complete, as this layer requires": not grouped
        and call.window != required_window,
        f"it takes {', '.join(unsupported)}": bool(unsupported),
        f"its heads of {call.size} are no multiple of {_HEAD_UNIT}": grouped and bool(call.size % _HEAD_UNIT),
        "its values are wider than its keys": grouped and call.value_size > call.size,
        "its heads share keys": not grouped and call.heads != call.key_value_heads,
        "it caps scores or has sinks": not grouped and (bool(call.softcap) or sinks),
    }
    turned = call.rotation
    # The model then rotates queries and keys itself.
    if turned is not None and (call.size % _ROTARY_UNIT or len(turned.frequencies) % _PAIRS_UNIT):
        turned = None
    problem = next((text for text, so in problems.items() if so), "")
    return replace(call, rotation=turned, biased=bias is not None and bool(bias.any()), problem=problem)


def classify_mask(mask_function: Any) -> int | None:
    """Return the kind of a mask from its function, evaluated far from the beginning."""
    counts = []
    for query in _FAR:
        keys, zero = torch.arange(query + 4), torch.zeros((), dtype=torch.long)
        try:
            visible = mask_function(zero, zero, torch.tensor(query), keys).expand(keys.shape).nonzero().flatten()
        except (IndexError, RuntimeError, TypeError):
            return None
        # The visible keys must be contiguous and end at the query or at the last key.
        if len(visible) == 0 or int(visible[-1]) - int(visible[0]) + 1 != len(visible):
            return None
        if int(visible[-1]) != query and len(visible) != query + 4:
            return None
        counts.append(len(visible) if int(visible[-1]) == query else EVERYTHING)
    # A window has one size at all positions beyond it.
    size = counts[0]
    if any(count != min(query + 1, size) for query, count in zip(_FAR, counts, strict=True)):
        return None
    return CAUSAL if size == _FAR[0] + 1 else size


def read_rotation(module: Any, cosine: torch.Tensor, layer_type: str | None) -> Rotation | None:
    """Return the rotation of a module that computed ``cosine`` for positions 0, 1, ..., or None if unsupported."""
    prefix = f"{layer_type}_" if layer_type else ""
    frequencies = getattr(module, f"{prefix}inv_freq", None)
    kinds = getattr(module, "rope_type", "default")
    kind = kinds.get(layer_type) if isinstance(kinds, dict) else kinds
    # Dynamic scaling changes the frequencies with the length.
    if frequencies is None or kind in ("dynamic", "longrope") or cosine.ndim != 3:
        return None
    factor = float(getattr(module, f"{prefix}attention_scaling", 1.0))
    positions = getattr(module, "max_seq_len_cached", None) or getattr(module.config, "max_position_embeddings", None)
    if not positions:
        return None
    return Rotation(tuple(frequencies.float().tolist()), factor, int(positions))


def _rotate(value: Any, cosines: torch.Tensor, sines: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the pairs of ``value``."""
    width, axis = 2 * cosines.shape[-1], -1 if interleaved else -2
    first, second = value[..., :width].unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(axis)
    turned = torch.stack([first * cosines - second * sines, second * cosines + first * sines], dim=axis)
    return torch.cat([turned.flatten(-2), value[..., width:]], dim=-1)
