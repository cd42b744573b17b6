"""How many heads, neurons and experts each block of a decoder keeps, and why a cut cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from compress.models.experts import SeparateExperts, is_fused
from compress.models.structure import Attention, TransformerBlock, blocks
from compress.models.transformer_pruning import (
    check_heads_prunable,
    head_config_fields,
    keep_heads,
    keep_neurons,
    updated_config,
)
from compress.stages.prune_decoder.settings import DecoderPruning
from compress.utils.errors import StageError

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k")
_GROUPS = ("n_group",)


@dataclass(frozen=True)
class Sizes:
    """Parts that every block keeps: ``places`` (groups of heads, or heads), ``neurons`` and ``experts``; None: all."""

    places: int | None
    neurons: int | None
    experts: int | None
    found: tuple[int, int, int]
    """How many there are now."""

    @classmethod
    def of(cls, model: PreTrainedModel, settings: DecoderPruning) -> Sizes:
        """Return the sizes for a model without weights. Raises `StageError` for parts that cannot be removed."""
        places = neurons = experts = None
        original_counts = [0, 0, 0]
        if settings.heads:
            check_heads_prunable(model)
            attention = [block.require_attention() for block in blocks(model)]
            original_counts[0], size = _alike({(layer.prunable_units, layer.head_size) for layer in attention}, "heads")
            possible = [left for left in range(1, original_counts[0]) if _can_say(model.config, attention[0], left)]
            places = _left(original_counts[0], settings.heads, settings.multiple, size, "heads", possible)
        if settings.feed_forward:
            original_counts[1], _ = _alike(
                {(one.neurons, 1) for one in map(TransformerBlock.require_feed_forward, blocks(model))}, "feed_forward"
            )
            neurons = _left(original_counts[1], settings.feed_forward, settings.multiple, 1, "feed_forward")
        if settings.experts:
            original_counts[2] = int(getattr(model.config, _count_field(model)))
            experts = _left(original_counts[2], settings.experts, 1, 1, "experts")
            config = model.config
            chosen = next((int(getattr(config, name)) for name in _CHOSEN if getattr(config, name, None)), 1)
            if chosen > experts:
                raise StageError(
                    f"Each token passes {chosen} experts, and {experts} would be left.",
                    where="prune_decoder.experts",
                    expected=f"at least {chosen}, the config's experts for a token",
                    hint="remove a smaller share",
                )
            if any((getattr(config, name, None) or 1) > 1 for name in _GROUPS):
                raise StageError(
                    f"The router of a {config.model_type!r} model chooses among groups of experts, which would "
                    "differ in size.",
                    where="prune_decoder.experts",
                    hint="leave experts out",
                )
        return cls(places, neurons, experts, (original_counts[0], original_counts[1], original_counts[2]))

    def cut(self, module: Any) -> None:
        """Cut a model without weights, and its config, in place: any parts, since one is as large as another.

        Of experts the config alone says how many there are.
        """
        count = len(blocks(module)) if self.places or self.neurons else 0
        if self.places:
            keep_heads(module, [range(self.places)] * count)
        if self.neurons:
            keep_neurons(module, [torch.arange(self.neurons)] * count)
        if self.experts:
            setattr(module.config, _count_field(module), self.experts)

    def __str__(self) -> str:
        names = ("heads, or groups of them,", "neurons", "experts")
        sizes = zip((self.places, self.neurons, self.experts), self.found, names, strict=True)
        return ", ".join(f"{left} of {count} {name} kept in each block" for left, count, name in sizes if left)


def _alike(sizes: set[tuple[int, int]], name: str) -> tuple[int, int]:
    """Return the size shared by all blocks. Raises `StageError` if they differ."""
    if len(sizes) > 1:
        raise StageError(
            f"The blocks differ in what {name} would cut: {', '.join(str(count) for count, _ in sorted(sizes))}.",
            where=f"prune_decoder.{name}",
            expected="blocks that are all alike",
            hint=f"leave {name} out, or cut layers instead",
        )
    return next(iter(sizes))


def _can_say(config: PretrainedConfig, attention: Attention, places: int) -> bool:
    """Return whether a config can describe so many heads: Llama's hidden size must be a multiple of them."""
    fields = head_config_fields(config, attention, [places])
    return not fields or updated_config(config, fields) is not None


def _left(count: int, share: float, multiple: int, width: int, name: str, possible: Sequence[int] | None = None) -> int:
    """Return how many of ``count`` parts of ``width`` features remain, with a multiple of ``multiple`` features.

    The nearest such number below ``count``, of those ``possible``. Raises `StageError` where there is none.
    """
    remaining = count * (1 - share)
    if round(remaining) < 1:
        raise StageError(
            f"Removing {share:.0%} of {count} {name} leaves none.",
            where=f"prune_decoder.{name}",
            hint="remove a smaller share",
        )
    even = [left for left in possible or range(1, count) if left * width % multiple == 0]
    if not even:
        raise StageError(
            f"No cut of {count} {name} leaves a multiple of {multiple} features.",
            where=f"prune_decoder.{name}",
            expected=f"more than {multiple} features to begin with",
            hint="lower `multiple`, or leave the field out",
        )
    return min(even, key=lambda left: (abs(left - remaining), -left))


def _count_field(model: PreTrainedModel) -> str:
    """Return the config's field for the number of experts. Raises `StageError` for a model without one."""
    config = model.config
    field = next((config.attribute_map.get(name, name) for name in _COUNTS if getattr(config, name, None)), None)
    mixtures = [part for part in model.modules() if isinstance(part, SeparateExperts) or is_fused(part)]
    if field is None or not mixtures:
        raise StageError(
            f"A {config.model_type!r} model has no experts that are known.",
            where="prune_decoder.experts",
            expected="a mixture of experts whose config says how many there are",
            hint="leave experts out",
        )
    return str(field)
