"""Two texts -> ids of one input as an app does it: by the rule of the manifest, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress.bundle.kind import Case
from compress.bundle.manifest import MODEL_FOLDER
from compress.bundle.stand_ins import STAND_INS, stand_ins
from compress.bundle.steps import Preprocessing, TokenizePair
from compress.bundle.text import TextCase, no_rule, open_tokenizer
from compress.errors import InputError, ModelError
from compress.runtimes.runtime import Batch
from compress.targets import Language

_PROBES = ("a", "b")
_IDS = 12
_REFUND = (
    ("How do I get my money back?", "Refunds are paid within five days."),
    ("How do I get my money back?", "The parcel arrives on Friday."),
    ("How do I get my money back?", "Our shop is closed on Sundays."),
    ("How do I get my money back?", "Children under six travel free."),
)
_LONDON = (
    ("Where did she go?", "After the winter Mary went to London, where her brother lived."),
    ("Who lived in London?", "After the winter Mary went to London, where her brother lived."),
)
_FOREIGN = (
    ("Ein schöner Film?", "Прекрасный фильм 👍🏽"),
    ("这部电影好看吗?", "فيلم رائع बढ़िया फिल्म"),
    ("tabs\tand  spaces?", "3.14 %, <b>tags</b> & naïve café: 👩‍👩‍👧 ok"),
    ("How long is it?", "very " * 600 + "long"),
)
"""What nobody's data holds: other scripts, emoji, and more than any model reads."""


class PairCase(TextCase):
    """Two texts and the ids that they have as one input."""

    pair: str


class PairRule:
    """The rule of a manifest over the tokenizer beside it."""

    def __init__(self, folder: Path, rule: TokenizePair) -> None:
        self.rule = rule
        self.tokenizer = open_tokenizer(folder / rule.tokenizer)

    def ids_of(self, text: str) -> list[int]:
        """A text's own ids, however many."""
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def row(self, text: str, pair: str) -> tuple[list[int], list[int]]:
        """The ids of both as one input, and 1 for those of the second, with what stands behind it."""
        rule = self.rule
        first, second = self.ids_of(text), self.ids_of(pair)
        room = rule.max_length - len(rule.prefix_ids) - len(rule.middle_ids) - len(rule.suffix_ids)
        first, second = cut(first, second, room, rule.truncation)
        head = [*rule.prefix_ids, *first, *rule.middle_ids]
        tail = [*second, *rule.suffix_ids]
        return head + tail, [0] * len(head) + [1] * len(tail)

    def feed(self, case: PairCase) -> Batch:
        """Ids, mask and token types of one pair, [1, tokens]."""
        ids, types = (np.array([row], dtype=np.int64) for row in self.row(case.text, case.pair))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": types}

    def difference(self, case: PairCase) -> tuple[str, str] | None:
        """Its ids here and in the case, where they differ."""
        ids, _ = self.row(case.text, case.pair)
        if ids == list(case.input_ids):
            return None
        return f"ids {ids[:_IDS]}", f"{list(case.input_ids[:_IDS])}"


def cut(first: list[int], second: list[int], room: int, truncation: str) -> tuple[list[int], list[int]]:
    """Both within ``room`` tokens, cut at their ends: the second alone, or the longer one until they are alike."""
    if len(first) + len(second) <= room:
        return first, second
    if truncation == "only-second":
        return first, second[: max(room - len(first), 0)]
    short = min(len(first), len(second))
    one = short if 2 * short <= room else room // 2
    keep = (one, room - one) if len(first) <= len(second) else (room - one, one)
    return first[: keep[0]], second[: keep[1]]


