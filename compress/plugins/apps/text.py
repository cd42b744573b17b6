"""Tokenization of texts and text pairs by the rule of a manifest, without transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from compress.formats.runtime import Batch
from compress.plugins.apps.app_type import Case, Inputs
from compress.plugins.apps.manifest import MODEL_FOLDER
from compress.plugins.apps.preprocess import Prompt, Tokenize, TokenizePair, TokenizePrompt
from compress.plugins.apps.tokenizer_fallbacks import STAND_INS, stand_ins
from compress.utils.errors import BundleError, InputError, ModelError, panics_as_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from compress.models.model import Processor


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
SHOWN_IDS = 12
"""Number of ids in an error message."""


class TextCase(Case):
    """Text and its token ids."""

    text: str
    input_ids: tuple[int, ...]

    @property
    def shown(self) -> str:
        """First characters of the text, quoted for a message."""
        return repr(self.text[:40])


class TokenizedInputs(Inputs):
    """Inputs that a tokenizer of Hugging Face tokenizers reads."""

    required = frozenset({"input_ids"})
    tokenizes = True

    def __init__(self, folder: Path, rule: Tokenize | TokenizePrompt | TokenizePair | Prompt) -> None:
        super().__init__(folder, rule)
        self.tokenizer = open_tokenizer(folder / rule.tokenizer)

    def more_for_page(self) -> dict[str, bytes]:
        """Return the replacements of characters that JavaScript classifies differently."""
        replacements = stand_ins(self.tokenizer)
        return {STAND_INS: json.dumps(replacements, separators=(",", ":")).encode()} if replacements else {}


class Texts(TokenizedInputs):
    """Texts, tokenized by the rule of a manifest.

    Up to ``most`` cases of at most ``short`` characters appear on the page.
    """

    plural, web = "texts", "text"
    case: type[TextCase] = TextCase
    meanings = {
        "input_ids": "token ids, one text a row",
        "attention_mask": "1 for a token, 0 for padding",
    }
    tokenizer_file = "tokenizer.json"
    built_in: tuple[str, ...] = (
        "A lovely, moving film with a clever plot.",
        "Dull, noisy and far too long.",
        "I don't know what to think of it.",
        *FOREIGN,
    )
    most, short = 3, 60
    rule: Tokenize | TokenizePrompt

    @classmethod
    def find_rule(cls, folder: Path, processor: Processor, max_length: int) -> Tokenize | TokenizePrompt:
        """Return the rule of a tokenizer.

        Raises:
            ModelError: The special tokens do not surround the text, or texts are cut on the left.
        """
        file = f"{MODEL_FOLDER}/{cls.tokenizer_file}"
        if getattr(processor, "truncation_side", "right") != "right":
            raise _no_rule(folder, "it cuts texts at the beginning")
        prefix, suffix = find_special_ids(folder, file, processor, max_length, "a")
        pad = processor.pad_token_id or 0
        return Tokenize(tokenizer=file, max_length=max_length, prefix_ids=prefix, suffix_ids=suffix, pad_id=pad)

    def make_cases(self, samples: Sequence[str], processor: Processor) -> Sequence[TextCase]:
        """Verify the rule, and return a case for each sample or built-in text that has a token.

        A tokenizer without special tokens returns no token for an empty text, which no model answers.
        """
        texts = self.texts(samples, processor)
        for text in texts:
            expected = list(processor(text, truncation=True, max_length=self.rule.max_length)["input_ids"])
            if self.ids(text) != expected:
                raise ModelError(
                    f"The tokenizer cannot be described to an app: of {text[:60]!r} it makes {expected[:SHOWN_IDS]}, "
                    f"the rule {self.ids(text)[:SHOWN_IDS]}.",
                    expected="special tokens before and after a text's own, as tokenizer.json alone gives them",
                )
        return [TextCase(text=text, input_ids=ids) for text in texts if (ids := tuple(self.ids(text)))]

    def texts(self, samples: Sequence[str], processor: Processor) -> Sequence[str]:
        """Return the texts of the self-test."""
        return samples or self.built_in

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text with special tokens, at most ``max_length``."""
        room = self.rule.max_length - len(self.rule.prefix_ids) - len(self.rule.suffix_ids)
        return [*self.rule.prefix_ids, *self.own_ids(text)[:room], *self.rule.suffix_ids]

    def own_ids(self, text: str) -> list[int]:
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

    @classmethod
    def shown(cls, cases: Sequence[TextCase]) -> list[str]:
        """Return the first short texts."""
        return [case.text for case in cases if 0 < len(case.text) <= cls.short][: cls.most] or ["Hello"]


class SourceTexts(Texts):
    """Texts that a model rewrites."""

    built_in = (
        "The ship reached the harbour before the storm.",
        "He said that he would come tomorrow.",
        "In the beginning there was nothing at all.",
        *FOREIGN,
    )
    short = 120


