"""Conversations among running text: a row's messages, a model's chat template, and where the answers stand."""

from __future__ import annotations

import json
from typing import Any

from compress.utils.errors import DataError, first_line

_BEGINNING = '{"messages": [{'
_ROLES = ("system", "user", "assistant", "tool")
EXPECTED = "a string, or a list of messages with `role` and `content`"


def text_or_messages(value: Any) -> str | None:
    """A row's text as it stands, or its messages as JSON; None for a blank one.

    Raises `TypeError` for what is neither, and `DataError` for a conversation in which nobody answers.
    """
    if isinstance(value, str):
        value.encode()
        return value if value.strip() else None
    messages = [_message(one) for one in value] if isinstance(value, list | tuple) else []
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
    """Whether a row holds messages, as `text_or_messages` writes them."""
    return text.startswith(_BEGINNING)


Spans = list[tuple[int, int]]


def rendered(text: str, processor: Any) -> tuple[str, Spans]:
    """A conversation in the chat template of ``processor``, and where its answers stand, with what ends their turns.

    An answer is what the template adds for it to the messages before and the opening of a turn. Raises `DataError` for
    a processor without a template, and for a template that writes a message otherwise once others follow.
    """
    _check_template(processor, "The text has conversations")
    messages = json.loads(text)["messages"]
    whole = _applied(processor, messages)
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, until = _applied(processor, messages[:place], opened=True), _applied(processor, messages[: place + 1])
        if not (until.startswith(before) and whole.startswith(until)):
            raise DataError(
                "The model's chat template changes messages once others follow, so that no answer has a place.",
                where="chat_template.jinja",
                expected="a template that adds each message to those before it",
                hint="cut each conversation into rows that end with an answer",
            )
        spans.append((len(before), len(until)))
    return whole, spans


_QUESTION = "the question"
"""Stands in a template for what is yet to be asked."""


def asked(prompt: str, processor: Any) -> str:
    """A user's message in the chat template of ``processor``, up to where the answer begins. Raises `DataError`."""
    _check_template(processor, "Instructions are asked as a chat")
    return _applied(processor, [{"role": "user", "content": prompt}], opened=True)


def before_question(processor: Any) -> str:
    """What a chat template has before a user's first message. Raises `DataError`."""
    _check_template(processor, "A question is to be made up")
    return _applied(processor, [{"role": "user", "content": _QUESTION}]).partition(_QUESTION)[0]


def has_template(processor: Any) -> bool:
    """Whether it says how a model's turns are written."""
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
        found: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(
            f"The model's chat template refuses a conversation: {first_line(error)}",
            where="chat_template.jinja",
            hint="give its messages the roles that the template takes, in the order that it takes them",
        ) from error
    return found
