"""Runtime that runs a checkpoint with transformers on the processor in float32, and its session."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.generation.decoder import PAST, PRESENT, likeliest
from compress.formats.generation.image_text import ImageAnswers, read_rules, until_ended
from compress.formats.generation.seq2seq import IDS, MASK, SEQUENCES, TEXTS, TextWriter
from compress.formats.generation.speech_recognition import FEATURES, HIDDEN, Transcriber
from compress.formats.runtime import Batch, Session, TensorType, check_inputs, check_target
from compress.formats.target_profile import Target
from compress.tasks.capability import DESCRIBES_IMAGES, REWRITES, SINGLE_CALL, TRANSCRIBES
from compress.utils.errors import InputError, ModelError, StageError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import ModelOutput

    from compress.models.model import Processor


_CACHES = ("cache", "past_key_values", "cache_params", "state")
"""Names of the cache as argument and output of transformers' classes.

A class may have a current and a deprecated name.
"""
_LAST = "logits_to_keep"
FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)


class TorchSession:
    """Session of a module that was loaded whole."""

    provider = "cpu"

    def __init__(self, module: Any, where: str, settings: Mapping[str, Any]) -> None:
        self.module, self.where, self.settings = module, where, dict(settings)
        self.takes = frozenset(inspect.signature(module.forward).parameters)
        self.cache_name = next((name for name in _CACHES if name in self.takes), None)
        self.inputs: tuple[str, ...] = (str(getattr(module, "main_input_name", "pixel_values")),)
        self.input_types: Mapping[str, TensorType] = {}
        self.output_types: Mapping[str, TensorType] = {}

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`; types and shapes are not known before."""
        check_inputs(self.inputs, batch, self.where)
        without_cache = {"use_cache": False} if "use_cache" in self.takes else {}
        outputs = self.run({name: array for name, array in batch.items() if name in self.takes}, **without_cache)
        return {name: as_array(value) for name, value in outputs.items() if hasattr(value, "detach")}

    def run(self, batch: Batch, **options: Any) -> ModelOutput:
        """Return the module's outputs for arrays and ``options``; raise `StageError` if the module fails."""
        import torch

        try:
            with torch.inference_mode():
                return self.module(**{name: as_tensor(array) for name, array in batch.items()}, **options)
        except FAILURES as error:
            raise StageError(f"The model failed on a batch: {first_line(error)}", where=self.where) from error

    def decoder(self) -> TorchDecoder:
        """Return a greedy decoder that uses transformers' own cache."""
        return TorchDecoder(self)


class TorchDecoder:
    """Greedy decoder that uses transformers' own cache."""

    def __init__(self, session: TorchSession) -> None:
        self._session = session
        self._name = session.cache_name
        self._cache: Any = None
        self._ids: list[int] = []
        self.vocabulary = int(session.module.config.get_text_config().vocab_size)
        # Without a cache, every token runs the whole text again.
        self.cached = self._name is not None

    def prefill(self, ids: Sequence[int]) -> int:
        """Start a new text with one or more ``ids`` and return the next token."""
        self._cache, self._ids = None, []
        return self._answer(ids)

    def step(self, token: int) -> int:
        """Append ``token`` and return the next token."""
        return self._answer([token])

    def _answer(self, ids: Sequence[int]) -> int:
        self._ids += ids
        batch, takes = {IDS: np.array([self._ids if self._name is None else ids])}, self._session.takes
        if MASK in takes:
            batch[MASK] = np.ones((1, len(self._ids)), np.int64)
        options: dict[str, Any] = {_LAST: 1} if _LAST in takes else {}
        if self._name is not None:
            options |= {"use_cache": True, self._name: self._cache}
        outputs = self._session.run(batch, **options)
        if self._name is not None:
            self._cache = cache_of(outputs)
        return likeliest(as_array(outputs.logits[0, -1]), self._session.where)


def cache_of(outputs: Any) -> Any:
    """Return the cache among a module's outputs."""
    return next(cache for name in _CACHES if (cache := outputs.get(name)) is not None)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a numpy array, with floats of any width in float32."""
    whole = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    return np.asarray(whole.cpu().numpy())


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Return an array as a torch tensor that shares its memory."""
    import torch

    if array.dtype.kind not in "fiub":
        raise InputError(f"Arrays of {array.dtype} cannot be given to a model.", expected="numbers")
    return torch.from_numpy(np.ascontiguousarray(array))


