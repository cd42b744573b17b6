"""Greedy text generation by llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compress.formats.generation.decoder import likeliest
from compress.formats.gguf.llama_cpp_library import LlamaContext, LlamaModel
from compress.utils.errors import InputError

_FIRST_LENGTH = 512
"""Initial number of tokens of a context, which is doubled when it is full."""


class LlamaCppDecoder:
    """Greedy text generation with llama.cpp's cache; see `runtimes.decoder.GreedyDecoder`."""

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
        if len(self._ids) > self._context.length:
            length = self._context.length
            while length < len(self._ids):
                length *= 2
            # The old context is freed before the larger one is allocated, which then reads the whole sequence again.
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
