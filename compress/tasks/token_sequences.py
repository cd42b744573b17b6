"""Conversations in running text: messages of a row, chat templates, and positions of the answers.

A word may be split into several tokens. Labels belong to its first token; the others are ignored in the loss.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.models.chat_template import apply_chat_template
from compress.tasks.lazy_modules import np, pa
from compress.utils.errors import DataError

if TYPE_CHECKING:
    from compress.models.model import Processor

_BEGINNING = '{"messages": [{'
_ROLES = ("system", "user", "assistant", "tool")
EXPECTED = "a string, or a list of messages with `role` and `content`"


def text_or_messages(value: object) -> str | None:
    """Return a row's text, or its messages as JSON, or None for a blank row.

    Raises `TypeError` for anything else, and `DataError` for a conversation without an answer.
    """
    if isinstance(value, str):
        value.encode()
        return value if value.strip() else None
    messages = [_message(item) for item in value] if isinstance(value, list | tuple) else []
    if not messages:
        raise TypeError
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise DataError(
            f"There is no assistant message in a conversation of {len(messages)} messages.",
            expected="at least one message with the role `assistant` and a content",
            hint="remove the row, or give its answer the role `assistant`",
        )
    return json.dumps({"messages": messages}, ensure_ascii=False)


def _message(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise TypeError
    if value.get("role") not in _ROLES:
        raise DataError(f"A message has the role {value.get('role')!r}.", expected=f"one of {', '.join(_ROLES)}")
    return {"role": value["role"], "content": value["content"]}


def is_conversation(text: str) -> bool:
    """Return whether a row holds messages as `text_or_messages` writes them."""
    return text.startswith(_BEGINNING)


Spans = list[tuple[int, int]]


def rendered(text: str, processor: Processor) -> tuple[str, Spans]:
    """Return a conversation in the chat template of ``processor``, and the spans of its answers with their end tokens.

    An answer is the text that the template adds after the generation prompt of the preceding messages. Raises
    `DataError` for a processor without a template, and for a template that changes earlier messages.
    """
    _check_template(processor, "The text has conversations")
    messages = json.loads(text)["messages"]
    whole = _applied(processor, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prefix = _applied(processor, messages[:index], opened=True)
        with_answer = _applied(processor, messages[: index + 1])
        if not (with_answer.startswith(prefix) and whole.startswith(with_answer)):
            raise DataError(
                "The model's chat template changes earlier messages when others follow, so answers cannot be located.",
                where="chat_template.jinja",
                expected="a template that appends each message unchanged",
                hint="cut each conversation into rows that end with an answer",
            )
        spans.append((len(prefix), len(with_answer)))
    return whole, spans


_QUESTION = "the question"
"""Placeholder of the user's message in a template."""


def render_question(prompt: str, processor: Processor) -> str:
    """Return a user's message in the chat template, up to the start of the answer. Raises `DataError`."""
    _check_template(processor, "Instructions are asked as a chat")
    return _applied(processor, [{"role": "user", "content": prompt}], opened=True)


def before_question(processor: Processor) -> str:
    """Return the part of a chat template before a user's first message. Raises `DataError`."""
    _check_template(processor, "A question is to be made up")
    return _applied(processor, [{"role": "user", "content": _QUESTION}]).partition(_QUESTION)[0]


def has_template(processor: Processor) -> bool:
    """Return whether the processor has a chat template."""
    return getattr(processor, "chat_template", None) is not None


def _check_template(processor: Processor, why: str) -> None:
    if not has_template(processor):
        raise DataError(
            f"{why}, and the model's tokenizer has no chat template.",
            where="chat_template.jinja",
            expected="a template that defines the format of the model's turns",
            hint="give the model's folder the chat_template.jinja of its family, or data of plain text",
        )


def _applied(processor: Processor, messages: list[dict[str, str]], opened: bool = False) -> str:
    if not messages and not opened:
        return ""
    return apply_chat_template(processor, messages, add_generation_prompt=opened)


SEPARATOR = "\n\n"
"""Blank line between two rows. It occurs in every model's training text, unlike an instruct model's end token."""


