"""Runtime of the target `llama-cpp`, which runs GGUF files through llama.cpp on the CPU.

The module has three parts:

- `LlamaCppRuntime` opens a file as a `LlamaCppSession`, which returns the logits of all tokens of complete texts. It is
  used to measure quality, for example perplexity.
- `LlamaCppDecoder` generates text greedily, token by token, with llama.cpp's key-value cache. It is used to measure
  answers and speed of generation.
- `INSPECTOR` gives stored tensors and the logits of a few probe texts to checks of a model's integrity.

All of them call the C functions in `compress.formats.gguf.llama_cpp_library`.

llama.cpp's threads wait for each other at every operator by spinning, so that one busy core slows down all threads. On
a machine that does other work as well, one thread is often faster than two.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.generation.decoder import likeliest
from compress.formats.gguf.llama_cpp_library import (
    EVERY,
    LlamaContext,
    LlamaModel,
    build,
    describe,
    library,
    why_missing,
)
from compress.formats.gguf.model import GgufModel, find_gguf, read_gguf
from compress.formats.integrity import POSITIONS, TOKENS, WINDOWS, Encode, ModelInspector, Stored
from compress.formats.runtime import Batch, TensorType, check_inputs, get_runtime
from compress.formats.target_profile import Target
from compress.formats.targets import TARGETS
from compress.models.processor import load_tokenizer
from compress.utils.errors import InputError

_IDS, _MASK, _LOGITS = "input_ids", "attention_mask", "logits"
PROVIDER = "cpu"
"""Name of the device in reports, as ONNX Runtime calls it an execution provider."""

_TARGET = TARGETS["llama-cpp"]

_INITIAL_LENGTH = 512
"""Initial number of tokens that a decoder's key-value cache has room for, which is doubled when it is full."""


class LlamaCppSession:
    """Opened GGUF model that computes logits of complete texts. No call of `predict` depends on earlier ones."""

    inputs = (_IDS,)
    provider = PROVIDER

    def __init__(self, model: LlamaModel, file: Path, threads: int) -> None:
        self._model, self._file, self._threads = model, file, threads
        self._context: LlamaContext | None = None
        self.input_types = {_IDS: TensorType("int64", (None, None))}
        self.output_types = {_LOGITS: TensorType("float32", (None, None, model.vocabulary))}
        self.settings: dict[str, Any] = {
            **describe(),
            "provider": PROVIDER,
            "intra_op_threads": threads,
            "cache": "float16",
        }

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return logits [n, length, vocabulary] of texts without padding; see `Session.predict`."""
        check_inputs(self.inputs, batch, str(self._file))
        ids = np.asarray(batch[_IDS])
        if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise InputError(
                f"{_IDS} has the type {ids.dtype} and the shape {list(ids.shape)}.",
                where=str(self._file),
                expected="integers [n, length]",
            )
        if not np.asarray(batch.get(_MASK, 1)).all():
            raise InputError(
                "llama.cpp takes no padding, and the batch has some.",
                where=str(self._file),
                expected="texts of one length in a batch",
            )
        check_ids(ids, self._model.vocabulary, self._file)
        if self._context is None or self._context.length < ids.shape[1]:
            # Free the old context before the larger one is allocated. `EVERY` requests the logits of all tokens.
            self._context = None
            self._context = LlamaContext(self._model, ids.shape[1], self._threads, answers=EVERY)
        # A context holds one sequence, so texts run one after the other.
        logits = []
        for row in ids:
            self._context.clear()
            logits.append(self._context.append(row))
        return {_LOGITS: np.stack(logits)}

    def decoder(self) -> LlamaCppDecoder:
        """Return a greedy decoder that uses llama.cpp's key-value cache."""
        return LlamaCppDecoder(self._model, self._file, self._threads)


class LlamaCppRuntime:
    """Implementation of the `Runtime` protocol for GGUF files."""

    name = "llama-cpp"

    def open(self, artifact: Path, target: Target, threads: int) -> LlamaCppSession:
        """Open the only GGUF file of ``artifact``; the number of ``threads`` applies within an operator."""
        if threads < 1:
            raise InputError(f"{threads} threads cannot run a model.", expected="at least 1")
        file = find_gguf(artifact)
        # Raise an error for a missing or wrong llama.cpp before the file is read.
        library()
        # llama.cpp aborts the process for some invalid files. Our reader raises an error for them first.
        read_gguf(file)
        return LlamaCppSession(LlamaModel(file), file, threads)

    def unavailable(self, target: Target) -> str | None:
        """Return the reason why this machine lacks the target: the package is missing or has another version."""
        return why_missing()

    def build(self) -> str:
        """Return the package's version, or the digest of a custom library."""
        return build()


RUNTIME = LlamaCppRuntime()


def stored_arrays(model: GgufModel) -> Stored:
    """Return every tensor with its stored bytes, memory-mapped from the file."""
    return ((tensor, tensor.data()) for tensor in read_gguf(model.file).tensors)


def probe_logits(model: GgufModel, encode: Encode) -> np.ndarray:
    """Return the logits [windows * positions, vocabulary] at the last positions of a few short windows of text."""
    ids = [example["input_ids"][:TOKENS] for example in encode(load_tokenizer(model.folder)).inputs[:WINDOWS]]
    # Windows of one length give arrays of one shape.
    length = min(len(row) for row in ids)
    session = get_runtime(_TARGET.runtime).open(model.file, _TARGET, threads=1)
    window_logits = [session.predict({"input_ids": row[None, :length]})["logits"][0, -POSITIONS:] for row in ids]
    return np.concatenate(window_logits)


INSPECTOR = ModelInspector(stored_arrays, probe_logits, "llama-cpp")


class LlamaCppDecoder:
    """Greedy text generation with llama.cpp's key-value cache, which holds the tokens so far.

    ``cached`` tells callers that a step costs one token, not the whole sequence.
    """

    cached = True

    def __init__(self, model: LlamaModel, file: Path, threads: int) -> None:
        """Allocate a context for ``model``; ``file`` names the model in error messages."""
        self._model, self._file, self._threads = model, file, threads
        self._context = LlamaContext(model, min(_INITIAL_LENGTH, model.positions), threads)
        self.vocabulary = model.vocabulary
        self._ids: list[int] = []

    def prefill(self, ids: Sequence[int]) -> int:
        """Start a new sequence with one or more ``ids`` and return the token that follows."""
        self._context.clear()
        self._ids = []
        return self._append(ids)

    def step(self, token: int) -> int:
        """Append ``token`` and return the token that follows."""
        return self._append([token])

    def _append(self, ids: Sequence[int]) -> int:
        """Run the model on more tokens of the sequence and return the token that is most likely to follow."""
        check_ids(np.asarray(ids), self.vocabulary, self._file)
        # Tokens that are not in the cache yet.
        uncached = list(ids)
        self._ids += uncached
        length = self._context.length
        if len(self._ids) > length:
            while length < len(self._ids):
                length *= 2
            # Free the old context before the larger one is allocated. The larger one runs the whole sequence again,
            # since llama.cpp cannot enlarge a cache. It may exceed the positions that the model was trained with.
            del self._context
            self._context = LlamaContext(self._model, length, self._threads)
            uncached = self._ids
        return likeliest(self._context.append(np.asarray(uncached))[-1], str(self._file))


def check_ids(ids: np.ndarray, vocabulary: int, file: Path) -> None:
    """Raise `InputError` for a token that is not in the vocabulary."""
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise InputError(
            f"A token has the id {int(ids.max() if ids.max() >= vocabulary else ids.min())}.",
            where=str(file),
            expected=f"0 to {vocabulary - 1}",
        )