class TorchRuntime:
    """Runtime for folders of safetensors."""

    name = "torch"

    def open(self, artifact: Path, target: Target, threads: int) -> Session:
        """Load the model of ``artifact``, a folder or its one file; ``threads`` work within an operator."""
        check_target(self, target, threads)
        import torch

        from compress.formats.safetensors.folder import has_integers, load_folder
        from compress.models.pipeline_folder import image_generation_hook

        task, model = load_folder(artifact)
        folder = artifact.parent if artifact.is_file() else artifact
        settings = {
            "runtime": f"torch {version('torch')}, transformers {version('transformers')}",
            "provider": target.provider,
            "intra_op_threads": threads,
            "computes_in": "float32",
            "integers_made_float": has_integers(folder),
        }
        session: Session
        if model.generates_images:
            session = image_generation_hook("open_torch")(model, settings, str(folder))
        else:
            session = TorchSession(model.module, str(folder), settings)
        previous_threads = torch.get_num_threads()
        torch.set_num_threads(threads)
        # The number is the process's: it ends with the session.
        weakref.finalize(session, torch.set_num_threads, previous_threads)
        if not isinstance(session, TorchSession):
            return session
        if TRANSCRIBES in task.capabilities and SINGLE_CALL not in task.capabilities:
            return open_transcriber(session, folder)
        if REWRITES in task.capabilities:
            return GeneratedText(session, model.processor)
        if DESCRIBES_IMAGES in task.capabilities:
            return answers_to_images(session, model.processor, folder)
        return session

    def unavailable(self, target: Target) -> str | None:
        """Return a message that names the missing package if this machine lacks the target, or ``None``."""
        missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
        return f"{missing[0]} is not installed (pip install {missing[0]})" if missing else None

    def build(self) -> str:
        """Return the packages' versions."""
        return f"torch {version('torch')}, transformers {version('transformers')}"

    def remark(self, artifact: Path) -> str | None:
        """Return a note if integers were converted to floats; see `Remarks`."""
        from compress.formats.safetensors.folder import has_integers

        if not has_integers(artifact):
            return None
        return (
            "its integers were dequantized to run it: predictions are exact, but time and memory are those of float32 "
            "arithmetic and not of low-bit kernels"
        )


RUNTIME = TorchRuntime()


_AUDIO, _CACHED, _LOGITS = "encoder_hidden_states", "use_cache_branch", "logits"
_OF = (".decoder", ".encoder")
"""Suffixes of the keys and values of the tokens and of the audio."""


class GeneratedText:
    """Session that writes text with the module of ``whole``, as `seq2seq.TextWriter` does with two graphs."""

    inputs, input_types, output_types = TextWriter.inputs, TextWriter.input_types, TextWriter.output_types

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


class _EncoderSession(TorchSession):
    """Session of the encoder: `input_features` to `last_hidden_state`."""

    def __init__(self, whole: TorchSession) -> None:
        super().__init__(whole.module.get_encoder(), whole.where, whole.settings)
        config = whole.module.config
        frames = config.max_source_positions * self.module.conv1.stride[0] * self.module.conv2.stride[0]
        self.inputs = (FEATURES,)
        self.input_types = {FEATURES: TensorType("float32", (None, config.num_mel_bins, frames))}
        self.output_types = {HIDDEN: TensorType("float32", (None, None, config.d_model))}

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`."""
        return {HIDDEN: as_array(self.run({FEATURES: batch[FEATURES]}).last_hidden_state)}


class _DecoderSession(TorchSession):
    """Session of the decoder: token ids, encoder output and cache to logits and new keys and values."""

    def __init__(self, whole: TorchSession) -> None:
        super().__init__(whole.module, whole.where, whole.settings)
        config = whole.module.config
        layers, heads = config.decoder_layers, config.decoder_attention_heads
        cache_type = TensorType("float32", (None, heads, None, config.d_model // heads))
        self._names = [
            [[f"{layer}{suffix}.{part}" for part in ("key", "value")] for layer in range(layers)] for suffix in _OF
        ]
        cache = dict.fromkeys([name for suffix in self._names for pair in suffix for name in pair], cache_type)
        self.input_types = {
            IDS: TensorType("int64", (None, None)),
            _AUDIO: TensorType("float32", (None, None, config.d_model)),
            _CACHED: TensorType("bool", (1,)),
            **{PAST + name: kind for name, kind in cache.items()},
        }
        logits = {_LOGITS: TensorType("float32", (None, None, None))}
        self.output_types = {**logits, **{PRESENT + name: kind for name, kind in cache.items()}}
        self.inputs = tuple(self.input_types)

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Run the decoder; see `Session.predict`.

        Without `use_cache_branch`, keys and values of the audio are computed.
        """
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        # The first call computes the keys and values of the audio; later calls pass them in.
        parts = [DynamicCache(), DynamicCache()]
        if np.asarray(batch[_CACHED]).all():
            parts = [
                DynamicCache([tuple(as_tensor(np.asarray(batch[PAST + name])) for name in pair) for pair in names])
                for names in self._names
            ]
        cache = EncoderDecoderCache(*parts)
        audio = BaseModelOutput(last_hidden_state=as_tensor(np.asarray(batch[_AUDIO])))
        options = {"encoder_outputs": audio, "use_cache": True, str(self.cache_name): cache}
        outputs = self.run({"decoder_input_ids": batch[IDS]}, **options)
        updated_cache = cache_of(outputs)
        caches = (updated_cache.self_attention_cache, updated_cache.cross_attention_cache)
        present = {
            PRESENT + name: as_array(tensor)
            for names, layer_cache in zip(self._names, caches, strict=True)
            for pair, layer in zip(names, layer_cache.layers, strict=True)
            for name, tensor in zip(pair, (layer.keys, layer.values), strict=True)
        }
        return {_LOGITS: as_array(outputs.logits), **present}