class _Pairs:
    """One pair of texts after the other."""

    many = "pairs of texts"
    folder = "pair"
    case: type[Case] = PairCase
    meanings: Mapping[str, str] = {
        "input_ids": "token ids, two texts a row",
        "attention_mask": "1 for a token, 0 for padding",
        "token_type_ids": "0 for the first text, 1 for the second",
    }
    required = frozenset({"input_ids"})
    tokenizes = True

    def __init__(self, samples: Sequence[tuple[str, str]], truncation: Literal["longest-first", "only-second"]) -> None:
        self.samples, self.truncation = samples, truncation

    def find_rule(self, folder: Path, processor: Any, max_length: int) -> Preprocessing:
        """See `Inputs`."""
        file = f"{MODEL_FOLDER}/tokenizer.json"
        tokenizer = open_tokenizer(folder / file)
        whole, at = list(processor(*_PROBES)["input_ids"]), 0
        parts = []
        for probe in _PROBES:
            own = tokenizer.encode(probe, add_special_tokens=False).ids
            starts = [place for place in range(at, len(whole) - len(own) + 1) if whole[place : place + len(own)] == own]
            if not starts:
                raise no_rule(folder, "its special tokens stand within a text")
            parts.append(tuple(whole[at : starts[0]]))
            at = starts[0] + len(own)
        if sum(map(len, parts)) + len(whole[at:]) >= max_length:
            raise no_rule(folder, f"{max_length} tokens leave no room beside the special ones")
        return TokenizePair(
            tokenizer=file,
            max_length=max_length,
            prefix_ids=parts[0],
            middle_ids=parts[1],
            suffix_ids=tuple(whole[at:]),
            truncation=self.truncation,
            pad_id=processor.pad_token_id or 0,
        )

    def open(self, folder: Path, rule: Preprocessing) -> PairRule:
        """See `Inputs`."""
        assert isinstance(rule, TokenizePair)
        return PairRule(folder, rule)

    def make_cases(
        self, folder: Path, rule: Preprocessing, samples: Sequence[str], processor: Any
    ) -> Sequence[PairCase]:
        """See `Inputs`. A sample is two texts with a tab between."""
        way, cases = self.open(folder, rule), []
        for text, pair in [_split(sample) for sample in samples] or [*self.samples, *_FOREIGN]:
            ids, types = way.row(text, pair)
            asked = {"truncation": way.rule.truncation.replace("-", "_"), "max_length": way.rule.max_length}
            wanted = processor(text, pair, **asked)
            if ids != list(wanted["input_ids"]) or types != list(wanted.get("token_type_ids", types)):
                raise ModelError(
                    f"The tokenizer cannot be described to an app: of {text[:30]!r} and {pair[:30]!r} it makes "
                    f"{list(wanted['input_ids'])[:_IDS]}, the rule {ids[:_IDS]}.",
                    expected="special tokens before, between and after both texts' own",
                )
            cases.append(PairCase(text=text, pair=pair, input_ids=tuple(ids)))
        return cases

    def more_for_page(self, folder: Path, rule: Preprocessing) -> dict[str, bytes]:
        """Characters that a browser would class otherwise."""
        listed = stand_ins(self.open(folder, rule).tokenizer)
        return {STAND_INS: json.dumps(listed, separators=(",", ":")).encode()} if listed else {}

    def helpers(self, languages: Sequence[Language]) -> tuple[str, ...]:
        """None."""
        return ()

    def in_page(self, rule: Preprocessing, cases: Sequence[PairCase]) -> dict[str, str]:
        """The tokenizer, a first text and what goes with it, one a line."""
        assert isinstance(rule, TokenizePair)
        first = cases[0].text
        others = [" ".join(case.pair.split()) for case in cases if case.text == first]
        return {"tokenizer": escape(rule.tokenizer), "first": escape(first), "others": escape("\n".join(others))}

    def in_code(self, rule: Preprocessing) -> dict[str, str]:
        """Nothing: there are no examples for phones."""
        return {}

    def in_words(self, rule: Preprocessing) -> tuple[str, str]:
        """See `Inputs`."""
        assert isinstance(rule, TokenizePair)
        which = "the second is" if rule.truncation == "only-second" else "the longer one is"
        return "A pair of texts", f"Of pairs of more than {rule.max_length} tokens {which} cut off at its end."


def _split(sample: str) -> tuple[str, str]:
    text, tab, pair = sample.partition("\t")
    if not tab:
        raise InputError(f"The sample {sample[:40]!r} is one text.", expected="two texts with a tab between them")
    return text, pair


RANKED = _Pairs(_REFUND, "longest-first")
ASKED = _Pairs(_LONDON, "only-second")
