"""Tokenization of texts and text pairs by the rule of a manifest, without transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from compress.formats.runtime import Batch
from compress.plugins.apps.app_type import Case, Inputs
from compress.plugins.apps.manifest import MODEL_FOLDER
from compress.plugins.apps.preprocess import Tokenize, TokenizePair, TokenizePrompt
from compress.plugins.apps.tokenizer_fallbacks import STAND_INS, stand_ins
from compress.utils.errors import BundleError, InputError, ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from compress.models.model import Processor


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
"""An empty text, other scripts, emoji, and more tokens than any model reads."""
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
"""Question and possible answers."""
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
"""Number of ids in an error message."""


class TextCase(Case):
    """Text and its token ids."""

    text: str
    input_ids: tuple[int, ...]

    @property
    def shown(self) -> str:
        """First characters of the text, quoted for a message."""
        return repr(self.text[:40])


class TextRule:
    """Tokenization by the rule of a manifest."""

    def __init__(self, folder: Path, rule: Tokenize | TokenizePrompt) -> None:
        self.rule = rule
        self.tokenizer = open_tokenizer(folder / rule.tokenizer)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text with special tokens, at most ``max_length``."""
        text_ids = self.ids_of(text)
        room = self.rule.max_length - len(self.rule.prefix_ids) - len(self.rule.suffix_ids)
        return [*self.rule.prefix_ids, *text_ids[:room], *self.rule.suffix_ids]

    def ids_of(self, text: str) -> list[int]:
        """Return all ids of a text without special tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def feed(self, case: TextCase) -> Batch:
        """Return ids and mask of a case, [1, tokens]."""
        row = np.array([self.ids(case.text)], dtype=np.int64)
        return {"input_ids": row, "attention_mask": np.ones_like(row)}

    def difference(self, case: TextCase) -> tuple[str, str] | None:
        """Return the differing ids and the expected ones, or None."""
        return id_difference(self.ids(case.text), case)


def id_difference(ids: Sequence[int], case: TextCase) -> tuple[str, str] | None:
    """Return the prepared and the expected ids of a case if they differ, else None."""
    expected = case.input_ids
    return None if tuple(ids) == expected else (f"ids {list(ids[:_IDS])}", f"{list(expected[:_IDS])}")


def _find_rule(folder: Path, processor: Processor, max_length: int) -> Tokenize:
    return find_tokenize(folder, f"{MODEL_FOLDER}/tokenizer.json", processor, max_length)


def find_tokenize(folder: Path, file: str, processor: Processor, max_length: int) -> Tokenize:
    """Return the rule of a tokenizer.

    Args:
        folder: Folder of the bundle.
        file: Path of its tokenizer.json in the bundle.
        processor: Tokenizer of transformers.
        max_length: Largest number of tokens.

    Raises:
        ModelError: The special tokens do not surround the text, or texts are cut on the left.
    """
    tokenizer = open_tokenizer(folder / file)
    probe_ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    # Tokenize a probe with and without special tokens. The ids around the probe are the special tokens.
    whole = list(processor(_PROBE)["input_ids"])
    starts = [
        index for index in range(len(whole) - len(probe_ids) + 1) if whole[index : index + len(probe_ids)] == probe_ids
    ]
    # Other tokenizers put special tokens into a text, or cut its beginning.
    if not starts or getattr(processor, "truncation_side", "right") != "right":
        raise no_rule(folder, "its special tokens stand within the text, or it cuts texts at the beginning")
    prefix, suffix = whole[: starts[0]], whole[starts[0] + len(probe_ids) :]
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
    built_in: Sequence[str], folder: Path, rule: Tokenize, samples: Sequence[str], processor: Processor
) -> Sequence[TextCase]:
    """Verify the rule, and return a case for each sample or built-in text that has a token.

    A tokenizer without special tokens returns no token for an empty text, which no model answers.
    """
    preparation, texts = TextRule(folder, rule), samples or built_in
    for text in texts:
        expected = list(processor(text, truncation=True, max_length=rule.max_length)["input_ids"])
        if preparation.ids(text) != expected:
            raise ModelError(
                f"The tokenizer cannot be described to an app: of {text[:60]!r} it makes {expected[:_IDS]}, the rule "
                f"{preparation.ids(text)[:_IDS]}.",
                expected="special tokens before and after a text's own, as tokenizer.json alone gives them",
            )
    return [TextCase(text=text, input_ids=ids) for text in texts if (ids := tuple(preparation.ids(text)))]


def _make_word_cases(
    built_in: Sequence[str], folder: Path, rule: Tokenize, samples: Sequence[str], processor: Processor
) -> Sequence[TextCase]:
    """Return cases for texts whose words get labels.

    Raises:
        ModelError: The tokens of a text are not those of its words.
    """
    preparation, texts = TextRule(folder, rule), [" ".join(text.split()) for text in samples or built_in]
    for text in texts:
        # Byte-level tokenizers include the space before a word in its first token.
        ids_by_word = [
            preparation.ids_of(word if index == 0 else f" {word}") for index, word in enumerate(text.split(" ")) if word
        ]
        if [token for ids in ids_by_word for token in ids] != preparation.ids_of(text):
            raise ModelError(
                f"The tokenizer cannot be described to an app: it cuts {text[:60]!r} otherwise than its words.",
                expected="a tokenizer that cuts words apart before anything else",
            )
    return _make_cases((), folder, rule, texts, processor)


def _make_masked_cases(
    built_in: Sequence[str], folder: Path, rule: Tokenize, samples: Sequence[str], processor: Processor
) -> Sequence[TextCase]:
    """Return cases with a mask. Built-in texts get the tokenizer's mask in place of theirs, or at their beginning."""
    mask = processor.mask_token
    # The built-in texts contain BERT's mask, which other tokenizers name differently.
    masked_texts = [text.replace(_MASK, mask) if _MASK in text else f"{mask} {text}" for text in built_in]
    return _make_cases(masked_texts, folder, rule, samples, processor)


