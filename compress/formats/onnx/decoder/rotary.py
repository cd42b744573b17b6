"""Rotary positions that ONNX Runtime's attention applies itself: recognised by their numbers, not by a model's name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Rotation:
    """``frequencies``: the angle of each pair for one position; ``factor`` of cosine and sine.

    Pairs lie half of the rotated width apart, or side by side where ``interleaved``.
    """

    frequencies: tuple[float, ...]
    factor: float
    positions: int
    interleaved: bool = False

    def proven(self, query: Any, key: Any, cosine: Any, sine: Any, rotated: tuple[Any, Any]) -> Rotation | None:
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


def rotation_of(module: Any, cosine: torch.Tensor, layer_type: str | None) -> Rotation | None:
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


def _rotate(value: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, interleaved: bool) -> torch.Tensor:
    width = 2 * cosines.shape[-1]
    turned, rest = value[..., :width], value[..., width:]
    if interleaved:
        even, odd = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack([even * cosines - odd * sines, odd * cosines + even * sines], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        pairs = torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    return torch.cat([pairs, rest], dim=-1)
