"""Running text as windows of tokens, each of the same length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

SEPARATOR = "\n\n"
"""Between two rows: a blank line is in every model's training text, where an instruct model's end token is a turn's."""


def token_ids(rows: pa.Table, processor: Any) -> np.ndarray:
    """The rows' texts as one sequence of tokens, blank lines between, without the tokens that frame a text."""
    import numpy as np

    text = SEPARATOR.join(rows["text"].to_pylist())
    encoded = processor(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return np.array(encoded["input_ids"], dtype=np.int64)


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