def more_for_page(folder: Path, rule: Tokenize | TokenizePair | TokenizePrompt) -> dict[str, bytes]:
    """Return the replacements of characters that JavaScript classifies differently."""
    replacements = stand_ins(open_tokenizer(folder / rule.tokenizer))
    return {STAND_INS: json.dumps(replacements, separators=(",", ":")).encode()} if replacements else {}


def short_texts(most: int, short: int, cases: Sequence[TextCase]) -> list[str]:
    """Return the first ``most`` texts with at most ``short`` characters."""
    return [case.text for case in cases if 0 < len(case.text) <= short][:most]


def open_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json without truncation and padding. Raises `BundleError`."""
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
    # The rule of the manifest truncates and pads, so that every platform does it alike.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def no_rule(folder: Path, reason: str) -> ModelError:
    """Return the error for a tokenizer that no rule describes."""
    return ModelError(f"The tokenizer cannot be described to an app: {reason}.", where=str(folder))


def _texts(built_in: Sequence[str], most: int, short: int, make_cases: Callable[..., Any] = _make_cases) -> Inputs:
    """Return a kind of text input with its built-in texts, of which up to ``most`` short ones appear on the page."""
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


_PROBES = ("a", "b")
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
_FOREIGN_PAIRS = (
    ("Ein schöner Film?", "Прекрасный фильм 👍🏽"),
    ("这部电影好看吗?", "فيلم رائع बढ़िया फिल्म"),
    ("tabs\tand  spaces?", "3.14 %, <b>tags</b> & naïve café: 👩‍👩‍👧 ok"),
    ("How long is it?", "very " * 600 + "long"),
)
"""Pairs with other scripts, emoji, and more tokens than any model reads."""


class PairCase(TextCase):
    """Two texts and their token ids as one input."""

    pair: str


class PairRule:
    """Tokenization of text pairs by the rule of a manifest."""

    def __init__(self, folder: Path, rule: TokenizePair) -> None:
        self.rule = rule
        self.tokenizer = open_tokenizer(folder / rule.tokenizer)

    def row(self, text: str, pair: str) -> tuple[list[int], list[int]]:
        """Return the ids of both texts as one input, and token types: 1 from the second text on."""
        rule = self.rule
        first, second = (self.tokenizer.encode(part, add_special_tokens=False).ids for part in (text, pair))
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
        """Return the differing ids and the expected ones, or None."""
        return id_difference(self.row(case.text, case.pair)[0], case)


def cut(first: list[int], second: list[int], room: int, truncation: str) -> tuple[list[int], list[int]]:
    """Return both id lists cut to ``room`` tokens in all.

    Args:
        first: Ids of the first text.
        second: Ids of the second text.
        room: Number of tokens for both.
        truncation: `only-second` cuts the second list, `longest-first` the longer one until both are equal.
    """
    if len(first) + len(second) <= room:
        return first, second
    # Answers are searched in the second text only, so that the question stays complete.
    if truncation == "only-second":
        return first, second[: max(room - len(first), 0)]
    short = min(len(first), len(second))
    short_length = short if 2 * short <= room else room // 2
    # With an odd number of tokens the longer text keeps one more.
    keep = (short_length, room - short_length) if len(first) <= len(second) else (room - short_length, short_length)
    return first[: keep[0]], second[: keep[1]]


Truncation = Literal["longest-first", "only-second"]


def _find_pair_rule(truncation: Truncation, folder: Path, processor: Processor, max_length: int) -> TokenizePair:
    """Return the rule of a pair tokenizer: its special tokens before, between and after both texts.

    Raises:
        ModelError: The special tokens do not surround the texts.
    """
    file = f"{MODEL_FOLDER}/tokenizer.json"
    tokenizer = open_tokenizer(folder / file)
    # Tokenize two probes as a pair and search the ids of each probe. All other ids are special tokens.
    whole, position = list(processor(*_PROBES)["input_ids"]), 0
    parts = []
    for probe in _PROBES:
        probe_ids = tokenizer.encode(probe, add_special_tokens=False).ids
        starts = [
            index
            for index in range(position, len(whole) - len(probe_ids) + 1)
            if whole[index : index + len(probe_ids)] == probe_ids
        ]
        if not starts:
            raise no_rule(folder, "its special tokens stand within a text")
        parts.append(tuple(whole[position : starts[0]]))
        position = starts[0] + len(probe_ids)
    if sum(map(len, parts)) + len(whole[position:]) >= max_length:
        raise no_rule(folder, f"{max_length} tokens leave no room beside the special ones")
    return TokenizePair(
        tokenizer=file,
        max_length=max_length,
        prefix_ids=parts[0],
        middle_ids=parts[1],
        suffix_ids=tuple(whole[position:]),
        truncation=truncation,
        pad_id=processor.pad_token_id or 0,
    )


def _make_pair_cases(
    built_in: Sequence[tuple[str, str]], folder: Path, rule: TokenizePair, samples: Sequence[str], processor: Processor
) -> Sequence[PairCase]:
    """Verify the rule, and return a case for each sample (two texts with a tab between) or built-in pair."""
    preparation, cases = PairRule(folder, rule), []
    for text, pair in [_split_pair(sample) for sample in samples] or built_in:
        ids, types = preparation.row(text, pair)
        expected = processor(text, pair, truncation=rule.truncation.replace("-", "_"), max_length=rule.max_length)
        if ids != list(expected["input_ids"]) or types != list(expected.get("token_type_ids", types)):
            raise ModelError(
                f"The tokenizer cannot be described to an app: of {text[:30]!r} and {pair[:30]!r} it makes "
                f"{list(expected['input_ids'])[:_IDS]}, the rule {ids[:_IDS]}.",
                expected="special tokens before, between and after both texts' own",
            )
        cases.append(PairCase(text=text, pair=pair, input_ids=tuple(ids)))
    return cases


def _shown_pairs(cases: Sequence[PairCase]) -> list[str]:
    """Return a first text, and all second texts of its pairs."""
    return [cases[0].text, *(case.pair for case in cases if case.text == cases[0].text)]


def _split_pair(sample: str) -> tuple[str, str]:
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
        find_rule=partial(_find_pair_rule, truncation),
        open=PairRule,
        make_cases=partial(_make_pair_cases, built_in),
        shown=_shown_pairs,
        more_for_page=more_for_page,
    )


RANKING_PAIRS = _pairs((*_REFUND, *_FOREIGN_PAIRS), "longest-first")
QUESTION_PAIRS = _pairs((*_LONDON, *_FOREIGN_PAIRS), "only-second")
