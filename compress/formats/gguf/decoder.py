"""Greedy text generation by llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compress.errors import InputError
from compress.formats.gguf.llama_cpp_library import LlamaContext, LlamaModel
from compress.runtimes.decoder import likeliest
from compress.runtimes.drafted import alike

_FIRST_LENGTH = 512
"""Tokens that a context begins with; it doubles when more are asked for."""


class Reader:
    """A model with the tokens that stand in its cache."""

    def __init__(self, model: LlamaModel, file: Path, threads: int, answers: int = 1) -> None:
        """Of each call the last ``answers`` tokens are answered; ``file`` names the model in messages."""
        self._model, self._file, self._threads, self._answers = model, file, threads, answers
        self._context = self._room(min(_FIRST_LENGTH, model.positions))
        self.vocabulary = model.vocabulary
        self.ids: list[int] = []

    def _room(self, length: int) -> LlamaContext:
        return LlamaContext(self._model, length, self._threads, self._answers)

    def clear(self) -> None:
        """Forget all tokens."""
        self.ids = []
        self._context.clear()

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [tokens read, ``answers`` at most, vocabulary] behind the last of ``ids``.

        What stands in the cache as it stands in ``ids`` is not read again, but for the last token.
        """
        same = alike(self.ids, ids)
        check_ids(np.asarray(ids[same:]), self._model.vocabulary, self._file)
        if len(ids) > self._context.length:
            length, same = self._context.length, 0
            while length < len(ids):
                length *= 2
            del self._context
            self._context = self._room(length)
        elif same < len(self.ids):
            self._context.keep(same)
        self.ids = list(ids)
        return self._context.append(np.asarray(ids[same:]))


class LlamaCppDecoder:
    """Text generation as `runtimes.decoder.Decoder` does it: always the likeliest token."""

    cached = True

    def __init__(self, model: LlamaModel, file: Path, threads: int) -> None:
        self._reader, self._file = Reader(model, file, threads), file
        self.vocabulary = model.vocabulary

    def prefill(self, ids: Sequence[int]) -> int:
        """Begin anew with ``ids``, one or more, and give the token that follows."""
        self._reader.clear()
        return self._answer(ids)

    def step(self, token: int) -> int:
        """Append ``token`` and give the one that follows."""
        return self._answer([*self._reader.ids, token])

    def _answer(self, ids: Sequence[int]) -> int:
        return likeliest(self._reader.read(ids)[-1], str(self._file))


def check_ids(ids: np.ndarray, vocabulary: int, file: Path) -> None:
    """Raise `InputError` for a token that there isn't."""
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise InputError(
            f"A token has the id {int(ids.max() if ids.max() >= vocabulary else ids.min())}.",
            where=str(file),
            expected=f"0 to {vocabulary - 1}",
        )
