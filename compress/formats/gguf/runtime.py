"""llama.cpp runtime: GGUF files on the processor, greedy decoding, and inspection for integrity checks.

With several threads llama.cpp spins at every operator, so that a busy core slows down all threads. On a machine that
does other work as well, one thread is often faster than two.
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

_TARGET = TARGETS["llama-cpp"]

_FIRST_LENGTH = 512
"""Initial number of tokens of a context, which is doubled when it is full."""


class LlamaCppSession:
    """Opened GGUF model; every call of `predict` starts new texts."""

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
            # The old context is freed before the larger one is allocated.
            self._context = None
            self._context = LlamaContext(self._model, ids.shape[1], self._threads, answers=EVERY)
        rows = []
        for row in ids:
            self._context.clear()
            rows.append(self._context.append(row))
        return {_LOGITS: np.stack(rows)}

    def decoder(self) -> LlamaCppDecoder:
        """Return a greedy decoder that uses llama.cpp's own cache."""
        return LlamaCppDecoder(self._model, self._file, self._threads)


class LlamaCppRuntime:
    """Runtime that opens GGUF files through llama.cpp."""

    name = "llama-cpp"

    def open(self, artifact: Path, target: Target, threads: int) -> LlamaCppSession:
        """Open the only GGUF file of ``artifact``; the number of ``threads`` applies within an operator."""
        if threads < 1:
            raise InputError(f"{threads} threads cannot run a model.", expected="at least 1")
        file = find_gguf(artifact)
        library()
        # llama.cpp aborts the process for some invalid files. The header is enough to refuse them before.
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
    """Return every tensor with its bytes, mapped from the file."""
    return ((tensor, tensor.data()) for tensor in read_gguf(model.file).tensors)


def probe_logits(model: GgufModel, encode: Encode) -> np.ndarray:
    """Return the logits [windows * positions, vocabulary] at the last positions of a few short windows."""
    ids = [example["input_ids"][:TOKENS] for example in encode(load_tokenizer(model.folder)).inputs[:WINDOWS]]
    length = min(len(row) for row in ids)
    session = get_runtime(_TARGET.runtime).open(model.file, _TARGET, threads=1)
    window_logits = [session.predict({"input_ids": row[None, :length]})["logits"][0, -POSITIONS:] for row in ids]
    return np.concatenate(window_logits)


INSPECTOR = ModelInspector(stored_arrays, probe_logits, "llama-cpp")


class LlamaCppDecoder:
    """Greedy text generation with llama.cpp's cache."""

    cached = True

    def __init__(self, model: LlamaModel, file: Path, threads: int) -> None:
        """Allocate a context for ``model``; ``file`` names the model in error messages."""
        self._model, self._file, self._threads = model, file, threads
        self._context = LlamaContext(model, min(_FIRST_LENGTH, model.positions), threads)
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
        check_ids(np.asarray(ids), self.vocabulary, self._file)
        unread = list(ids)
        self._ids += unread
        length = self._context.length
        if len(self._ids) > length:
            while length < len(self._ids):
                length *= 2
            # Free the old context before the larger one is allocated. The larger one reads the whole sequence again.
            del self._context
            self._context = LlamaContext(self._model, length, self._threads)
            unread = self._ids
        return likeliest(self._context.append(np.asarray(unread))[-1], str(self._file))


def check_ids(ids: np.ndarray, vocabulary: int, file: Path) -> None:
    """Raise `InputError` for a token that is not in the vocabulary."""
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise InputError(
            f"A token has the id {int(ids.max() if ids.max() >= vocabulary else ids.min())}.",
            where=str(file),
            expected=f"0 to {vocabulary - 1}",
        )