class Sentences(Texts):
    """Texts of which the page finds the nearest: a question and possible answers."""

    built_in = (
        "How do I get my money back?",
        "Refunds are paid within five days.",
        "The parcel arrives on Friday.",
        "Our shop is closed on Sundays.",
        "You can change your password in the settings.",
        "The battery lasts about ten hours.",
        "Children under six travel free.",
        *FOREIGN,
    )
    most, short = 7, 120


class Words(Texts):
    """Texts whose words get labels."""

    built_in = (
        "Ada Lovelace wrote to Charles Babbage in London.",
        "The European Union was founded in Maastricht.",
        "Nobody is named here.",
        *FOREIGN,
    )
    short = 120

    def texts(self, samples: Sequence[str], processor: Processor) -> Sequence[str]:
        """Return the texts with single spaces. Raises `ModelError` if a text has other tokens than its words."""
        texts = [" ".join(text.split()) for text in super().texts(samples, processor)]
        for text in texts:
            # Byte-level tokenizers include the space before a word in its first token.
            words = [word if index == 0 else f" {word}" for index, word in enumerate(text.split(" ")) if word]
            if [token for word in words for token in self.own_ids(word)] != self.own_ids(text):
                raise ModelError(
                    f"The tokenizer cannot be described to an app: it cuts {text[:60]!r} otherwise than its words.",
                    expected="a tokenizer that cuts words apart before anything else",
                )
        return texts


class MaskedTexts(Texts):
    """Texts with a mask. Built-in texts get the tokenizer's mask in place of theirs, or at their beginning."""

    built_in = (
        "The capital of France is [MASK].",
        "She opened the [MASK] and went in.",
        "I have not [MASK] him for years.",
        *FOREIGN,
    )
    short = 120

    def texts(self, samples: Sequence[str], processor: Processor) -> Sequence[str]:
        """Return the texts with the tokenizer's mask."""
        # The built-in texts contain BERT's mask, which other tokenizers name differently.
        mask, bert = processor.mask_token, "[MASK]"
        return samples or [text.replace(bert, mask) if bert in text else f"{mask} {text}" for text in self.built_in]


def id_difference(ids: Sequence[int], case: TextCase) -> tuple[str, str] | None:
    """Return the prepared and the expected ids of a case if they differ, else None."""
    expected = case.input_ids
    return None if tuple(ids) == expected else (f"ids {list(ids[:SHOWN_IDS])}", f"{list(expected[:SHOWN_IDS])}")


def find_special_ids(
    folder: Path, file: str, processor: Processor, max_length: int, *probes: str
) -> list[tuple[int, ...]]:
    """Return the special tokens before, between and after texts.

    Args:
        folder: Folder of the bundle.
        file: Path of its tokenizer.json in the bundle.
        processor: Tokenizer of transformers.
        max_length: Largest number of tokens.
        *probes: Short texts to tokenize.

    Raises:
        ModelError: There are special tokens within a text, or they leave no room for one.
    """
    tokenizer = open_tokenizer(folder / file)
    # Tokenize the probes with special tokens, and search the ids that each probe has without them.
    remaining, parts = list(processor(*probes)["input_ids"]), []
    for probe in probes:
        ids = tokenizer.encode(probe, add_special_tokens=False).ids
        starts = range(len(remaining) - len(ids) + 1)
        start = next((start for start in starts if remaining[start : start + len(ids)] == ids), None)
        if start is None:
            raise _no_rule(folder, "its special tokens stand within a text")
        parts.append(tuple(remaining[:start]))
        remaining = remaining[start + len(ids) :]
    parts.append(tuple(remaining))
    if (count := sum(map(len, parts))) >= max_length:
        raise _no_rule(folder, f"{max_length} tokens leave no room beside {count} special ones")
    return parts


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
        with panics_as_errors():
            tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no other class
        raise BundleError(f"The tokenizer cannot be opened: {error}", where=str(path)) from error
    # The rule of the manifest truncates and pads, so that every platform does it alike.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _no_rule(folder: Path, reason: str) -> ModelError:
    return ModelError(f"The tokenizer cannot be described to an app: {reason}.", where=str(folder))


class PairCase(TextCase):
    """Two texts and their token ids as one input."""

    pair: str


