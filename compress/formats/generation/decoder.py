"""Text generation with an opened graph: a prompt at once, then token by token, always the likeliest one.

The names are those that transformers.js, optimum and onnxruntime-genai agree on: `input_ids`, `attention_mask`,
`position_ids`, `past_key_values.N.key` and `.value` go in; `logits`, `present.N.key` and `.value` come out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from compress.formats.runtime import Batch, Session, SharesCache
from compress.utils.errors import ModelError, StageError

_IDS, _LOGITS = "input_ids", "logits"
_PLAIN = (_IDS, "attention_mask", "position_ids")
PAST, PRESENT = "past_key_values.", "present."
"""What the names of inputs and outputs for keys and values begin with."""
_STATE = "past_"
"""What the names of all of a cache's inputs begin with, those for states of convolutions and recurrences too."""
_INTEGERS = ("int64", "int32")
_FLOATS = ("float32", "float16")
_EXPECTED = (
    "a decoder: inputs input_ids and, if it likes, attention_mask, position_ids and past_key_values.N.key / .value; "
    "outputs logits [batch, length, vocabulary] and present.N.key / .value"
)


def present_of(past: str) -> str:
    """Return the output that replaces the input ``past`` at the next token: `present.N.key`, `present_conv.N`."""
    return "present" + past.removeprefix("past_key_values").removeprefix("past")


def feeder(session: Session, where: str) -> Callable[[Batch], Batch]:
    """Return a function that adds the graph's other inputs to batches of whole sequences [batch, length].

    A decoder with a cache gets an empty cache and the positions of its tokens. Any other graph gets the batch
    unchanged. Raises `ModelError` for a graph whose cache has another form.
    """
    # A graph without a cache takes the batch as it is.
    if not any(name.startswith(_STATE) for name in session.inputs):
        return lambda batch: batch
    return Decoder(session, where).whole


def likeliest(logits: np.ndarray, where: str) -> int:
    """Return the token with the largest of ``logits`` [vocabulary]; raise `StageError` if they are not finite."""
    token = int(logits.argmax())
    # A NaN anywhere is what argmax finds.
    if not np.isfinite(logits[token]):
        raise StageError("The model's logits are not finite.", where=where, hint="write the model again")
    return token


