"""Sessions that generate with transformers: transcripts by Whisper, text from text, and text from images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.generation.decoder import PAST, PRESENT
from compress.formats.generation.image_text import ImageAnswers, read_rules, until_ended
from compress.formats.generation.seq2seq import IDS, MASK, SEQUENCES, TEXTS
from compress.formats.generation.speech_recognition import FEATURES, HIDDEN, Transcriber
from compress.formats.runtime import Batch, TensorType, check_inputs
from compress.formats.safetensors.runtime import FAILURES, TorchSession, as_array, as_tensor, cache_of
from compress.utils.errors import ModelError, StageError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from compress.models.model import Processor


_IDS, _AUDIO, _CACHED, _LOGITS = "input_ids", "encoder_hidden_states", "use_cache_branch", "logits"
_OF = (".decoder", ".encoder")
"""Suffixes of the keys and values of the tokens and of the audio."""


class GeneratedText:
    """Session that writes text with the module of ``whole``, as `seq2seq.TextWriter` does with two graphs."""

    inputs = (IDS, MASK)
    input_types: Mapping[str, TensorType] = dict.fromkeys(inputs, TensorType("int64", (None, None)))
    output_types: Mapping[str, TensorType] = {
        SEQUENCES: TensorType("int64", (None, None)),
        TEXTS: TensorType("str", (None,)),
    }

    def __init__(self, whole: TorchSession, tokenizer: PreTrainedTokenizerBase) -> None:
        self._whole, self._tokenizer = whole, tokenizer
        self.provider, self.settings = whole.provider, whole.settings

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return `texts` [n] and `sequences` [n, longest]; raise `StageError` if transformers fails."""
        check_inputs(self.inputs, batch, self._whole.where)
        sequences = _generated(self._whole, {name: batch[name] for name in self.inputs})
        texts = self._tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return {SEQUENCES: as_array(sequences[:, 1:]), TEXTS: np.array(texts)}


def answers_to_images(whole: TorchSession, processor: Processor, folder: Path) -> ImageAnswers:
    """Return a session that answers images with the module of ``whole``; raise `ModelError` if it cannot.

    Sampling in the generation config is turned off, so that answers are the same every time.
    """
    rules = read_rules(folder)

    def write(batch: dict[str, np.ndarray]) -> list[np.ndarray]:
        # `generate` returns the prompt before the new tokens.
        prompt = batch[IDS].shape[1]
        sequences = _generated(whole, batch, max_new_tokens=rules.room(prompt), do_sample=False)
        return until_ended(as_array(sequences[:, prompt:]), rules.ends)

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
    return Transcriber(_EncoderSession(session), _DecoderSession(session), folder)


class _WhisperPart:
    """Attributes that the encoder session and the decoder session share."""

    def __init__(self, whole: TorchSession) -> None:
        self._whole, self._config = whole, whole.module.config
        self.provider, self.settings = whole.provider, whole.settings


class _EncoderSession(_WhisperPart):
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


class _DecoderSession(_WhisperPart):
    """Session of the decoder: token ids, encoder output and cache to logits and new keys and values."""

    def __init__(self, whole: TorchSession) -> None:
        super().__init__(whole)
        layers, heads = self._config.decoder_layers, self._config.decoder_attention_heads
        cache_type = TensorType("float32", (None, heads, None, self._config.d_model // heads))
        self._names = [
            [[f"{layer}{suffix}.{part}" for part in ("key", "value")] for layer in range(layers)] for suffix in _OF
        ]
        cache_names = [name for suffix in self._names for pair in suffix for name in pair]
        plain = {
            _IDS: TensorType("int64", (None, None)),
            _AUDIO: TensorType("float32", (None, None, self._config.d_model)),
            _CACHED: TensorType("bool", (1,)),
        }
        logits = {_LOGITS: TensorType("float32", (None, None, None))}
        self.input_types: Mapping[str, TensorType] = plain | dict.fromkeys(
            [PAST + name for name in cache_names], cache_type
        )
        self.output_types: Mapping[str, TensorType] = logits | dict.fromkeys(
            [PRESENT + name for name in cache_names], cache_type
        )
        self.inputs = tuple(self.input_types)

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Run the decoder; see `Session.predict`.

        Without `use_cache_branch`, keys and values of the audio are computed.
        """
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        # The first call computes the keys and values of the audio; later calls pass them in.
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        if np.asarray(batch[_CACHED]).all():
            cache = EncoderDecoderCache(
                *(
                    DynamicCache([tuple(as_tensor(np.asarray(batch[PAST + name])) for name in pair) for pair in of])
                    for of in self._names
                )
            )
        outputs = self._whole.run(
            {"decoder_input_ids": batch[_IDS]},
            encoder_outputs=BaseModelOutput(last_hidden_state=as_tensor(np.asarray(batch[_AUDIO]))),
            use_cache=True,
            **{str(self._whole.cache_name): cache},
        )
        updated_cache = cache_of(outputs)
        caches = (updated_cache.self_attention_cache, updated_cache.cross_attention_cache)
        present = {
            PRESENT + name: as_array(tensor)
            for names, layer_cache in zip(self._names, caches, strict=True)
            for pair, layer in zip(names, layer_cache.layers, strict=True)
            for name, tensor in zip(pair, (layer.keys, layer.values), strict=True)
        }
        return {_LOGITS: as_array(outputs.logits), **present}
