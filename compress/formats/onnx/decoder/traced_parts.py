"""What is traced of a model, and under which names: a decoder by itself, an encoder, or the decoder behind one.

Names and axes are those of transformers.js and optimum.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from compress.formats.onnx.decoder.caches import (
    CROSS,
    create_cache,
    create_encoder_decoder_cache,
    holds_keys,
    iterate_layers,
)
from compress.utils.errors import ModelError

BATCH = "batch_size"
IDS, MASK, HIDDEN, AUDIO = "input_ids", "attention_mask", "encoder_hidden_states", "input_features"
EMBEDS, PLACES = "inputs_embeds", "position_ids"
CACHED, ENCODER_MASK = "use_cache_branch", "encoder_attention_mask"
_READ, _WRITTEN = "encoder_sequence_length", "decoder_sequence_length"
_ROWS, _SEEN = 2, 7
"""Rows of a trace, and positions of its encoder: no two axes alike, and none of 1, which would be frozen."""
_CACHES = ("cache", "past_key_values", "cache_params", "state")
"""What models call the argument that holds their cache."""
Axes = Sequence[int | str]


@dataclass(frozen=True)
class TracedPart:
    """``inputs`` but for the cache: type and axes of each by its name; ``output`` and its ``axes`` but the last.

    ``decoder_only``: a decoder without an encoder, whose mask says what is past. ``cached``: whether keys are kept.
    ``tokens``: the input that has the new tokens, as ids or embedded. ``takes_positions``: their positions are an input, and
    the graph rotates queries and keys itself, with nothing in it that only ONNX Runtime knows but attention.
    """

    inputs: Mapping[str, tuple[ir.DataType, Axes]]
    output: str
    axes: Axes
    decoder_only: bool = False
    cached: bool = True
    tokens: str = IDS
    takes_positions: bool = False

    def root(self, model: Any) -> nn.Module:
        """The module that holds the blocks."""
        whole = self.decoder_only and self.tokens == IDS
        found: nn.Module = model if whole else model.get_decoder() if self.cached else model.get_encoder()
        return found

    def cache(self, model: Any, blocks: int) -> Any:
        """An empty cache, or None where nothing is kept."""
        if not self.cached:
            return None
        return create_cache(model) if self.decoder_only else create_encoder_decoder_cache(blocks)

    def axes_of(self, name: str, shape: Sequence[int], time: str) -> Axes:
        """Axes of a tensor of the cache with a sample's ``shape``, `past` or `present`."""
        kind = name.split("_")[1]
        if not kind.endswith(("key", "value")):
            return [BATCH, *shape[1:]]
        side = "encoder_" if kind.startswith(CROSS) else "decoder_"
        if self.decoder_only:
            side, time = "", "past" if time == "past" else "total"
        return [BATCH, shape[1], f"{time}_{side}sequence_length", shape[3]]

    def sample(self, new: int, past: int) -> dict[str, torch.Tensor]:
        """Inputs of a trace but for the cache: ``new`` tokens after ``past``."""
        sizes: dict[Any, int] = {_NEW[1]: new, _TOTAL[1]: past + new, BATCH: _ROWS, _WRITTEN: new, _READ: _SEEN}
        found = {}
        for name, (dtype, axes) in self.inputs.items():
            shape: list[Any] = [sizes.get(axis, axis) for axis in axes]
            found[name] = torch.randn(shape) if dtype == _FLOATS else torch.ones(shape, dtype=torch.int64)
        return found

    def padding(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """What is hidden from those who look at all of it, [batch, positions] int32."""
        mask = None if self.decoder_only else inputs.get(MASK if not self.cached else ENCODER_MASK)
        return None if mask is None else mask.to(torch.int32)

    def call(self, model: Any, cache: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The output."""
        if not self.cached:
            hidden: torch.Tensor = model.get_encoder()(**inputs).last_hidden_state
            return hidden
        taken = inspect.signature(type(model).forward).parameters
        word = next((name for name in _CACHES if name in taken), None)
        named: dict[str, Any] = {"use_cache": True} if word is None else {word: cache, "use_cache": True}
        if self.decoder_only:
            named |= _positions(cache, inputs, self.tokens, PLACES in taken)
        else:
            from transformers.modeling_outputs import BaseModelOutput

            named["encoder_outputs"] = BaseModelOutput(last_hidden_state=inputs[HIDDEN])
            named["decoder_input_ids"] = inputs[IDS]
            if "decoder_position_ids" in taken:
                seen = cache.get_seq_length()
                named["decoder_position_ids"] = torch.arange(seen, seen + inputs[IDS].shape[1])[None]
            if ENCODER_MASK in inputs:
                named["attention_mask"] = inputs[ENCODER_MASK]
        logits: torch.Tensor = model(**named).logits
        return logits


def _positions(cache: Any, inputs: Mapping[str, torch.Tensor], tokens: str, wanted: bool) -> dict[str, torch.Tensor]:
    new, mask = inputs[tokens], inputs[MASK]
    past = mask.shape[1] - new.shape[1]
    found = {}
    if wanted:
        found[PLACES] = inputs[PLACES] if PLACES in inputs else (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    if not any(
        holds_keys(layer) for _, _, layer in iterate_layers(cache)
    ):  # states alone: the mask is of the new tokens
        mask = mask[:, past:]
    return {tokens: new, MASK: mask, **found}


_INTEGERS, _FLOATS = ir.DataType.INT64, ir.DataType.FLOAT


_NEW, _TOTAL = [BATCH, "sequence_length"], [BATCH, "total_sequence_length"]


def decoder_only(model: Any) -> TracedPart:
    """A language model: prompt and single tokens."""
    return TracedPart({IDS: (_INTEGERS, _NEW), MASK: (_INTEGERS, _TOTAL)}, "logits", _NEW, decoder_only=True)


def decoder_with_positions(model: Any) -> TracedPart:
    """A language model that is told where its tokens stand."""
    inputs = {IDS: (_INTEGERS, _NEW), MASK: (_INTEGERS, _TOTAL), PLACES: (_INTEGERS, _NEW)}
    return TracedPart(inputs, "logits", _NEW, decoder_only=True, takes_positions=True)


def decoder_of_embeddings(model: Any) -> TracedPart:
    """A language model whose tokens come embedded, those of images among them."""
    inputs = {EMBEDS: (_FLOATS, [*_NEW, model.get_input_embeddings().embedding_dim]), MASK: (_INTEGERS, _TOTAL)}
    return TracedPart(inputs, "logits", _NEW, decoder_only=True, tokens=EMBEDS)


def encoder_of_pair(model: Any) -> TracedPart:
    """The encoder of a model of text or speech."""
    if _hears(model):
        config = model.config
        frames = 2 * config.max_source_positions  # its second convolution goes by steps of two
        audio = {AUDIO: (_FLOATS, [BATCH, config.num_mel_bins, frames])}
        return TracedPart(audio, "last_hidden_state", [BATCH, config.max_source_positions], cached=False)
    texts = {name: (_INTEGERS, [BATCH, _READ]) for name in (IDS, MASK)}
    return TracedPart(texts, "last_hidden_state", [BATCH, _READ], cached=False)


def decoder_of_pair(model: Any) -> TracedPart:
    """The decoder behind the encoder of a model, with its head."""
    masks: dict[str, tuple[ir.DataType, Axes]] = {} if _hears(model) else {ENCODER_MASK: (_INTEGERS, [BATCH, _READ])}
    hidden: Axes = [BATCH, _READ, _width(model.config)]
    inputs: dict[str, tuple[ir.DataType, Axes]] = {
        IDS: (_INTEGERS, [BATCH, _WRITTEN]),
        HIDDEN: (_FLOATS, hidden),
    }
    return TracedPart({**masks, **inputs}, "logits", [BATCH, _WRITTEN])


def _hears(model: Any) -> bool:
    """Raises `ModelError` for a model whose encoder takes neither text nor features of speech in one window."""
    taken = getattr(model, "main_input_name", IDS)
    if taken == AUDIO and hasattr(model.config, "max_source_positions") and hasattr(model.config, "num_mel_bins"):
        return True
    if taken == IDS and _width(model.config):
        return False
    raise ModelError(
        f"{type(model).__name__} takes {taken}.",
        expected=f"an encoder of {IDS} or, in windows of one length, {AUDIO}",
    )


def _width(config: Any) -> int:
    """Of what an encoder gives, which may have a config of its own; 0 where nothing says it."""
    return int(getattr(config, "d_model", 0) or getattr(getattr(config, "encoder", None), "hidden_size", 0))
