"""Texts -> ids as an app does it: by the rule of the manifest, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from compress.bundle.kind import Case
from compress.bundle.manifest import MODEL_FOLDER
from compress.bundle.stand_ins import STAND_INS, stand_ins
from compress.bundle.steps import Preprocessing, Tokenize
from compress.errors import BundleError, ModelError
from compress.runtimes.runtime import Batch
from compress.targets import Language

_PROBE = "a"
_FOREIGN = (
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
        """Its ids here and in the case, where they differ."""
        ids = self.ids(case.text)
        if ids == list(case.input_ids):
            return None
        return f"ids {ids[:_IDS]}", f"{list(case.input_ids[:_IDS])}"


class _Texts:
    """One text after the other."""

    many = "texts"
    folder = "text"
    case: type[Case] = TextCase
    meanings: Mapping[str, str] = {
        "input_ids": "token ids, one text a row",
        "attention_mask": "1 for a token, 0 for padding",
    }
    required = frozenset({"input_ids"})
    tokenizes = True

    def __init__(self, samples: Sequence[str], shown: int, short: int) -> None:
        """``samples`` are the built-in ones; the first ``shown`` of at most ``short`` characters are in the page."""
        self.samples, self.shown, self.short = samples, shown, short

    def find_rule(self, folder: Path, processor: Any, max_length: int) -> Preprocessing:
        """See `Inputs`."""
        return find_rule(folder, f"{MODEL_FOLDER}/tokenizer.json", processor, max_length)

    def open(self, folder: Path, rule: Preprocessing) -> TextRule:
        """See `Inputs`."""
        assert isinstance(rule, Tokenize)
        return TextRule(folder, rule)

    def make_cases(
        self, folder: Path, rule: Preprocessing, samples: Sequence[str], processor: Any
    ) -> Sequence[TextCase]:
        """See `Inputs`. A sample is a text."""
        way, texts = self.open(folder, rule), samples or self.samples
        check_rule(way, texts, processor)
        return [TextCase(text=text, input_ids=tuple(way.ids(text))) for text in texts]

    def more_for_page(self, folder: Path, rule: Preprocessing) -> dict[str, bytes]:
        """Characters that a browser would class otherwise."""
        listed = stand_ins(self.open(folder, rule).tokenizer)
        return {STAND_INS: json.dumps(listed, separators=(",", ":")).encode()} if listed else {}

    def helpers(self, languages: Sequence[Language]) -> tuple[str, ...]:
        """None."""
        return ()

    def in_page(self, rule: Preprocessing, cases: Sequence[TextCase]) -> dict[str, str]:
        """The tokenizer, and short texts to try."""
        assert isinstance(rule, Tokenize)
        shown = [case.text for case in cases if 0 < len(case.text) <= self.short][: self.shown] or ["Hello"]
        buttons = (f'<button type="button" class="example">{escape(text)}</button>' for text in shown)
        return {
            "tokenizer": escape(rule.tokenizer),
            "first": escape(shown[0]),
            "examples": "\n".join(buttons),
            "others": escape("\n".join(" ".join(text.split()) for text in shown[1:])),
        }

    def in_code(self, rule: Preprocessing) -> dict[str, str]:
        """The rule."""
        assert isinstance(rule, Tokenize)
        return {
            "prefix": ", ".join(map(str, rule.prefix_ids)),
            "suffix": ", ".join(map(str, rule.suffix_ids)),
            "max_length": str(rule.max_length),
            "tokenizer": rule.tokenizer,
        }

    def in_words(self, rule: Preprocessing) -> tuple[str, str]:
        """See `Inputs`."""
        assert isinstance(rule, Tokenize)
        return "A text", f"Texts of more than {rule.max_length} tokens are cut off at the end."


class _Words(_Texts):
    """Texts whose words have labels."""

    def make_cases(
        self, folder: Path, rule: Preprocessing, samples: Sequence[str], processor: Any
    ) -> Sequence[TextCase]:
        """See `Inputs`. Raises `ModelError` where a text's tokens are not those of its words."""
        texts = [" ".join(text.split()) for text in samples or self.samples]
        way = self.open(folder, rule)
        for text in texts:
            alone = [way.ids_of(word if at == 0 else f" {word}") for at, word in enumerate(text.split(" ")) if word]
            if [one for ids in alone for one in ids] != way.ids_of(text):
                raise ModelError(
                    f"The tokenizer cannot be described to an app: it cuts {text[:60]!r} otherwise than its words.",
                    expected="a tokenizer that cuts words apart before anything else",
                )
        return super().make_cases(folder, rule, texts, processor)


class _MaskedTexts(_Texts):
    """Texts that have a mask; the built-in ones get one in place of theirs, or before what they have."""

    def make_cases(
        self, folder: Path, rule: Preprocessing, samples: Sequence[str], processor: Any
    ) -> Sequence[TextCase]:
        """See `Inputs`."""
        mask = processor.mask_token
        own = (text.replace(_MASK, mask) if _MASK in text else f"{mask} {text}" for text in self.samples)
        return super().make_cases(folder, rule, samples or tuple(own), processor)


TEXTS = _Texts((*_OPINIONS, *_FOREIGN), shown=3, short=60)
WORDS = _Words((*_NAMES, *_FOREIGN), shown=3, short=120)
MASKED_TEXTS = _MaskedTexts((*_GAPS, *_FOREIGN), shown=3, short=120)
SENTENCES = _Texts((*_QUESTION, *_FOREIGN), shown=len(_QUESTION), short=120)


def find_rule(folder: Path, file: str, processor: Any, max_length: int) -> Tokenize:
    """The rule by which an app gets the ids that ``processor``, a transformers tokenizer, gives.

    ``file`` is the tokenizer's path below ``folder``. Raises `ModelError` where no such rule holds.
    """
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


def check_rule(rule: TextRule, texts: Sequence[str], processor: Any) -> None:
    """Raises `ModelError` where transformers gives other ids for one of ``texts`` than the rule does."""
    for text in texts:
        wanted = list(processor(text, truncation=True, max_length=rule.rule.max_length)["input_ids"])
        if rule.ids(text) != wanted:
            raise ModelError(
                f"The tokenizer cannot be described to an app: of {text[:60]!r} it makes {wanted[:_IDS]}, the rule "
                f"{rule.ids(text)[:_IDS]}.",
                expected="special tokens before and after a text's own, as tokenizer.json alone gives them",
            )


def open_tokenizer(path: Path) -> Any:
    """The tokenizer of a tokenizer.json, neither cutting nor padding. Raises `BundleError`."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise BundleError(
            "There is no tokenizer.json, which apps on every platform read.",
            where=str(path),
            mend="save the model with a fast tokenizer of transformers",
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
