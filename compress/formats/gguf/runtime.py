"""llama.cpp: a GGUF file on the processor.

With several threads it waits by spinning at every operator, so that a busy core slows all of them: on a machine that
does other work as well, one thread is often faster than two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.gguf.decoder import LlamaCppDecoder, check_ids
from compress.formats.gguf.llama_cpp_library import (
    EVERY,
    LlamaContext,
    LlamaModel,
    build,
    describe,
    library,
    why_missing,
)
from compress.formats.gguf.model import find_gguf
from compress.formats.gguf.read import read_gguf
from compress.formats.runtime import Batch, TensorType
from compress.formats.target_profile import Target
from compress.utils.errors import InputError

_IDS, _MASK, _LOGITS = "input_ids", "attention_mask", "logits"
PROVIDER = "cpu"


class LlamaCppSession:
    """A GGUF model that was opened; every call of `predict` begins a text anew."""

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
        """Logits [n, length, vocabulary] of texts that have no padding; see `Session.predict`."""
        ids = self._checked(batch)
        if self._context is None or self._context.length < ids.shape[1]:
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

    def _checked(self, batch: Batch) -> np.ndarray:
        if _IDS not in batch:
            raise InputError(f"The batch lacks the model's input {_IDS}.", where=str(self._file))
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
        return ids


def open_gguf(artifact: Path, threads: int) -> LlamaCppSession:
    """The one GGUF file of ``artifact``, a folder or the file, opened."""
    file = find_gguf(artifact)
    library()
    # llama.cpp ends the process at some broken files; the header says enough to refuse them before.
    read_gguf(file)
    return LlamaCppSession(LlamaModel(file), file, threads)


class LlamaCppRuntime:
    """Opens GGUF files through llama.cpp."""

    name = "llama-cpp"

    def open(self, artifact: Path, target: Target, threads: int) -> LlamaCppSession:
        """Open the one GGUF file of ``artifact``, a folder or the file; ``threads`` work within an operator."""
        if threads < 1:
            raise InputError(f"{threads} threads cannot run a model.", expected="at least 1")
        return open_gguf(artifact, threads)

    def unavailable(self, target: Target) -> str | None:
        """Why this machine lacks the target: the package is not installed, or is another build."""
        return why_missing()

    def build(self) -> str:
        """The package's version, or the digest of the library that stands in for it."""
        return build()


RUNTIME = LlamaCppRuntime()
