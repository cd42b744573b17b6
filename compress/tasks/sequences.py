"""Running text as windows of tokens, each of the same length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.tasks.conversations import is_conversation, rendered

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

SEPARATOR = "\n\n"
"""Between two rows: a blank line is in every model's training text, where an instruct model's end token is a turn's."""


def token_ids(rows: pa.Table, processor: Any) -> np.ndarray:
    """The rows' texts as one sequence of tokens, blank lines between, without the tokens that frame a text.

    Conversations are written as the processor's chat template has them. Raises `DataError` where it has none.
    """
    import numpy as np

    return np.array(_plain(_text(rows, processor), processor)["input_ids"], dtype=np.int64)


def _text(rows: pa.Table, processor: Any) -> str:
    texts = rows["text"].to_pylist()
    return SEPARATOR.join(rendered(text, processor)[0] if is_conversation(text) else text for text in texts)


@dataclass(frozen=True)
class Reading:
    """Running text as a tokenizer reads it: ``ids`` [n], and the byte at which each begins, [n + 1] with the end's.

    A token that is a part of a character begins where the character does. ``text`` is what was read.
    """

    ids: np.ndarray
    starts: np.ndarray
    text: str


def read(rows: pa.Table, processor: Any) -> Reading | None:
    """The rows' texts as `token_ids` has them; None of a tokenizer that doesn't say where tokens begin."""
    import numpy as np

    if not getattr(processor, "is_fast", False):
        return None
    text = _text(rows, processor)
    encoded = _plain(text, processor, return_offsets_mapping=True)
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + np.searchsorted([0x80, 0x800, 0x10000], characters, side="right")  # bytes in UTF-8
    places = np.concatenate([[0], np.cumsum(widths)])
    starts = np.maximum.accumulate([*(start for start, _ in encoded["offset_mapping"]), len(text)])
    return Reading(np.array(encoded["input_ids"], dtype=np.int64), places[starts], text)


def learned_tokens(rows: pa.Table, processor: Any, end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The rows one behind the other as tokens [n], and which of these are to be foretold [n].

    Those of running text all are, and those of conversations that stand in an answer. The token ``end`` stands behind
    each text, or a blank line where it is None; a conversation ends as its template has it. Raises `DataError`.
    """
    import numpy as np

    texts = rows["text"].to_pylist()
    if end is None and not any(map(is_conversation, texts)):
        joined = token_ids(rows, processor)
        return joined, np.ones(len(joined), bool)
    plain = [text for text in texts if not is_conversation(text)]
    read = iter(_plain(plain, processor)["input_ids"] if plain else ())
    between = [end] if end is not None else _plain(SEPARATOR, processor)["input_ids"]
    ids: list[int] = []
    counted: list[bool] = []
    for text in texts:
        if is_conversation(text):
            found, told = _conversation(text, processor)
        else:
            found = [*next(read), *between]
            told = [True] * len(found)
        ids += found
        counted += told
    return np.array(ids, dtype=np.int64), np.array(counted, dtype=bool)


def _conversation(text: str, processor: Any) -> tuple[list[int], list[bool]]:
    whole, spans = rendered(text, processor)
    encoded = _plain(whole, processor, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], [any(low <= start < high for low, high in spans) for start in starts]


def _plain(text: str | list[str], processor: Any, **options: Any) -> Any:
    return processor(text, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)


def opening(processor: Any) -> list[int]:
    """The special tokens that the processor puts before a text, such as Llama's `<s>`."""
    special = set(processor.all_special_ids)
    return list(itertools.takewhile(special.__contains__, processor("a", verbose=False)["input_ids"]))


def cut(ids: np.ndarray, first: Sequence[int], length: int, stride: int | None = None) -> list[np.ndarray]:
    """Windows of ``length`` tokens, each beginning with ``first``; every ``stride`` tokens, or sharing none.

    What is left at the end and fills no window is left out.
    """
    import numpy as np

    body = length - len(first)
    starts = range(0, len(ids) - body + 1, stride or body)
    head = np.array(first, dtype=np.int64)
    return [np.concatenate([head, ids[start : start + body]]) for start in starts]


def spread(count: int, wanted: int) -> list[int]:
    """``wanted`` of the places 0 to ``count`` - 1, evenly spread from the first to the last; all if they are fewer."""
    import numpy as np

    if wanted >= count:
        return list(range(count))
    return [round(place) for place in np.linspace(0, count - 1, wanted)] if wanted > 1 else [count // 2]
