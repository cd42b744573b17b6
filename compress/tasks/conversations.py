"""Conversations in running text: messages of a row, chat templates, and positions of the answers."""

from __future__ import annotations

import json
from typing import Any

from compress.utils.errors import DataError, first_line

_BEGINNING = '{"messages": [{'
_ROLES = ("system", "user", "assistant", "tool")
EXPECTED = "a string, or a list of messages with `role` and `content`"


def text_or_messages(value: Any) -> str | None:
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
            f"Nobody answers in a conversation of {len(messages)} messages.",
            expected="at least one message with the role `assistant` and a content",
            hint="take the row out, or give its answer the role `assistant`",
        )
    return json.dumps({"messages": messages}, ensure_ascii=False)


def _message(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise TypeError
    if value.get("role") not in _ROLES:
        raise DataError(f"A message has the role {value.get('role')!r}.", expected=f"one of {', '.join(_ROLES)}")
    return {"role": value["role"], "content": value["content"]}


def is_conversation(text: str) -> bool:
    """Return whether a row holds messages as `text_or_messages` writes them."""
    return text.startswith(_BEGINNING)


Spans = list[tuple[int, int]]


def rendered(text: str, processor: Any) -> tuple[str, Spans]:
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
        prefix, with_answer = (
            _applied(processor, messages[:index], opened=True),
            _applied(processor, messages[: index + 1]),
        )
        if not (with_answer.startswith(prefix) and whole.startswith(with_answer)):
            raise DataError(
                "The model's chat template changes messages once others follow, so that no answer has a place.",
                where="chat_template.jinja",
                expected="a template that adds each message to those before it",
                hint="cut each conversation into rows that end with an answer",
            )
        spans.append((len(prefix), len(with_answer)))
    return whole, spans


_QUESTION = "the question"
"""Placeholder of the user's message in a template."""


def asked(prompt: str, processor: Any) -> str:
    """Return a user's message in the chat template, up to the start of the answer. Raises `DataError`."""
    _check_template(processor, "Instructions are asked as a chat")
    return _applied(processor, [{"role": "user", "content": prompt}], opened=True)


def before_question(processor: Any) -> str:
    """Return the part of a chat template before a user's first message. Raises `DataError`."""
    _check_template(processor, "A question is to be made up")
    return _applied(processor, [{"role": "user", "content": _QUESTION}]).partition(_QUESTION)[0]


def has_template(processor: Any) -> bool:
    """Return whether the processor has a chat template."""
    return getattr(processor, "chat_template", None) is not None


def _check_template(processor: Any, why: str) -> None:
    if not has_template(processor):
        raise DataError(
            f"{why}, and the model's tokenizer has no chat template.",
            where="chat_template.jinja",
            expected="a template that says how the model's turns are written",
            hint="give the model's folder the chat_template.jinja of its family, or data of plain text",
        )


def _applied(processor: Any, messages: list[dict[str, str]], opened: bool = False) -> str:
    from jinja2 import TemplateError

    if not messages and not opened:
        return ""
    try:
        text: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(
            f"The model's chat template refuses a conversation: {first_line(error)}",
            where="chat_template.jinja",
            hint="give its messages the roles that the template takes, in the order that it takes them",
        ) from error
    return text
