"""transformers' caches during a trace: filled with a graph's inputs, or recording what a model puts in.

A tensor of a cache is called `past_KIND_LAYER`, `past_KIND_LAYER_NUMBER` for states: `key`, `value`, `conv`,
`recurrent`, and `crosskey`, `crossvalue` for those that a decoder makes of what its encoder gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from compress.formats.onnx.decoder.tracing_patches import CacheSlot, TracingPatches

PAST = 5
"""Tokens of a trace's past."""
KINDS = ("conv", "recurrent")
"""States of convolutions and recurrences, as transformers calls them."""
CROSS = "cross"


def create_cache(model: Any) -> Any:
    """An empty cache; a window's layer is a full one, since the window is the attention's."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        if holds_keys(layer):
            for name in ("update", "get_mask_sizes", "get_seq_length"):
                setattr(layer, name, MethodType(getattr(DynamicLayer, name), layer))
    return cache


def create_encoder_decoder_cache(layers: int) -> Any:
    """An empty cache of a decoder behind an encoder."""
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.cache_utils import DynamicLayer

    caches = DynamicCache(), DynamicCache()
    for cache in caches:
        cache.layers = [DynamicLayer() for _ in range(layers)]
    return EncoderDecoderCache(*caches)


def iterate_layers(cache: Any) -> Iterator[tuple[str, int, Any]]:
    """Every layer of a cache with its side, which is nothing or `cross`, and its number."""
    own, cross = getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None)
    for index, layer in enumerate(() if cache is None else own.layers):
        yield "", index, layer
        if cross is not None:
            yield CROSS, index, cross.layers[index]


def layer_index(name: str) -> int:
    """The number of the layer that a tensor of a cache belongs to."""
    return int(name.split("_")[2])


def holds_keys(layer: Any) -> bool:
    from transformers.cache_utils import DynamicLayer

    return isinstance(layer, DynamicLayer)


def record_updates(cache: Any) -> list[CacheSlot]:
    """Have every layer of a cache note what it is given, in place."""
    slots = []
    for side, index, layer in iterate_layers(cache):
        if holds_keys(layer):
            slots.append(CacheSlot(f"{side}{index}"))
            layer.update = _noting(slots[-1], layer.update)
    return slots


def _noting(slot: CacheSlot, update: Any) -> Any:
    def noted(key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        slot.new = key, value
        found = update(key, value, *rest, **named)
        found[0].compress_turned = getattr(key, "compress_turned", None)
        for one in found:
            one.compress_slot = slot
        return found

    return noted


def _noting_state(patches: TracingPatches, get: Any) -> Any:
    def noted(*of: Any, **named: Any) -> Any:
        patches.state = get(*of, **named)
        return patches.state

    return noted


def fill_cache(cache: Any, past: Mapping[str, torch.Tensor], patches: TracingPatches, length: Any) -> None:
    """Put a graph's inputs into a new cache, in place; ``length`` of the past, where a mask says it."""
    if cache is not None:
        cache.get_recurrent_state = _noting_state(patches, cache.get_recurrent_state)
    for side, index, layer in iterate_layers(cache):
        _put_states(layer, index, past)
        if f"past_{side}key_{index}" in past:
            pair = past[f"past_{side}key_{index}"], past[f"past_{side}value_{index}"]
            _put_keys(layer, CacheSlot(f"{side}{index}", pair), patches.fused, length)


def _put_states(layer: Any, index: int, past: Mapping[str, torch.Tensor]) -> None:
    for kind, number in _states_of(layer):
        state = past.get(f"past_{kind}_{index}_{number}")
        if state is None:
            continue
        getattr(layer, f"{kind}_states")[number] = state.clone()
        getattr(layer, f"is_{kind}_states_initialized")[number] = True
        layer.has_previous_state[number] = True
        layer.device, layer.dtype = state.device, state.dtype
        if kind == "conv":
            layer.conv_kernel_size[number] = state.shape[-1]


def _states_of(layer: Any) -> list[tuple[str, int]]:
    return [(kind, number) for number in range(getattr(layer, "number_of_states", 0)) for kind in KINDS]


def _put_keys(layer: Any, slot: CacheSlot, fused: bool, length: Any) -> None:
    """Where a mask says the ``length``, blocks don't depend on each other's keys."""
    layer.keys, layer.values = pair = tuple(slot.past)
    layer.is_initialized = True
    layer.device, layer.dtype = pair[0].device, pair[0].dtype
    if not fused:
        layer.get_seq_length = lambda: layer.keys.shape[-2]
        return
    given = slot.name.startswith(CROSS) or length is not None

    def update(*new: Any, **named: Any) -> Any:
        # Relative positions want the length of all keys; nothing but their shape is read.
        return new[:2] if given else tuple(torch.cat(both, dim=-2) for both in zip(pair, new, strict=False))

    seen = pair[0].shape[-2] if length is None else length
    layer.slot, layer.update = slot, _noting(slot, update)
    layer.get_seq_length = lambda: seen
    layer.get_mask_sizes = lambda queries: (seen + queries, 0)


def sample_states(cache: Any, fused: bool) -> dict[str, torch.Tensor]:
    """What a cache of the rehearsal holds after some tokens, flat; values as wide as the operator wants them."""
    flat: dict[str, torch.Tensor] = {}
    for side, index, layer in iterate_layers(cache):
        if holds_keys(layer) and isinstance(layer.keys, torch.Tensor) and layer.keys.numel():
            keys, values = (one[:, :, :PAST].clone() for one in (layer.keys, layer.values))
            if fused and values.shape[-1] < keys.shape[-1]:
                values = nn.functional.pad(values, (0, keys.shape[-1] - values.shape[-1]))
            flat[f"past_{side}key_{index}"], flat[f"past_{side}value_{index}"] = keys, values
        for kind, number in _states_of(layer):
            if (state := getattr(layer, f"{kind}_states")[number]) is not None:
                flat[f"past_{kind}_{index}_{number}"] = state.clone()
    return flat


def present(name: str, cache: Any) -> torch.Tensor:
    """What takes the place of a tensor of the cache, by its name, after a forward pass."""
    kind, index, *number = name.removeprefix("past_").split("_")
    (layer,) = (
        one for side, at, one in iterate_layers(cache) if at == int(index) and kind.startswith(CROSS) == bool(side)
    )
    if kind in KINDS:
        state: torch.Tensor = getattr(layer, f"{kind}_states")[int(number[0])]
        return state
    slot: CacheSlot | None = getattr(layer, "slot", None)
    found: torch.Tensor = ((layer.keys, layer.values) if slot is None else slot.present)[kind.endswith("value")]
    return found
