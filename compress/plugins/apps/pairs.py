"""Two texts -> ids of one input as an app does it: by the rule of the manifest, without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress.formats.runtime import Batch
from compress.plugins.apps.app_type import Inputs
from compress.plugins.apps.manifest import MODEL_FOLDER
from compress.plugins.apps.preprocess import TokenizePair
from compress.plugins.apps.text import TextCase, more_for_page, no_rule, open_tokenizer, other_ids
from compress.utils.errors import InputError, ModelError

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

    def row(self, text: str, pair: str) -> tuple[list[int], list[int]]:
        """The ids of both as one input, and 1 for those of the second, with what stands behind it."""
        rule = self.rule
        first, second = (self.tokenizer.encode(one, add_special_tokens=False).ids for one in (text, pair))
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
        """See `Preparation`."""
        return other_ids(self.row(case.text, case.pair)[0], case)


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


Truncation = Literal["longest-first", "only-second"]


def _find_rule(truncation: Truncation, folder: Path, processor: Any, max_length: int) -> TokenizePair:
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
        truncation=truncation,
        pad_id=processor.pad_token_id or 0,
    )


def _make_cases(
    built_in: Sequence[tuple[str, str]], folder: Path, rule: TokenizePair, samples: Sequence[str], processor: Any
) -> Sequence[PairCase]:
    """Of samples, each two texts with a tab between, or else the ``built_in`` ones."""
    way, cases = PairRule(folder, rule), []
    for text, pair in [_split(sample) for sample in samples] or built_in:
        ids, types = way.row(text, pair)
        wanted = processor(text, pair, truncation=rule.truncation.replace("-", "_"), max_length=rule.max_length)
        if ids != list(wanted["input_ids"]) or types != list(wanted.get("token_type_ids", types)):
            raise ModelError(
                f"The tokenizer cannot be described to an app: of {text[:30]!r} and {pair[:30]!r} it makes "
                f"{list(wanted['input_ids'])[:_IDS]}, the rule {ids[:_IDS]}.",
                expected="special tokens before, between and after both texts' own",
            )
        cases.append(PairCase(text=text, pair=pair, input_ids=tuple(ids)))
    return cases


def _shown(cases: Sequence[PairCase]) -> list[str]:
    """A first text and what goes with it."""
    return [cases[0].text, *(case.pair for case in cases if case.text == cases[0].text)]


def _split(sample: str) -> tuple[str, str]:
    text, tab, pair = sample.partition("\t")
    if not tab:
        raise InputError(f"The sample {sample[:40]!r} is one text.", expected="two texts with a tab between them")
    return text, pair


def _pairs(built_in: Sequence[tuple[str, str]], truncation: Truncation) -> Inputs:
    return Inputs(
        plural="pairs of texts",
        folder="pair",
        case=PairCase,
        meanings={
            "input_ids": "token ids, two texts a row",
            "attention_mask": "1 for a token, 0 for padding",
            "token_type_ids": "0 for the first text, 1 for the second",
        },
        required=frozenset({"input_ids"}),
        tokenizes=True,
        find_rule=partial(_find_rule, truncation),
        open=PairRule,
        make_cases=partial(_make_cases, built_in),
        shown=_shown,
        more_for_page=more_for_page,
    )


RANKED = _pairs((*_REFUND, *_FOREIGN), "longest-first")
ASKED = _pairs((*_LONDON, *_FOREIGN), "only-second")
