"""A message -> the ids that a model continues: by the rule of the manifest, without transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.runtime import Batch
from compress.plugins.apps.app_type import Inputs
from compress.plugins.apps.chat import longest_text
from compress.plugins.apps.manifest import MODEL_FOLDER
from compress.plugins.apps.preprocess import Prompt
from compress.plugins.apps.text import TEXTS, TextCase, open_tokenizer, other_ids, short_texts
from compress.plugins.apps.tokenizer_fallbacks import for_page
from compress.utils.errors import InputError, ModelError

_PROBE = "zq8message8qz"
_TODAY = "strftime_now"
_MESSAGES = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "",
    "  Leave my spaces\tand\n\nlines alone: 3.14 %,  ½, <b>tags</b> & {{ braces }} \n",
    "Wie heißt die Hauptstadt von Österreich?",
    "Какая сегодня погода? 👍🏽 👩‍👩‍👧",
    "写一句关于春天的话。 猫は何を食べますか。",
    "ما هي العاصمة؟ भारत की राजधानी क्या है?",
)
"""Questions, nothing at all, what a template may not change, other scripts and emoji."""
_SHOWN, _SHORT, _IDS = 3, 60, 12


class PromptRule:
    """The rule of a manifest over the tokenizer beside it."""

    def __init__(self, folder: Path, rule: Prompt) -> None:
        self.rule = rule
        self._tokenizer = open_tokenizer(folder / rule.tokenizer)

    def ids(self, message: str) -> list[int]:
        """The ids of a message's prompt."""
        text = f"{self.rule.before}{message}{self.rule.after}"
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=self.rule.add_special_tokens).ids
        return ids

    def fits(self, ids: Sequence[int]) -> bool:
        """Return True if a prompt is neither empty nor too long."""
        return 0 < len(ids) <= self.rule.max_length

    def feed(self, case: TextCase) -> Batch:
        """The ids, [1, tokens]."""
        return {"input_ids": np.array([self.ids(case.text)], dtype=np.int64)}

    def difference(self, case: TextCase) -> tuple[str, str] | None:
        """See `Preparation`."""
        ids = self.ids(case.text)
        if not self.fits(ids):
            return f"{len(ids)} ids", f"1 to {self.rule.max_length}"
        return other_ids(ids, case)


def _find_rule(folder: Path, processor: Any, max_length: int) -> Prompt:
    """That the rule holds for other messages, `_make_cases` proves."""
    file = f"{MODEL_FOLDER}/tokenizer.json"
    max_length = min(max_length, longest_text(folder / MODEL_FOLDER) - 1)
    template = getattr(processor, "chat_template", None)
    if not template:
        return Prompt(tokenizer=file, before="", after="", add_special_tokens=True, max_length=max_length)
    if _TODAY in str(template):
        raise _no_rule("it puts today's date into a prompt")
    before, *after = rendered(processor, _PROBE).split(_PROBE)
    if len(after) != 1:
        raise _no_rule(f"a message stands in it {len(after)} times")
    return Prompt(tokenizer=file, before=before, after=after[0], add_special_tokens=False, max_length=max_length)


def _make_cases(folder: Path, rule: Prompt, samples: Sequence[str], processor: Any) -> Sequence[TextCase]:
    """Of samples, which are messages; of the built-in ones those are taken that fit."""
    way = PromptRule(folder, rule)
    for message in (*_MESSAGES, *samples):
        check_rule(way, message, processor)
    cases = [TextCase(text=text, input_ids=tuple(way.ids(text))) for text in samples or _MESSAGES]
    fitting = [case for case in cases if way.fits(case.input_ids)]
    if not fitting or (samples and len(fitting) < len(cases)):
        case = next(case for case in cases if not way.fits(case.input_ids))
        raise InputError(
            f"A prompt has {len(case.input_ids)} tokens: that of {case.text[:60]!r}.",
            expected=f"1 to {rule.max_length} tokens, of which {len(way.ids('x')) - 1} belong to the template",
            hint="name shorter messages with --sample, or raise data.max_length of the recipe",
        )
    return fitting


def _more_for_page(folder: Path, rule: Prompt) -> dict[str, bytes]:
    """Its tokenizer, where JavaScript would read that otherwise."""
    found = json.loads((folder / rule.tokenizer).read_text(encoding="utf-8"))
    made = for_page(found)
    same = made == found
    return {} if same else {rule.tokenizer: json.dumps(made, ensure_ascii=False, separators=(",", ":")).encode()}


PROMPTS = Inputs(
    plural="messages",
    folder="prompt",
    case=TextCase,
    meanings={**TEXTS.meanings, "position_ids": "the place of each token"},
    required=TEXTS.required,
    tokenizes=True,
    find_rule=_find_rule,
    open=PromptRule,
    make_cases=_make_cases,
    shown=partial(short_texts, _SHOWN, _SHORT),
    more_for_page=_more_for_page,
)


def rendered(processor: Any, message: str) -> str:
    """The prompt of one message, by the tokenizer's chat template. Raises `ModelError` for one that fails."""
    from jinja2.exceptions import TemplateError

    talk = [{"role": "user", "content": message}]
    try:
        return str(processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError) as error:
        raise _no_rule(f"it fails for {message[:60]!r}: {error}") from error


def check_rule(way: PromptRule, message: str, processor: Any) -> None:
    """Raises `ModelError` where transformers makes another prompt of ``message`` than the rule does, or other ids."""
    rule = way.rule
    if not rule.add_special_tokens:
        text = rendered(processor, message)
        if text != f"{rule.before}{message}{rule.after}":
            raise _no_rule(f"of {message[:60]!r} it makes {text[-200:]!r}")
        wanted = list(processor(text, add_special_tokens=False)["input_ids"])
    else:
        wanted = list(processor(message)["input_ids"])
    if way.ids(message) != wanted:
        raise ModelError(
            f"The tokenizer cannot be described to an app: of {message[:60]!r} it makes {wanted[:_IDS]}, its "
            f"tokenizer.json alone {way.ids(message)[:_IDS]}.",
            expected="ids as tokenizer.json alone gives them",
        )


def _no_rule(reason: str) -> ModelError:
    return ModelError(
        f"The chat template cannot be described to an app: {reason}.",
        expected="a fixed text before a message and another behind it, the message itself unchanged",
        hint="save the tokenizer with such a chat_template, or hand over the model's folder itself",
    )
