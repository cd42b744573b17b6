"""Greedy text generation by llama.cpp: a model alone, or one that reads what a small one wrote ahead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from compress.errors import InputError, ModelError
from compress.formats.gguf.llama_cpp_library import LlamaContext, LlamaModel
from compress.runtimes.decoder import likeliest

_FIRST_LENGTH = 512
"""Tokens that a context begins with; it doubles when more are asked for."""


class Reader:
    """A model with the tokens that stand in its cache."""

    def __init__(self, model: LlamaModel, file: Path, threads: int, answers: int = 1) -> None:
        """Of each call the last ``answers`` tokens are answered; ``file`` names the model in messages."""
        self._model, self._file, self._threads, self._answers = model, file, threads, answers
        self._context = self._room(min(_FIRST_LENGTH, model.positions))
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
        same = min(_alike(self.ids, ids), len(ids) - 1)
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


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(place for place in range(shorter) if one[place] != other[place])


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


class DraftedDecoder:
    """The same tokens with a draft, which writes some ahead; the model reads them at once and keeps those that are its.

    Speculative decoding (Leviathan et al. 2023, algorithm 1, of the likeliest tokens). As in llama.cpp the draft stops
    where it is unsure. ``drafted`` and ``accepted`` count tokens since this was made, ``readings`` how often the model
    read behind a prompt.
    """

    cached = True
    ahead: ClassVar[int] = 4
    """Tokens that are drafted at most."""
    least: ClassVar[float] = 0.5
    """Probability below which the draft's own token is not worth reading."""

    def __init__(self, model: LlamaModel, draft: LlamaModel, file: Path, threads: int) -> None:
        """Make room for both. Raises `ModelError` where they have not the same tokens."""
        if draft.vocabulary != model.vocabulary:
            raise ModelError(
                f"The draft has {draft.vocabulary} tokens and the model {model.vocabulary}.",
                where=str(file),
                expected="two models of one tokenizer",
            )
        self._model, self._file = Reader(model, file, threads, self.ahead + 1), file
        self._draft = Reader(draft, file, threads)
        self._ids: list[int] = []
        self._follow: list[int] = []
        self.vocabulary = model.vocabulary
        self.drafted = self.accepted = self.readings = 0

    def prefill(self, ids: Sequence[int]) -> int:
        """Begin anew with ``ids``, one or more, and give the token that follows."""
        self._model.clear()
        self._draft.clear()
        self._ids = list(ids)
        return self._read([])

    def step(self, token: int) -> int:
        """Append ``token`` and give the one that follows."""
        known = self._follow[1:] if self._follow[:1] == [token] else []
        self._ids.append(token)
        if known:
            self._follow = known
            return known[0]
        self.readings += 1
        return self._read(self._written_ahead())

    def _read(self, drafted: list[int]) -> int:
        logits = self._model.read([*self._ids, *drafted])[-1 - len(drafted) :]
        own = [likeliest(row, str(self._file)) for row in logits]
        kept = next((place for place, token in enumerate(drafted) if token != own[place]), len(drafted))
        self.drafted += len(drafted)
        self.accepted += kept
        self._follow = own[: kept + 1]
        return own[0]

    def _written_ahead(self) -> list[int]:
        found: list[int] = []
        while len(found) < self.ahead:
            logits = self._draft.read([*self._ids, *found])[-1]
            token = likeliest(logits, str(self._file))
            if 1 / np.exp(logits - logits[token]).sum() < self.least:
                break
            found.append(token)
        return found


def check_ids(ids: np.ndarray, vocabulary: int, file: Path) -> None:
    """Raise `InputError` for a token that there isn't."""
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise InputError(
            f"A token has the id {int(ids.max() if ids.max() >= vocabulary else ids.min())}.",
            where=str(file),
            expected=f"0 to {vocabulary - 1}",
        )
