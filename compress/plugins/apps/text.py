"""Texts -> ids as an app does it: by the rule of the manifest, without transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.runtime import Batch
from compress.plugins.apps.app_type import Case, Inputs
from compress.plugins.apps.manifest import MODEL_FOLDER
from compress.plugins.apps.preprocess import Tokenize, TokenizePair, TokenizePrompt
from compress.plugins.apps.tokenizer_fallbacks import STAND_INS, stand_ins
from compress.utils.errors import BundleError, ModelError

_PROBE = "a"
FOREIGN = (
    "",
    "Ein schöner Film; das Ende überrascht!",
    "Прекрасный фильм 👍🏽",
    "这部电影非常好看。 映画は退屈だった。",
    "فيلم رائع बढ़िया फिल्म",
    "tabs\tand  spaces, 3.14 %, <b>tags</b> & naïve café: 👩‍👩‍👧 ok",
    "very " * 600 + "long",
)
"""What nobody's data holds: nothing at all, other scripts, emoji, and more than any model reads."""
_OPINIONS = (
    "A lovely, moving film with a clever plot.",
    "Dull, noisy and far too long.",
    "I don't know what to think of it.",
)
_QUESTION = (
    "How do I get my money back?",
    "Refunds are paid within five days.",
    "The parcel arrives on Friday.",
    "Our shop is closed on Sundays.",
    "You can change your password in the settings.",
    "The battery lasts about ten hours.",
    "Children under six travel free.",
)
"""And what may answer it."""
_MASK = "[MASK]"
_GAPS = (
    "The capital of France is [MASK].",
    "She opened the [MASK] and went in.",
    "I have not [MASK] him for years.",
)
_SENTENCES = (
    "The ship reached the harbour before the storm.",
    "He said that he would come tomorrow.",
    "In the beginning there was nothing at all.",
)
_NAMES = (
    "Ada Lovelace wrote to Charles Babbage in London.",
    "The European Union was founded in Maastricht.",
    "Nobody is named here.",
)
_IDS = 12


class TextCase(Case):
    """One text and the ids that it has."""

    text: str
    input_ids: tuple[int, ...]

    @property
    def shown(self) -> str:
        """Its beginning."""
        return repr(self.text[:40])


class TextRule:
    """The rule of a manifest over the tokenizer beside it."""

    def __init__(self, folder: Path, rule: Tokenize) -> None:
        self.rule = rule
        self.tokenizer = open_tokenizer(folder / rule.tokenizer)

    def ids(self, text: str) -> list[int]:
        """The ids of one text, at most ``max_length`` of them."""
        own = self.ids_of(text)
        room = self.rule.max_length - len(self.rule.prefix_ids) - len(self.rule.suffix_ids)
        return [*self.rule.prefix_ids, *own[:room], *self.rule.suffix_ids]

    def ids_of(self, text: str) -> list[int]:
        """A text's own ids, however many."""
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def feed(self, case: TextCase) -> Batch:
        """Ids and mask of one text, [1, tokens]."""
        row = np.array([self.ids(case.text)], dtype=np.int64)
        return {"input_ids": row, "attention_mask": np.ones_like(row)}

    def difference(self, case: TextCase) -> tuple[str, str] | None:
        """See `Preparation`."""
        return other_ids(self.ids(case.text), case)


def other_ids(ids: Sequence[int], case: TextCase) -> tuple[str, str] | None:
    """Ids here and in the case, where they differ."""
    known = case.input_ids
    return None if tuple(ids) == known else (f"ids {list(ids[:_IDS])}", f"{list(known[:_IDS])}")


def _find_rule(folder: Path, processor: Any, max_length: int) -> Tokenize:
    return find_tokenize(folder, f"{MODEL_FOLDER}/tokenizer.json", processor, max_length)


def find_tokenize(folder: Path, file: str, processor: Any, max_length: int) -> Tokenize:
    """The rule of a tokenizer of transformers whose tokenizer.json is ``file``. Raises `ModelError` for one without."""
    tokenizer = open_tokenizer(folder / file)
    own = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    whole = list(processor(_PROBE)["input_ids"])
    starts = [at for at in range(len(whole) - len(own) + 1) if whole[at : at + len(own)] == own]
    if not starts or getattr(processor, "truncation_side", "right") != "right":
        raise no_rule(folder, "its special tokens stand within the text, or it cuts texts at the beginning")
    prefix, suffix = whole[: starts[0]], whole[starts[0] + len(own) :]
    if len(prefix) + len(suffix) >= max_length:
        raise no_rule(folder, f"{max_length} tokens leave no room beside {len(prefix) + len(suffix)} special ones")
    return Tokenize(
        tokenizer=file,
        max_length=max_length,
        prefix_ids=tuple(prefix),
        suffix_ids=tuple(suffix),
        pad_id=processor.pad_token_id or 0,
    )


