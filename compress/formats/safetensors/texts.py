"""Text from text by transformers' own `generate`, with the settings of the folder's generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.generation.decoder import PAST, PRESENT
from compress.formats.generation.image_text import ImageAnswers, read_rules, until_ended
from compress.formats.generation.seq2seq import IDS, MASK, SEQUENCES, TEXTS
from compress.formats.generation.speech_recognition import FEATURES, HIDDEN, Transcriber
from compress.formats.runtime import Batch, TensorType, check_inputs
from compress.formats.safetensors.runtime import FAILURES, TorchSession, as_array, as_tensor, cache_of
from compress.utils.errors import ModelError, StageError, first_line

_IDS, _AUDIO, _CACHED, _LOGITS = "input_ids", "encoder_hidden_states", "use_cache_branch", "logits"
_OF = (".decoder", ".encoder")
"""Keys and values of the tokens, and of the audio."""


class GeneratedText:
    """Session that writes text with the module of ``whole``, like `seq2seq.TextWriter` with two graphs."""

    inputs = (IDS, MASK)
    input_types: Mapping[str, TensorType] = dict.fromkeys(inputs, TensorType("int64", (None, None)))
    output_types: Mapping[str, TensorType] = {
        SEQUENCES: TensorType("int64", (None, None)),
        TEXTS: TensorType("str", (None,)),
    }

    def __init__(self, whole: TorchSession, tokenizer: Any) -> None:
        self._whole, self._tokenizer = whole, tokenizer
        self.provider, self.settings = whole.provider, whole.settings

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return `texts` [n] and `sequences` [n, longest]; raise `StageError` if transformers fails."""
        check_inputs(self.inputs, batch, self._whole.where)
        sequences = _generated(self._whole, {name: batch[name] for name in self.inputs})
        texts = self._tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return {SEQUENCES: as_array(sequences[:, 1:]), TEXTS: np.array(texts)}


def answers_to_images(whole: TorchSession, processor: Any, folder: Path) -> ImageAnswers:
    """Return a session that answers images with the module of ``whole``; raise `ModelError` if it cannot.

    Sampling in the generation config is turned off, so that answers are the same every time.
    """
    rules = read_rules(folder)

    def write(batch: dict[str, np.ndarray]) -> list[np.ndarray]:
        prompt = batch[IDS].shape[1]
        found = _generated(whole, batch, max_new_tokens=rules.room(prompt), do_sample=False)
        return until_ended(as_array(found[:, prompt:]), rules.ends)

    return ImageAnswers(write, folder, processor.tokenizer, whole)


def _generated(whole: TorchSession, batch: Batch, **options: Any) -> Any:
    import torch

    try:
        with torch.inference_mode():
            return whole.module.generate(**{name: as_tensor(np.asarray(batch[name])) for name in batch}, **options)
    except FAILURES as error:
        raise StageError(f"The model failed on a batch: {first_line(error)}", where=whole.where) from error


def open_transcriber(session: TorchSession, folder: Path) -> Transcriber:
    """Return a transcriber for the module of ``session``; raise `ModelError` if it has no encoder and decoder."""
    config = session.module.config
    if not config.is_encoder_decoder or not hasattr(config, "num_mel_bins"):
        raise ModelError(
            f"A {type(session.module).__name__} does not transcribe token by token.",
            where=str(folder),
            expected="an encoder of log-mel features and a decoder, such as Whisper",
        )
    return Transcriber(_Encoder(session), _Decoder(session), folder)


class _Part:
    """Common part of the encoder session and the decoder session."""

    def __init__(self, whole: TorchSession) -> None:
        self._whole, self._config = whole, whole.module.config
        self.provider, self.settings = whole.provider, whole.settings


class _Encoder(_Part):
    """Session of the encoder: `input_features` to `last_hidden_state`."""

    inputs = (FEATURES,)

    def __init__(self, whole: TorchSession) -> None:
        super().__init__(whole)
        encoder = whole.module.get_encoder()
        frames = self._config.max_source_positions * encoder.conv1.stride[0] * encoder.conv2.stride[0]
        self.input_types = {FEATURES: TensorType("float32", (None, self._config.num_mel_bins, frames))}
        self.output_types = {HIDDEN: TensorType("float32", (None, None, self._config.d_model))}
        self._own = TorchSession(encoder, whole.where, whole.settings)

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`."""
        return {HIDDEN: as_array(self._own.run({FEATURES: batch[FEATURES]}).last_hidden_state)}


class _Decoder(_Part):
    """Session of the decoder: token ids, encoder output and cache to logits and new keys and values."""

    def __init__(self, whole: TorchSession) -> None:
        super().__init__(whole)
        layers, heads = self._config.decoder_layers, self._config.decoder_attention_heads
        cache_type = TensorType("float32", (None, heads, None, self._config.d_model // heads))
        self._names = [[[f"{layer}{of}.{part}" for part in ("key", "value")] for layer in range(layers)] for of in _OF]
        every = [name for of in self._names for pair in of for name in pair]
        plain = {
            _IDS: TensorType("int64", (None, None)),
            _AUDIO: TensorType("float32", (None, None, self._config.d_model)),
            _CACHED: TensorType("bool", (1,)),
        }
        logits = {_LOGITS: TensorType("float32", (None, None, None))}
        self.input_types: Mapping[str, TensorType] = plain | dict.fromkeys([PAST + name for name in every], cache_type)
        self.output_types: Mapping[str, TensorType] = logits | dict.fromkeys(
            [PRESENT + name for name in every], cache_type
        )
        self.inputs = tuple(self.input_types)

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`; keys and values of the audio are made where `use_cache_branch` is false."""
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        if np.asarray(batch[_CACHED]).all():
            cache = EncoderDecoderCache(*(DynamicCache(self._held(batch, of)) for of in self._names))
        found = self._whole.run(
            {"decoder_input_ids": batch[_IDS]},
            encoder_outputs=BaseModelOutput(last_hidden_state=as_tensor(np.asarray(batch[_AUDIO]))),
            use_cache=True,
            **{str(self._whole.cache_name): cache},
        )
        kept_now = cache_of(found)
        caches = (kept_now.self_attention_cache, kept_now.cross_attention_cache)
        kept = {
            PRESENT + name: as_array(tensor)
            for names, own in zip(self._names, caches, strict=True)
            for pair, layer in zip(names, own.layers, strict=True)
            for name, tensor in zip(pair, (layer.keys, layer.values), strict=True)
        }
        return {_LOGITS: as_array(found.logits), **kept}

    def _held(self, batch: Batch, names: list[list[str]]) -> list[Any]:
        return [tuple(as_tensor(np.asarray(batch[PAST + name])) for name in pair) for pair in names]
