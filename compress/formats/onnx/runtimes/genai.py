"""onnxruntime-genai: a decoder's folder on the processor, with onnxruntime-genai's own cache."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.generation.decoder import likeliest
from compress.formats.onnx.model import GENAI_CONFIG, find_graph
from compress.formats.runtime import Batch, TensorType, why_missing
from compress.formats.target_profile import Target
from compress.models.json_file import read_json
from compress.utils.errors import InputError, MissingExtraError, ModelError, StageError

if TYPE_CHECKING:
    from onnxruntime_genai import Generator


_IDS, _MASK, _LOGITS = "input_ids", "attention_mask", "logits"
PROVIDER = "cpu"
_CODE = "custom_ops_library"
"""Setting with which onnxruntime-genai loads an arbitrary library into the process."""
_NUMBERS = ("context_length", "vocab_size")
_FIRST_LENGTH = 512
"""Initial capacity of a generation in tokens; it doubles when more are needed."""
_FATAL = 4
"""ONNX Runtime's severity below which nothing is written to standard error; failures are raised as errors."""


class OnnxGenaiSession:
    """An opened decoder; every call of `predict` starts a new text."""

    inputs = (_IDS,)
    provider = PROVIDER

    def __init__(self, model: object, folder: Path, threads: int, vocabulary: int, positions: int) -> None:
        self._model, self.where = model, str(folder)
        self.vocabulary, self._positions = vocabulary, positions
        self.input_types = {_IDS: TensorType("int64", (None, None))}
        self.output_types = {_LOGITS: TensorType("float32", (None, None, vocabulary))}
        self.settings: dict[str, Any] = {
            "runtime": f"onnxruntime-genai {version('onnxruntime-genai')}, onnxruntime {version('onnxruntime')}",
            "provider": PROVIDER,
            "intra_op_threads": threads,
            "inter_op_threads": 1,
        }

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return the logits [n, length, vocabulary] of texts without padding; see `Session.predict`."""
        # The batch's token ids. Raises `InputError` for other inputs and for padding.
        if _IDS not in batch:
            raise InputError(f"The batch lacks the model's input {_IDS}.", where=self.where)
        ids = np.asarray(batch[_IDS])
        if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise InputError(
                f"{_IDS} has the type {ids.dtype} and the shape {list(ids.shape)}.",
                where=self.where,
                expected="integers [n, length]",
            )
        if not np.asarray(batch.get(_MASK, 1)).all():
            raise InputError(
                "onnxruntime-genai pads on the left, where the graph takes no padding, and the batch has some.",
                where=self.where,
                expected="texts of one length in a batch",
            )
        generator = self.generator(*ids.shape)
        self.append(generator, ids)
        return {_LOGITS: np.asarray(generator.get_output(_LOGITS), dtype=np.float32)}

    def decoder(self) -> OnnxGenaiDecoder:
        """Return a greedy decoder with onnxruntime-genai's own cache."""
        return OnnxGenaiDecoder(self)

    def room(self, tokens: int) -> int:
        """Return the capacity to allocate for ``tokens``. Raises `InputError` if the model supports fewer."""
        if tokens > self._positions:
            raise InputError(
                f"A text of {tokens} tokens exceeds the model's context length.",
                where=self.where,
                expected=f"at most {self._positions} tokens, its context_length",
            )
        length = _FIRST_LENGTH
        # Capacities are powers of two times the first, so that few generations are allocated.
        while length < tokens:
            length *= 2
        return min(length, self._positions)

    def append(self, generator: Any, ids: np.ndarray) -> None:
        """Let a generation read ``ids`` [n, length]. Raises `InputError` for ids outside the vocabulary."""
        outside = ids[(ids < 0) | (ids >= self.vocabulary)]
        if outside.size:
            token = f"A token has the id {int(outside[0])}."
            raise InputError(token, where=self.where, expected=f"0 to {self.vocabulary - 1}")
        try:
            generator.append_tokens(ids.astype(np.int32))
        except RuntimeError as error:
            raise self._failed(error) from error

    def generator(self, rows: int, length: int) -> Generator:
        """Return a generation with capacity for so many tokens. Raises as `room` does."""
        genai = _library()
        self.room(length)
        try:
            parameters = genai.GeneratorParams(self._model)
            parameters.set_search_options(batch_size=rows, max_length=length, do_sample=False)
            return genai.Generator(self._model, parameters)
        except RuntimeError as error:
            raise self._failed(error) from error

    def _failed(self, error: RuntimeError) -> StageError:
        """Return the error for a failure of onnxruntime-genai."""
        return StageError(f"onnxruntime-genai failed on a text: {_reason(error)}", where=self.where)


