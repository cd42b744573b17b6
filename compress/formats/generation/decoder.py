"""Text generation with an opened graph: a prompt at once, then token by token, always the likeliest one.

The names are those that transformers.js, optimum and onnxruntime-genai agree on: `input_ids`, `attention_mask`,
`position_ids`, `past_key_values.N.key` and `.value` go in; `logits`, `present.N.key` and `.value` come out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from compress.formats.runtime import Batch, Session, SharesCache, TensorType
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
    """The output that takes the place of the input ``past`` at the next token: `present.N.key`, `present_conv.N`."""
    return "present" + past.removeprefix("past_key_values").removeprefix("past")


def feeder(session: Session, where: str) -> Callable[[Batch], Batch]:
    """What turns batches of whole sequences [batch, length] into all that the graph takes.

    A decoder with a cache gets an empty one, and the places of its tokens; any other graph gets the batch as it is.
    Raises `ModelError` for a graph that takes a cache of another form.
    """
    if not any(name.startswith(_STATE) for name in session.inputs):
        return lambda batch: batch
    return Decoder(session, where).whole


def likeliest(logits: np.ndarray, where: str) -> int:
    """The token of the largest of ``logits`` [vocabulary]. Raises `StageError` where they are not finite."""
    token = int(logits.argmax())
    # A NaN anywhere is what argmax finds.
    if not np.isfinite(logits[token]):
        raise StageError("The model's logits are not finite.", where=where, hint="write the model again")
    return token


class Decoder:
    """Greedy generation of one sequence. Without a cache in the graph every token runs the whole sequence again."""

    def __init__(self, session: Session, where: str) -> None:
        """Read from the graph what it takes; ``where`` names it in messages. Raises `ModelError` for another graph."""
        self._session, self._where = session, where
        self._plain = self._plain_inputs()
        self._cache = self._cache_names()
        self._empty = {past: self._empty_cache(past) for past in self._cache}
        self._past = self._empty
        self._shared = session.shared_cache(self._cache) if isinstance(session, SharesCache) and self._cache else None
        self._ids: list[int] = []
        self.vocabulary = 0
        """Size of the vocabulary; 0 before the first answer."""

    @property
    def cached(self) -> bool:
        """Whether the graph takes keys and values of earlier tokens, so that a step costs one token's work."""
        return bool(self._cache)

    def whole(self, batch: Batch) -> Batch:
        """Everything that the graph takes to read sequences [batch, length] of ``batch`` from their beginning."""
        rows, length = batch[_IDS].shape
        values = {"position_ids": np.tile(np.arange(length), (rows, 1)), **batch}
        feed = {name: np.asarray(values[name], dtype) for name, dtype in self._plain.items()}
        return {**feed, **{past: np.repeat(empty, rows, axis=0) for past, empty in self._empty.items()}}

    def prefill(self, ids: Sequence[int]) -> int:
        """Begin anew with ``ids``, one or more, and give the token that follows. Raises as `Session.predict` does."""
        return likeliest(self.read(ids), self._where)

    def step(self, token: int) -> int:
        """Append ``token`` and give the one that follows."""
        return likeliest(self.read_on(token), self._where)

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Begin anew with ``ids``, one or more: the logits [vocabulary] of what follows."""
        self._past, self._ids = self._empty, []
        return self._answer(ids)

    def read_on(self, token: int) -> np.ndarray:
        """Append ``token``: the logits [vocabulary] of what follows."""
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

    def _plain_inputs(self) -> dict[str, str]:
        """Integer inputs and their types."""
        inputs, outputs = self._session.input_types, self._session.output_types
        unknown = [name for name in inputs if name not in _PLAIN and not name.startswith(_STATE)]
        if _IDS not in inputs or _LOGITS not in outputs or unknown:
            raise self._no_decoder()
        shape = outputs[_LOGITS].shape
        if shape and len(shape) != 3:
            raise self._no_decoder(f"logits have the shape {list(shape)}")
        plain = {name: inputs[name].dtype for name in _PLAIN if name in inputs}
        odd = [f"{name} is {dtype}" for name, dtype in plain.items() if dtype not in _INTEGERS]
        fixed = [f"{name} takes {inputs[name].shape[-1]} tokens only" for name in plain if _is_fixed(inputs[name])]
        if odd or fixed:
            raise self._no_decoder(", ".join(odd + fixed))
        return plain

    def _cache_names(self) -> dict[str, str]:
        """Each input of the cache with the output that takes its place at the next token."""
        names = {name: present_of(name) for name in self._session.inputs if name.startswith(_STATE)}
        missing = [present for present in names.values() if present not in self._session.output_types]
        if missing:
            raise self._no_decoder(f"the cache has inputs without the outputs {', '.join(missing)}")
        return names

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
        found = why or f"it has the inputs {inputs} and the outputs {outputs}"
        return ModelError(
            f"The graph cannot generate text: {found}.",
            where=self._where,
            expected=_EXPECTED,
            hint="export it for the task text-generation with past, e.g. by optimum or onnxruntime-genai's builder",
        )


def _static(axis: int | str | None) -> bool:
    # An axis of 0 is how some exporters write an empty cache.
    return isinstance(axis, int) and axis > 0


def _is_fixed(kind: TensorType) -> bool:
    return len(kind.shape) != 2 or _static(kind.shape[-1])


def _summary(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


class GreedyDecoder(Protocol):
    """Generation of one sequence, always the likeliest token."""

    @property
    def cached(self) -> bool:
        """Whether a step costs one token's work, rather than the whole sequence's."""

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary; may be 0 before the first answer."""

    def prefill(self, ids: Sequence[int]) -> int:
        """Begin anew with ``ids``, one or more, and give the token that follows."""

    def step(self, token: int) -> int:
        """Append ``token`` and give the one that follows."""


class Written(NamedTuple):
    """Generated ``tokens``: the first came after ``first_ms``, all of them after ``all_ms``."""

    tokens: list[int]
    first_ms: float
    all_ms: float


@runtime_checkable
class WritesItself(Protocol):
    """A decoder whose runtime writes a text without being asked for each token, and is timed as it does."""

    def write(self, ids: Sequence[int], tokens: int) -> Written:
        """The likeliest ``tokens`` behind ``ids``, whichever ends a text."""


class ManyTexts(Protocol):
    """A language model whose runtime takes texts in as others end."""

    def write(self, begun: Sequence[np.ndarray], room: int, temperature: float | None, seed: int) -> list[np.ndarray]:
        """Ids behind each of ``begun``, at most as many as there is ``room``, up to the text's end, with it.

        The likeliest, or drawn at a ``temperature``; then ``seed`` says which. Raises `StageError`.
        """


def written_tokens(decoder: GreedyDecoder, ids: Sequence[int], most: int, ends: Collection[int]) -> Iterator[int]:
    """The likeliest tokens after ``ids``, one by one as they are asked for: ``most`` of them, or up to one of ``ends``.

    Raises what the decoder raises.
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
    """A session of a runtime that keeps keys and values by itself."""

    def decoder(self) -> GreedyDecoder:
        """A new generation."""


def open_decoder(session: Session, where: str) -> GreedyDecoder:
    """What generates with ``session``; ``where`` names the artifact. Raises `ModelError` for one that is no decoder."""
    return session.decoder() if isinstance(session, Generating) else Decoder(session, where)