class Decoder:
    """Greedy generation of one sequence. Without a cache in the graph every token runs the whole sequence again."""

    def __init__(self, session: Session, where: str) -> None:
        """Read the inputs of the graph; ``where`` names it in messages.

        Raise `ModelError` for a graph that is no decoder.
        """
        self._session, self._where = session, where
        inputs, outputs = session.input_types, session.output_types
        unknown = [name for name in inputs if name not in _PLAIN and not name.startswith(_STATE)]
        if _IDS not in inputs or _LOGITS not in outputs or unknown:
            raise self._no_decoder()
        shape = outputs[_LOGITS].shape
        if shape and len(shape) != 3:
            raise self._no_decoder(f"logits have the shape {list(shape)}")
        self._plain = {name: inputs[name].dtype for name in _PLAIN if name in inputs}
        odd = [f"{name} is {dtype}" for name, dtype in self._plain.items() if dtype not in _INTEGERS]
        for name in self._plain:
            *rest, length = inputs[name].shape
            # A length of 0 is how some exporters write an empty cache.
            if len(rest) != 1 or (isinstance(length, int) and length > 0):
                odd.append(f"{name} takes {length} tokens only")
        if odd:
            raise self._no_decoder(", ".join(odd))
        # Each input of the cache with the output that replaces it at the next token.
        self._cache = {name: present_of(name) for name in session.inputs if name.startswith(_STATE)}
        missing = [present for present in self._cache.values() if present not in outputs]
        if missing:
            raise self._no_decoder(f"the cache has inputs without the outputs {', '.join(missing)}")
        self._empty = {past: self._empty_cache(past) for past in self._cache}
        self._past = self._empty
        self._shared = session.shared_cache(self._cache) if isinstance(session, SharesCache) and self._cache else None
        self._ids: list[int] = []
        self.vocabulary = 0
        """Size of the vocabulary; 0 before the first answer."""

    @property
    def cached(self) -> bool:
        """Return whether the graph takes the keys and values of earlier tokens, so that a step computes one token."""
        return bool(self._cache)

    def whole(self, batch: Batch) -> Batch:
        """Return all graph inputs for reading the sequences [batch, length] of ``batch`` from their start."""
        rows, length = batch[_IDS].shape
        values = {"position_ids": np.tile(np.arange(length), (rows, 1)), **batch}
        feed = {name: np.asarray(values[name], dtype) for name, dtype in self._plain.items()}
        return {**feed, **{past: np.repeat(empty, rows, axis=0) for past, empty in self._empty.items()}}

    def prefill(self, ids: Sequence[int]) -> int:
        """Start a new text with one or more ``ids`` and return the next token.

        Raises the errors of `Session.predict`.
        """
        return likeliest(self.read(ids), self._where)

    def step(self, token: int) -> int:
        """Append ``token`` and return the next token."""
        return likeliest(self.read_on(token), self._where)

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Start a new text with one or more ``ids`` and return the logits [vocabulary] of the next token."""
        self._past, self._ids = self._empty, []
        return self._answer(ids)

    def read_on(self, token: int) -> np.ndarray:
        """Append ``token`` and return the logits [vocabulary] of the next token."""
        return self._answer([token])

    def _answer(self, ids: Sequence[int]) -> np.ndarray:
        seen = len(self._ids)
        self._ids += ids
        if not self._cache:
            ids, seen = self._ids, 0
        total = seen + len(ids)
        values = {_IDS: ids, "attention_mask": np.ones(total), "position_ids": np.arange(seen, total)}
        feed = {name: np.asarray(values[name], dtype)[np.newaxis] for name, dtype in self._plain.items()}
        if self._shared is not None:
            return self._last(self._shared.predict(feed, seen, total))
        outputs = self._session.predict({**feed, **self._past})
        self._past = {past: outputs[present] for past, present in self._cache.items()}
        return self._last(outputs[_LOGITS])

    def _last(self, logits: np.ndarray) -> np.ndarray:
        if logits.ndim != 3:
            raise self._no_decoder(f"logits have the shape {list(logits.shape)}")
        self.vocabulary = logits.shape[-1]
        last: np.ndarray = logits[0, -1]
        return last

    def _empty_cache(self, past: str) -> np.ndarray:
        dtype, shape = self._session.input_types[past]
        axes = "[batch, heads, length, size of a head] with heads and size fixed and length free"
        keys = past.startswith(PAST)
        free = [index for index, axis in enumerate(shape) if index and not isinstance(axis, int)]
        if (keys and (len(shape) != 4 or free != [2])) or (not keys and free):
            raise self._no_decoder(f"{past} has the shape {list(shape)}, not {axes if keys else 'one that is fixed'}")
        if dtype not in _FLOATS:
            raise self._no_decoder(f"{past} is {dtype}, not {' or '.join(_FLOATS)}")
        return np.zeros((1, *(axis if isinstance(axis, int) else 0 for axis in shape[1:])), dtype)

    def _no_decoder(self, why: str | None = None) -> ModelError:
        inputs, outputs = (_summary(types) for types in (self._session.input_types, self._session.output_types))
        problem = why or f"it has the inputs {inputs} and the outputs {outputs}"
        return ModelError(
            f"The graph cannot generate text: {problem}.",
            where=self._where,
            expected=_EXPECTED,
            hint="export it for the task text-generation with past, e.g. by optimum or onnxruntime-genai's builder",
        )


def _summary(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


class GreedyDecoder(Protocol):
    """Greedy generation of one sequence."""

    @property
    def cached(self) -> bool:
        """Return whether a step computes one token instead of the whole sequence."""

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary; it may be 0 before the first answer."""

    def prefill(self, ids: Sequence[int]) -> int:
        """Start a new text with one or more ``ids`` and return the next token."""

    def step(self, token: int) -> int:
        """Append ``token`` and return the next token."""


class Written(NamedTuple):
    """Generated ``tokens``: the first came after ``first_ms``, all of them after ``all_ms``."""

    tokens: list[int]
    first_ms: float
    all_ms: float


@runtime_checkable
class WritesItself(Protocol):
    """Decoder whose runtime generates a whole text in one call and times it."""

    def write(self, ids: Sequence[int], tokens: int) -> Written:
        """Generate ``tokens`` tokens greedily after ``ids``, without a stop at the end of the text."""


class ManyTexts(Protocol):
    """Language model whose runtime starts waiting texts as others end."""

    def write(self, begun: Sequence[np.ndarray], room: int, temperature: float | None, seed: int) -> list[np.ndarray]:
        """Return the ids after each prompt, up to and including the token that ends the text.

        Args:
            begun: Token ids of the prompts.
            room: Largest number of new tokens.
            temperature: Temperature of sampling; None for greedy generation.
            seed: Seed of sampling.

        Raises:
            StageError: The runtime fails.
        """


def written_tokens(decoder: GreedyDecoder, ids: Sequence[int], most: int, ends: Collection[int]) -> Iterator[int]:
    """Yield the greedy tokens after ``ids``, each computed when it is requested.

    Args:
        decoder: Decoder that generates the text; its errors are raised unchanged.
        ids: Token ids of the prompt.
        most: Largest number of tokens.
        ends: Tokens that end the text.
    """
    token = decoder.prefill(ids)
    yield token
    for _ in range(most - 1):
        if token in ends:
            return
        token = decoder.step(token)
        yield token


@runtime_checkable
class Generating(Protocol):
    """Session of a runtime that stores keys and values itself."""

    def decoder(self) -> GreedyDecoder:
        """Return a decoder for a new text."""


def open_decoder(session: Session, where: str) -> GreedyDecoder:
    """Return a greedy decoder for ``session``; ``where`` names the artifact in messages.

    Raises:
        ModelError: The artifact is no decoder.
    """
    return session.decoder() if isinstance(session, Generating) else Decoder(session, where)
