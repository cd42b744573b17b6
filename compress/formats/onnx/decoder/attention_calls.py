"""Attention calls and key-value caches of a model, and the decision which calls ONNX Runtime's operators compute.

Masks and rotary positions are recognized by their numbers, not by a model's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import nn

from compress.formats.onnx.decoder.tracing_patches import CacheSlot, TracingPatches

PAST = 5
"""Number of past tokens in a trace."""
KINDS = ("conv", "recurrent")
"""transformers' names of states of convolutions and recurrences."""
CROSS = "cross"


def create_cache(model: Any) -> Any:
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


def create_encoder_decoder_cache(layers: int) -> Any:
    """Return an empty cache of a decoder with an encoder."""
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.cache_utils import DynamicLayer

    caches = DynamicCache(), DynamicCache()
    for cache in caches:
        cache.layers = [DynamicLayer() for _ in range(layers)]
    return EncoderDecoderCache(*caches)


def iterate_layers(cache: Any) -> Iterator[tuple[str, int, Any]]:
    """Yield every layer of a cache with its side, "" or `cross`, and its index."""
    self_attention, cross = getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None)
    for index, layer in enumerate(() if cache is None else self_attention.layers):
        yield "", index, layer
        if cross is not None:
            yield CROSS, index, cross.layers[index]


def layer_index(name: str) -> int:
    """Return the index of the layer that a tensor of a cache belongs to."""
    return int(name.split("_")[2])


def holds_keys(layer: Any) -> bool:
    """Return whether a layer of a cache holds keys and values rather than states."""
    from transformers.cache_utils import DynamicLayer

    return isinstance(layer, DynamicLayer)


def record_updates(cache: Any) -> list[CacheSlot]:
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


def _recording_state(patches: TracingPatches, get: Any) -> Any:
    """Return ``get`` with recording of the state."""

    def recorded(*of: Any, **named: Any) -> Any:
        patches.state = get(*of, **named)
        return patches.state

    return recorded


def fill_cache(cache: Any, past: Mapping[str, torch.Tensor], patches: TracingPatches, length: Any) -> None:
    """Put a graph's inputs into a new cache, in place.

    Args:
        cache: The empty cache, or None.
        past: Tensors of the cache by name.
        patches: The patches, which read the state that the cache returns.
        length: Length of the past if the mask defines it, else None.
    """
    if cache is not None:
        cache.get_recurrent_state = _recording_state(patches, cache.get_recurrent_state)
    for side, index, layer in iterate_layers(cache):
        _put_states(layer, index, past)
        if f"past_{side}key_{index}" in past:
            pair = past[f"past_{side}key_{index}"], past[f"past_{side}value_{index}"]
            _put_keys(layer, CacheSlot(f"{side}{index}", pair), patches.fused, length)


def _put_states(layer: Any, index: int, past: Mapping[str, torch.Tensor]) -> None:
    """Put states of convolutions and recurrences into a layer, in place."""
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


def _states_of(layer: Any) -> list[tuple[str, int]]:
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


def sample_states(cache: Any, fused: bool) -> dict[str, torch.Tensor]:
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


def present(name: str, cache: Any) -> torch.Tensor:
    """Return the tensor that replaces a tensor of the cache after a forward pass."""
    kind, index, *number = name.removeprefix("past_").split("_")
    (layer,) = (
        candidate
        for side, at, candidate in iterate_layers(cache)
        if at == int(index) and kind.startswith(CROSS) == bool(side)
    )
    if kind in KINDS:
        state: torch.Tensor = getattr(layer, f"{kind}_states")[int(number[0])]
        return state
    slot: CacheSlot | None = getattr(layer, "slot", None)
    tensor: torch.Tensor = ((layer.keys, layer.values) if slot is None else slot.present)[kind.endswith("value")]
    return tensor


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
