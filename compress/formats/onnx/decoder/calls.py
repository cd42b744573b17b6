"""What the attention calls of a model are, and which of them ONNX Runtime's operators compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress.formats.onnx.decoder.rotary import Rotation

CAUSAL, EVERYTHING = -1, 0
"""Masks that are no window of so many tokens."""
BIAS = "position_bias"
EXTRA = (BIAS, "indices", "block_indices")
"""Arguments of attention functions that change what is computed."""
_HEAD_UNIT = 8
"""ONNX Runtime's grouped attention takes heads of a multiple of this."""
_FAR = (300_000, 997, 40, 3)
"""Positions at which a mask is asked what it lets through."""


@dataclass(frozen=True)
class Call:
    """What an attention call of the model is. ``layer`` of the cache, if any, as `Plug.slots` has it.

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
    biased: bool
    problem: str = ""

    def against_groups(self, extra: Sequence[str]) -> str:
        """Why `GroupQueryAttention` does not compute it; ``extra`` are arguments of `EXTRA` that it takes."""
        problems = {
            "its mask is neither causal nor a window": self.window in (None, EVERYTHING),
            f"it takes {', '.join(extra)}": bool(extra),
            f"its heads of {self.size} are no multiple of {_HEAD_UNIT}": bool(self.size % _HEAD_UNIT),
            "its values are wider than its keys": self.value_size > self.size,
        }
        return _first(problems)

    def against_many(self, extra: Sequence[str], sinks: bool) -> str:
        """Why `MultiHeadAttention` does not compute it."""
        others = [name for name in extra if name != BIAS]
        wanted = CAUSAL if self.layer.isdecimal() else EVERYTHING
        problems = {
            "its mask is neither causal nor everything, as its place wants it": self.window != wanted,
            f"it takes {', '.join(others)}": bool(others),
            "its heads share keys": self.heads != self.key_value_heads,
            "it caps scores or has sinks": bool(self.softcap) or sinks,
        }
        return _first(problems)


def mask_of(mask_function: Any) -> int | None:
    """What a mask is, by its own function, far from any beginning."""
    counts = {}
    for query in _FAR:
        keys, zero = torch.arange(query + 4), torch.zeros((), dtype=torch.long)
        try:
            seen = mask_function(zero, zero, torch.tensor(query), keys).expand(keys.shape).nonzero().flatten()
        except (IndexError, RuntimeError, TypeError):
            return None
        if len(seen) == 0 or int(seen[-1]) - int(seen[0]) + 1 != len(seen):
            return None
        counts[query] = len(seen) if int(seen[-1]) == query else EVERYTHING if len(seen) == query + 4 else None
    size = counts[_FAR[0]]
    if None in counts.values() or size is None:
        return None
    if EVERYTHING in counts.values():
        return EVERYTHING if set(counts.values()) == {EVERYTHING} else None
    if any(count != min(query + 1, size) for query, count in counts.items()):
        return None
    return CAUSAL if size == _FAR[0] + 1 else size


def _first(problems: Mapping[str, bool]) -> str:
    return next((problem for problem, so in problems.items() if so), "")
