"""transformers' caches during a trace: filled with a graph's inputs, or recording what a model puts in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from compress.formats.onnx.decoder.plug import Plug, Slot

PAST = 5
"""Tokens of a trace's past."""
KINDS = ("conv", "recurrent")
"""States of convolutions and recurrences, as transformers calls them."""
_CACHES = ("cache", "past_key_values", "cache_params", "state")
"""What models call the argument that holds their cache."""


def new_cache(model: Any) -> Any:
    """An empty cache; a window's layer is a full one, since the window is the attention's."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        if holds_keys(layer):
            for name in ("update", "get_mask_sizes", "get_seq_length"):
                setattr(layer, name, MethodType(getattr(DynamicLayer, name), layer))
    return cache


def holds_keys(layer: Any) -> bool:
    from transformers.cache_utils import DynamicLayer

    return isinstance(layer, DynamicLayer)


def noting(plug: Plug, index: int, update: Any) -> Any:
    def noted(self: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        found = update(key, value, *rest, **named)
        plug.note_update(index, key, *found)
        return found

    return noted


def put_states(layer: Any, index: int, past: Mapping[str, torch.Tensor]) -> None:
    for number in range(getattr(layer, "number_of_states", 0)):
        for kind in KINDS:
            state = past.get(f"past_{kind}_{index}_{number}")
            if state is None:
                continue
            getattr(layer, f"{kind}_states")[number] = state.clone()
            getattr(layer, f"is_{kind}_states_initialized")[number] = True
            layer.has_previous_state[number] = True
            layer.device, layer.dtype = state.device, state.dtype
            if kind == "conv":
                layer.conv_kernel_size[number] = state.shape[-1]


def put_keys(layer: Any, pair: tuple[torch.Tensor, torch.Tensor], plug: Plug, index: int, length: Any) -> None:
    """``length`` of the past as the mask has it, lest the blocks depend on each other's keys."""
    layer.keys, layer.values = pair
    layer.is_initialized = True
    layer.device, layer.dtype = pair[0].device, pair[0].dtype
    if not plug.fused:
        layer.get_seq_length = MethodType(lambda self: self.keys.shape[-2], layer)
        return
    plug.slots[index] = Slot(pair)
    layer.get_seq_length = MethodType(lambda self: length, layer)
    layer.get_mask_sizes = MethodType(lambda self, queries: (length + queries, 0), layer)
    layer.update = MethodType(noting(plug, index, lambda key, value, *rest, **named: (key, value)), layer)


def sample_states(cache: Any, plug: Plug) -> dict[str, torch.Tensor]:
    """What a cache of the rehearsal holds after some tokens, flat; values as wide as the operator wants them."""
    flat: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(cache.layers):
        if holds_keys(layer) and isinstance(layer.keys, torch.Tensor) and layer.keys.numel():
            keys, values = (one[:, :, :PAST].clone() for one in (layer.keys, layer.values))
            if plug.fused and values.shape[-1] < keys.shape[-1]:
                values = nn.functional.pad(values, (0, keys.shape[-1] - values.shape[-1]))
            flat[f"past_key_{index}"], flat[f"past_value_{index}"] = keys, values
        for number in range(getattr(layer, "number_of_states", 0)):
            for kind in KINDS:
                state = getattr(layer, f"{kind}_states")[number]
                if state is not None:
                    flat[f"past_{kind}_{index}_{number}"] = state.clone()
    return flat


def run_model(model: Any, cache: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
    total = start + ids.shape[1]
    positions = torch.arange(start, total).expand(len(ids), -1)
    return call_model(model, cache, ids, torch.ones(len(ids), total, dtype=torch.long), positions)


def call_model(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    taken = inspect.signature(type(model).forward).parameters
    word = next((name for name in _CACHES if name in taken), None)
    named = {} if word is None else {word: cache}
    if not any(map(holds_keys, cache.layers)):  # states alone: the mask is of the new tokens
        mask = mask[:, mask.shape[1] - ids.shape[1] :]
    if "position_ids" in taken:
        named["position_ids"] = positions
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=True, **named).logits
    return logits