def _make_cases(
    built_in: Sequence[str], folder: Path, rule: Tokenize, samples: Sequence[str], processor: Any
) -> Sequence[TextCase]:
    """Of samples, which are texts, or else the ``built_in`` ones; less those without a token, which no model answers.

    A tokenizer that adds none of its own makes nothing of an empty text.
    """
    way, texts = TextRule(folder, rule), samples or built_in
    for text in texts:
        wanted = list(processor(text, truncation=True, max_length=rule.max_length)["input_ids"])
        if way.ids(text) != wanted:
            raise ModelError(
                f"The tokenizer cannot be described to an app: of {text[:60]!r} it makes {wanted[:_IDS]}, the rule "
                f"{way.ids(text)[:_IDS]}.",
                expected="special tokens before and after a text's own, as tokenizer.json alone gives them",
            )
    return [TextCase(text=text, input_ids=ids) for text in texts if (ids := tuple(way.ids(text)))]


def _make_word_cases(
    built_in: Sequence[str], folder: Path, rule: Tokenize, samples: Sequence[str], processor: Any
) -> Sequence[TextCase]:
    """Of texts whose words have labels. Raises `ModelError` where a text's tokens are not those of its words."""
    way, texts = TextRule(folder, rule), [" ".join(text.split()) for text in samples or built_in]
    for text in texts:
        alone = [way.ids_of(word if at == 0 else f" {word}") for at, word in enumerate(text.split(" ")) if word]
        if [one for ids in alone for one in ids] != way.ids_of(text):
            raise ModelError(
                f"The tokenizer cannot be described to an app: it cuts {text[:60]!r} otherwise than its words.",
                expected="a tokenizer that cuts words apart before anything else",
            )
    return _make_cases((), folder, rule, texts, processor)


def _make_masked_cases(
    built_in: Sequence[str], folder: Path, rule: Tokenize, samples: Sequence[str], processor: Any
) -> Sequence[TextCase]:
    """Of texts that have a mask; built-in ones get one in place of theirs, or before what they have."""
    mask = processor.mask_token
    own = [text.replace(_MASK, mask) if _MASK in text else f"{mask} {text}" for text in built_in]
    return _make_cases(own, folder, rule, samples, processor)


def more_for_page(folder: Path, rule: Tokenize | TokenizePair | TokenizePrompt) -> dict[str, bytes]:
    """Characters that a browser would class otherwise."""
    listed = stand_ins(open_tokenizer(folder / rule.tokenizer))
    return {STAND_INS: json.dumps(listed, separators=(",", ":")).encode()} if listed else {}


def short_texts(most: int, short: int, cases: Sequence[TextCase]) -> list[str]:
    """The first ``most`` texts of at most ``short`` characters."""
    return [case.text for case in cases if 0 < len(case.text) <= short][:most]


def open_tokenizer(path: Path) -> Any:
    """The tokenizer of a tokenizer.json, neither cutting nor padding. Raises `BundleError`."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise BundleError(
            "There is no tokenizer.json, which apps on every platform read.",
            where=str(path),
            hint="save the model with a fast tokenizer of transformers",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no other class
        raise BundleError(f"The tokenizer cannot be opened: {error}", where=str(path)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def no_rule(folder: Path, reason: str) -> ModelError:
    """The error for a tokenizer that no rule describes."""
    return ModelError(f"The tokenizer cannot be described to an app: {reason}.", where=str(folder))


def _texts(built_in: Sequence[str], most: int, short: int, make_cases: Callable[..., Any] = _make_cases) -> Inputs:
    return Inputs(
        plural="texts",
        folder="text",
        case=TextCase,
        meanings={"input_ids": "token ids, one text a row", "attention_mask": "1 for a token, 0 for padding"},
        required=frozenset({"input_ids"}),
        tokenizes=True,
        find_rule=_find_rule,
        open=TextRule,
        make_cases=partial(make_cases, built_in),
        shown=lambda cases: short_texts(most, short, cases) or ["Hello"],
        more_for_page=more_for_page,
    )


TEXTS = _texts((*_OPINIONS, *FOREIGN), most=3, short=60)
SOURCES = _texts((*_SENTENCES, *FOREIGN), most=3, short=120)
SENTENCES = _texts((*_QUESTION, *FOREIGN), most=len(_QUESTION), short=120)
WORDS = _texts((*_NAMES, *FOREIGN), most=3, short=120, make_cases=_make_word_cases)
MASKED_TEXTS = _texts((*_GAPS, *FOREIGN), most=3, short=120, make_cases=_make_masked_cases)
