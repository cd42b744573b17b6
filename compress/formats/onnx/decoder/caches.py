"""transformers' caches during a trace: filled with a graph's inputs, or recording what a model writes.

A tensor of a cache is named `past_KIND_LAYER`, and `past_KIND_LAYER_NUMBER` for states. Kinds are `key`, `value`,
`conv`, `recurrent`, and `crosskey` and `crossvalue` for those that a decoder computes from its encoder's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.formats.onnx.decoder.tracing_patches import CacheSlot, TracingPatches

if TYPE_CHECKING:
    from transformers import Cache, EncoderDecoderCache, PreTrainedModel


PAST = 5
"""Number of past tokens in a trace."""
KINDS = ("conv", "recurrent")
"""transformers' names of states of convolutions and recurrences."""
CROSS = "cross"


def create_cache(model: PreTrainedModel) -> Cache:
    """Return an empty cache whose layers all keep every token, because the attention applies sliding windows."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        if holds_keys(layer):
            # A layer with a sliding window would drop tokens that the operator still needs.
            for name in ("update", "get_mask_sizes", "get_seq_length"):
                setattr(layer, name, MethodType(getattr(DynamicLayer, name), layer))
    return cache


def create_encoder_decoder_cache(layers: int) -> EncoderDecoderCache:
    """Return an empty cache of a decoder with an encoder."""
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.cache_utils import DynamicLayer

    caches = DynamicCache(), DynamicCache()
    for cache in caches:
        cache.layers = [DynamicLayer() for _ in range(layers)]
    return EncoderDecoderCache(*caches)


def iterate_layers(cache: Cache) -> Iterator[tuple[str, int, Any]]:
    """Yield every layer of a cache with its side, "" or `cross`, and its index."""
    self_attention, cross = getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None)
    for index, layer in enumerate(() if cache is None else self_attention.layers):
        yield "", index, layer
        if cross is not None:
            yield CROSS, index, cross.layers[index]


def layer_index(name: str) -> int:
    """Return the index of the layer that a tensor of a cache belongs to."""
    return int(name.split("_")[2])


def holds_keys(layer: object) -> bool:
    """Return whether a layer of a cache holds keys and values rather than states."""
    from transformers.cache_utils import DynamicLayer

    return isinstance(layer, DynamicLayer)


def record_updates(cache: object) -> list[CacheSlot]:
    """Make every layer of a cache record its updates, in place; return the records."""
    slots = []
    for side, index, layer in iterate_layers(cache):
        if holds_keys(layer):
            slots.append(CacheSlot(f"{side}{index}"))
            layer.update = _recording(slots[-1], layer.update)
    return slots


def _recording(slot: CacheSlot, update: Any) -> Any:
    """Return ``update`` with recording: returned tensors carry the slot, so that attention recognizes them."""

    def recorded(key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        slot.new = key, value
        updated = update(key, value, *rest, **named)
        # Attributes of tensors are lost by the update, so they are copied.
        updated[0].compress_rotary = getattr(key, "compress_rotary", None)
        for tensor in updated:
            tensor.compress_slot = slot
        return updated

    return recorded


def fill_cache(cache: Cache, past: Mapping[str, torch.Tensor], patches: TracingPatches, length: Any) -> None:
    """Put a graph's inputs into a new cache, in place.

    Args:
        cache: The empty cache, or None.
        past: Tensors of the cache by name.
        patches: The patches, which read the state that the cache returns.
        length: Length of the past if the mask defines it, else None.
    """
    if cache is not None:
        get_state = cache.get_recurrent_state

        def recorded_state(*of: Any, **named: Any) -> Any:
            patches.state = get_state(*of, **named)
            return patches.state

        cache.get_recurrent_state = recorded_state
    for side, index, layer in iterate_layers(cache):
        # Put states of convolutions and recurrences into a layer, in place.
        for kind, number in _states_of(layer):
            state = past.get(f"past_{kind}_{index}_{number}")
            if state is None:
                continue
            getattr(layer, f"{kind}_states")[number] = state.clone()
            getattr(layer, f"is_{kind}_states_initialized")[number] = True
            layer.has_previous_state[number] = True
            layer.device, layer.dtype = state.device, state.dtype
            if kind == "conv":
                # transformers derives the size of the convolution's state from the first update, which is missing here.
                layer.conv_kernel_size[number] = state.shape[-1]
        if f"past_{side}key_{index}" in past:
            pair = past[f"past_{side}key_{index}"], past[f"past_{side}value_{index}"]
            _put_keys(layer, CacheSlot(f"{side}{index}", pair), patches.fused, length)


def _states_of(layer: object) -> list[tuple[str, int]]:
    """Return kind and number of every state of a layer."""
    return [(kind, number) for number in range(getattr(layer, "number_of_states", 0)) for kind in KINDS]


def _put_keys(layer: Any, slot: CacheSlot, fused: bool, length: Any) -> None:
    """Put keys and values into a layer, in place.

    Where a mask defines the ``length``, blocks do not depend on each other's keys.
    """
    layer.keys, layer.values = pair = tuple(slot.past)
    layer.is_initialized = True
    layer.device, layer.dtype = pair[0].device, pair[0].dtype
    if not fused:
        layer.get_seq_length = lambda: layer.keys.shape[-2]
        return
    unchanged = slot.name.startswith(CROSS) or length is not None

    # The attention operator appends new keys itself, so the cache returns the new ones only.
    def update(*new: Any, **named: Any) -> Any:
        # Relative positions want the length of all keys; nothing but their shape is read.
        return new[:2] if unchanged else tuple(torch.cat(both, dim=-2) for both in zip(pair, new, strict=False))

    past_length = pair[0].shape[-2] if length is None else length
    layer.slot, layer.update = slot, _recording(slot, update)
    layer.get_seq_length = lambda: past_length
    # Positions and masks follow from the length of the past.
    layer.get_mask_sizes = lambda queries: (past_length + queries, 0)


def sample_states(cache: object, fused: bool) -> dict[str, torch.Tensor]:
    """Return the tensors of a dry run's cache by name, with values as wide as the operator requires."""
    flat: dict[str, torch.Tensor] = {}
    for side, index, layer in iterate_layers(cache):
        if holds_keys(layer) and isinstance(layer.keys, torch.Tensor) and layer.keys.numel():
            keys, values = (tensor[:, :, :PAST].clone() for tensor in (layer.keys, layer.values))
            # The operator's values are as wide as its keys.
            if fused and values.shape[-1] < keys.shape[-1]:
                values = nn.functional.pad(values, (0, keys.shape[-1] - values.shape[-1]))
            flat[f"past_{side}key_{index}"], flat[f"past_{side}value_{index}"] = keys, values
        for kind, number in _states_of(layer):
            if (state := getattr(layer, f"{kind}_states")[number]) is not None:
                flat[f"past_{kind}_{index}_{number}"] = state.clone()
    return flat


def present(name: str, cache: object) -> torch.Tensor:
    """Return the tensor that replaces a tensor of the cache after a forward pass."""
    kind, index, *number = name.removeprefix("past_").split("_")
    key = (CROSS if kind.startswith(CROSS) else ""), int(index)
    (layer,) = (layer for side, at, layer in iterate_layers(cache) if (side, at) == key)
    if kind in KINDS:
        state: torch.Tensor = getattr(layer, f"{kind}_states")[int(number[0])]
        return state
    slot: CacheSlot | None = getattr(layer, "slot", None)
    tensor: torch.Tensor = ((layer.keys, layer.values) if slot is None else slot.present)[kind.endswith("value")]
    return tensor