class TextPairs(TokenizedInputs):
    """Pairs of texts, tokenized as one input by the rule of a manifest."""

    plural, web = "pairs of texts", "pair"
    case = PairCase
    meanings = {
        "input_ids": "token ids, two texts a row",
        "attention_mask": "1 for a token, 0 for padding",
        "token_type_ids": "0 for the first text, 1 for the second",
    }
    truncation: Literal["longest-first", "only-second"]
    built_in: tuple[tuple[str, str], ...] = (
        ("Ein schöner Film?", "Прекрасный фильм 👍🏽"),
        ("这部电影好看吗?", "فيلم رائع बढ़िया फिल्म"),
        ("tabs\tand  spaces?", "3.14 %, <b>tags</b> & naïve café: 👩‍👩‍👧 ok"),
        ("How long is it?", "very " * 600 + "long"),
    )
    """Pairs with other scripts, emoji, and more tokens than any model reads."""
    rule: TokenizePair

    @classmethod
    def find_rule(cls, folder: Path, processor: Processor, max_length: int) -> TokenizePair:
        """Return the rule of a pair tokenizer: its special tokens before, between and after both texts.

        Raises:
            ModelError: The special tokens do not surround the texts.
        """
        file = f"{MODEL_FOLDER}/tokenizer.json"
        prefix, middle, suffix = find_special_ids(folder, file, processor, max_length, "a", "b")
        return TokenizePair(
            tokenizer=file,
            max_length=max_length,
            prefix_ids=prefix,
            middle_ids=middle,
            suffix_ids=suffix,
            truncation=cls.truncation,
            pad_id=processor.pad_token_id or 0,
        )

    def make_cases(self, samples: Sequence[str], processor: Processor) -> Sequence[PairCase]:
        """Verify the rule, and return a case for each sample (two texts with a tab between) or built-in pair."""
        for sample in samples:
            if "\t" not in sample:
                raise InputError(
                    f"The sample {sample[:40]!r} is one text.", expected="two texts with a tab between them"
                )
        truncation, max_length, cases = self.rule.truncation.replace("-", "_"), self.rule.max_length, []
        for text, pair in [sample.split("\t", 1) for sample in samples] or self.built_in:
            ids, types = self.row(text, pair)
            expected = processor(text, pair, truncation=truncation, max_length=max_length)
            if ids != list(expected["input_ids"]) or types != list(expected.get("token_type_ids", types)):
                raise ModelError(
                    f"The tokenizer cannot be described to an app: of {text[:30]!r} and {pair[:30]!r} it makes "
                    f"{list(expected['input_ids'])[:SHOWN_IDS]}, the rule {ids[:SHOWN_IDS]}.",
                    expected="special tokens before, between and after both texts' own",
                )
            cases.append(PairCase(text=text, pair=pair, input_ids=tuple(ids)))
        return cases

    def row(self, text: str, pair: str) -> tuple[list[int], list[int]]:
        """Return the ids of both texts as one input, and token types: 1 from the second text on."""
        rule = self.rule
        first, second = (self.tokenizer.encode(part, add_special_tokens=False).ids for part in (text, pair))
        room = rule.max_length - len(rule.prefix_ids) - len(rule.middle_ids) - len(rule.suffix_ids)
        first, second = cut(first, second, room, rule.truncation)
        head, tail = [*rule.prefix_ids, *first, *rule.middle_ids], [*second, *rule.suffix_ids]
        return head + tail, [0] * len(head) + [1] * len(tail)

    def feed(self, case: PairCase) -> Batch:
        """Return ids, mask and token types of one pair, [1, tokens]."""
        ids, types = (np.array([row], dtype=np.int64) for row in self.row(case.text, case.pair))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": types}

    def difference(self, case: PairCase) -> tuple[str, str] | None:
        """Return the differing ids and the expected ones, or None."""
        return id_difference(self.row(case.text, case.pair)[0], case)

    @classmethod
    def shown(cls, cases: Sequence[PairCase]) -> list[str]:
        """Return a first text, and all second texts of its pairs."""
        return [cases[0].text, *(case.pair for case in cases if case.text == cases[0].text)]


class RankingPairs(TextPairs):
    """Queries with texts that may be relevant to them."""

    truncation = "longest-first"
    built_in = (
        ("How do I get my money back?", "Refunds are paid within five days."),
        ("How do I get my money back?", "The parcel arrives on Friday."),
        ("How do I get my money back?", "Our shop is closed on Sundays."),
        ("How do I get my money back?", "Children under six travel free."),
        *TextPairs.built_in,
    )


class QuestionPairs(TextPairs):
    """Questions with texts that may answer them."""

    # Answers are searched in the second text only, so that the question stays complete.
    truncation = "only-second"
    built_in = (
        ("Where did she go?", "After the winter Mary went to London, where her brother lived."),
        ("Who lived in London?", "After the winter Mary went to London, where her brother lived."),
        *TextPairs.built_in,
    )


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
    if truncation == "only-second":
        return first, second[: max(room - len(first), 0)]
    short = min(len(first), len(second), room // 2)
    # With an odd number of tokens the longer text keeps one more.
    keep = (short, room - short) if len(first) <= len(second) else (room - short, short)
    return first[: keep[0]], second[: keep[1]]
