"""Pooling of token embeddings into one text embedding, with the modes of sentence-transformers' `Pooling`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_LEAST_WEIGHT = 1e-9


def pool(hidden: torch.Tensor, mask: torch.Tensor, modes: Sequence[str]) -> torch.Tensor:
    """Pool token embeddings [B, L, H] under a mask [B, L] to [B, H x modes], in the order of the modes.

    Padding may be on either side. Raises `KeyError` for a mode outside `POOLING_MODES`.
    """
    return torch.cat([POOLING_MODES[mode](hidden, mask) for mode in modes], dim=-1)


def _at(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), positions]


def _weighted(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Weight tokens by 1, 2, 3, ... from the first that is no padding (Muennighoff 2022, SGPT, section 3.1)."""
    weights = mask.cumsum(dim=1) * mask
    return _sum(hidden, weights) / _count(hidden, weights)


def _sum(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (hidden * weights.unsqueeze(-1).to(hidden.dtype)).sum(dim=1)


def _count(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return weights.sum(dim=1, keepdim=True).to(hidden.dtype).clamp(min=_LEAST_WEIGHT)


POOLING_MODES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": lambda hidden, mask: _at(hidden, mask.argmax(dim=1)),
    "max": lambda hidden, mask: hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).max(dim=1).values,
    "mean": lambda hidden, mask: _sum(hidden, mask) / _count(hidden, mask),
    "mean_sqrt_len_tokens": lambda hidden, mask: _sum(hidden, mask) / _count(hidden, mask).sqrt(),
    "weightedmean": _weighted,
    "lasttoken": lambda hidden, mask: _at(hidden, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)),
}