def token_ids(rows: pa.Table, processor: Processor) -> np.ndarray:
    """Return the rows' texts as one sequence of tokens, joined by blank lines, without special tokens.

    Conversations are rendered with the processor's chat template. Raises `DataError` if it has none.
    """
    return np.array(_plain(_text(rows, processor), processor)["input_ids"], dtype=np.int64)


def _text(rows: pa.Table, processor: Processor) -> str:
    texts = rows["text"].to_pylist()
    return SEPARATOR.join(rendered(text, processor)[0] if is_conversation(text) else text for text in texts)


@dataclass(frozen=True)
class Reading:
    """Tokenized running text: ``ids`` [n], and the first byte of each token with the end of the text, [n + 1].

    A token that is part of a character begins where the character does.
    """

    ids: np.ndarray
    starts: np.ndarray
    text: str


def read(rows: pa.Table, processor: Processor) -> Reading | None:
    """Return the rows' texts as `token_ids` reads them, or None if the tokenizer does not report offsets."""
    if not getattr(processor, "is_fast", False):
        return None
    text = _text(rows, processor)
    encoded = _plain(text, processor, return_offsets_mapping=True)
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    # Offsets count characters; convert them to bytes of UTF-8.
    widths = 1 + np.searchsorted([0x80, 0x800, 0x10000], characters, side="right")  # bytes in UTF-8
    byte_offsets = np.concatenate([[0], np.cumsum(widths)])
    starts = np.maximum.accumulate([*(start for start, _ in encoded["offset_mapping"]), len(text)])
    return Reading(np.array(encoded["input_ids"], dtype=np.int64), byte_offsets[starts], text)


def learned_tokens(rows: pa.Table, processor: Processor, end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows as one sequence of tokens [n], and which tokens are trained on [n].

    In running text all tokens are; in conversations only those of the answers. ``end`` follows each text, or a blank
    line if it is None; a conversation ends as its template does. Raises `DataError`.
    """
    texts = rows["text"].to_pylist()
    if end is None and not any(map(is_conversation, texts)):
        joined = token_ids(rows, processor)
        return joined, np.ones(len(joined), bool)
    plain = [text for text in texts if not is_conversation(text)]
    tokenized = iter(_plain(plain, processor)["input_ids"] if plain else ())
    between = [end] if end is not None else _plain(SEPARATOR, processor)["input_ids"]
    ids: list[int] = []
    learned: list[bool] = []
    for text in texts:
        if is_conversation(text):
            # A token is learned if it starts inside an answer.
            whole, spans = rendered(text, processor)
            encoded = _plain(whole, processor, return_offsets_mapping=True)
            row_ids = encoded["input_ids"]
            is_learned = [any(low <= start < high for low, high in spans) for start, _ in encoded["offset_mapping"]]
        else:
            row_ids = [*next(tokenized), *between]
            is_learned = [True] * len(row_ids)
        ids += row_ids
        learned += is_learned
    return np.array(ids, dtype=np.int64), np.array(learned, dtype=bool)


def _plain(text: str | list[str], processor: Processor, **options: Any) -> Any:
    return processor(text, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)


def prefix_tokens(processor: Processor) -> list[int]:
    """Return the special tokens that the processor puts before a text, such as Llama's `<s>`."""
    special = set(processor.all_special_ids)
    return list(itertools.takewhile(special.__contains__, processor("a", verbose=False)["input_ids"]))


def cut(ids: np.ndarray, first: Sequence[int], length: int, stride: int | None = None) -> list[np.ndarray]:
    """Return sequences of ``length`` tokens that begin with ``first``, one every ``stride`` tokens or without overlap.

    Tokens at the end that do not fill a sequence are dropped.

    Args:
        ids: Tokens [n].
        first: Special tokens at the start of each sequence.
        length: Tokens per sequence, ``first`` included.
        stride: Distance between the starts of two sequences.
    """
    body = length - len(first)
    starts = range(0, len(ids) - body + 1, stride or body)
    head = np.array(first, dtype=np.int64)
    return [np.concatenate([head, ids[start : start + body]]) for start in starts]


def spread(count: int, wanted: int) -> list[int]:
    """Return ``wanted`` indices below ``count``, evenly spaced from first to last, or all if there are fewer."""
    if wanted >= count:
        return list(range(count))
    return [round(position) for position in np.linspace(0, count - 1, wanted)] if wanted > 1 else [count // 2]