class OnnxGenaiDecoder:
    """Greedy text generation with the interface of `runtimes.decoder.Decoder`; end tokens do not stop it."""

    cached = True

    def __init__(self, session: OnnxGenaiSession) -> None:
        self._session = session
        self._generator: Any = None
        self._room = 0
        self._ids: list[int] = []
        self.vocabulary = session.vocabulary

    def prefill(self, ids: Sequence[int]) -> int:
        """Start a new text with ``ids``, one or more, and return the next token."""
        self._ids = []
        # Rewinding keeps the allocated cache.
        if self._generator is not None:
            self._generator.rewind_to(0)
        return self._answer(ids)

    def step(self, token: int) -> int:
        """Append ``token`` and return the next one."""
        return self._answer([token])

    def _answer(self, ids: Sequence[int]) -> int:
        """Read tokens and return the next one, with a larger generation if the current one is full."""
        self._ids += ids
        if len(self._ids) > self._room:
            # The old one's cache goes before the new one's comes.
            self._generator = None
            self._room, ids = self._session.room(len(self._ids)), self._ids
            self._generator = self._session.generator(1, self._room)
        self._session.append(self._generator, np.array([ids], dtype=np.int64))
        return likeliest(self._generator.get_logits()[0, -1], self._session.where)


class GenaiRuntime:
    """Runtime that opens decoders' folders through onnxruntime-genai."""

    name = "onnxruntime-genai"

    def open(self, artifact: Path, target: Target, threads: int) -> OnnxGenaiSession:
        """Open the folder ``artifact``, which has a genai_config.json; ``threads`` work within an operator."""
        if threads < 1:
            raise InputError(f"{threads} threads cannot run a model.", expected="at least 1")
        config = _read_config(artifact)["model"]
        genai = _library()
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1, "log_severity_level": _FATAL}
        try:
            settings = genai.Config(str(artifact))
            settings.clear_providers()
            # The folder's own session options could name other providers.
            settings.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            model = genai.Model(settings)
        except RuntimeError as error:
            raise ModelError(
                f"onnxruntime-genai cannot open the model: {_reason(error)}",
                where=str(artifact),
                hint="write the model again with the stage onnx, or copy the folder again with all of its files",
            ) from error
        return OnnxGenaiSession(model, artifact, threads, config["vocab_size"], config["context_length"])

    def unavailable(self, target: Target) -> str | None:
        """Return why this machine lacks the target: the package is not installed."""
        return why_missing("onnxruntime_genai", "onnxruntime-genai", "genai")

    def build(self) -> str:
        """Return the versions of onnxruntime-genai and of ONNX Runtime."""
        return f"{version('onnxruntime-genai')}, onnxruntime {version('onnxruntime')}"


@functools.cache
def _library() -> ModuleType:
    """Import onnxruntime-genai with telemetry turned off. Raises `MissingExtraError`."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise MissingExtraError("onnxruntime-genai", "genai", "The target genai")
    import onnxruntime_genai

    onnxruntime_genai.disable_telemetry_events()
    module: ModuleType = onnxruntime_genai
    return module


def _reason(error: RuntimeError) -> str:
    """Return the message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _read_config(folder: Path) -> Mapping[str, Any]:
    """Return the config of the one graph in ``folder``.

    Raises `ModelError` if it is missing, names another graph or a library to load, or is incomplete.
    """
    path = folder / GENAI_CONFIG
    if not path.is_file():
        raise ModelError(
            "The folder has no genai_config.json.",
            where=str(folder),
            expected="a decoder's folder as the stage onnx or onnxruntime-genai's own builder writes it",
            hint="write the model with the stage onnx, for the task text-generation",
        )
    config = read_json(path)
    # The config is untrusted: it may make the library load arbitrary code.
    if _names_code(config):
        raise ModelError(
            f"genai_config.json names a library to be loaded ({_CODE}), which may run anything.",
            where=str(path),
            expected="a graph of ONNX Runtime's own operators",
            hint="take the entry out if the model runs without it",
        )
    model = _part(config, "model")
    named = _part(model, "decoder").get("filename")
    if not isinstance(named, str) or not all(isinstance(model.get(name), int) for name in _NUMBERS):
        raise ModelError(
            "genai_config.json describes no decoder.",
            where=str(path),
            expected=f"model.decoder.filename, a text, and model.{' and model.'.join(_NUMBERS)}, whole numbers",
            hint="write the model again with the stage onnx",
        )
    graph = find_graph(folder)
    # A config that names another graph would be measured in place of the shipped one.
    if (folder / named).resolve() != graph.resolve():
        raise ModelError(
            f"genai_config.json names the graph {named}, and the folder holds {graph.relative_to(folder)}.",
            where=str(path),
            hint="name the graph that is there, or write the model again with the stage onnx",
        )
    return config


def _part(content: Mapping[str, object], name: str) -> Mapping[str, Any]:
    """Return a nested object, empty if it is missing."""
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def _names_code(content: object) -> bool:
    """Return whether a config names a library to load at any depth."""
    if isinstance(content, dict):
        return _CODE in content or any(map(_names_code, content.values()))
    return isinstance(content, list) and any(map(_names_code, content))


RUNTIME = GenaiRuntime()
