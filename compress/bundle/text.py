"""Texts -> ids as an app does it: by the rule of the manifest, without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.bundle.manifest import Tokenize
from compress.errors import BundleError, ModelError

_PROBE = "a"


class TextRule:
    """The rule of a manifest over the tokenizer beside it."""

    def __init__(self, folder: Path, rule: Tokenize) -> None:
        self.rule = rule
        self._tokenizer = open_tokenizer(folder / rule.tokenizer)

    def ids(self, text: str) -> list[int]:
        """The ids of one text, at most ``max_length`` of them."""
        own = self._tokenizer.encode(text, add_special_tokens=False).ids
        room = self.rule.max_length - len(self.rule.prefix_ids) - len(self.rule.suffix_ids)
        return [*self.rule.prefix_ids, *own[:room], *self.rule.suffix_ids]


def find_rule(folder: Path, file: str, processor: Any, max_length: int) -> Tokenize:
    """The rule by which an app gets the ids that ``processor``, a transformers tokenizer, gives.

    ``file`` is the tokenizer's path below ``folder``. Raises `ModelError` where no such rule holds.
    """
    tokenizer = open_tokenizer(folder / file)
    own = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    whole = list(processor(_PROBE)["input_ids"])
    starts = [at for at in range(len(whole) - len(own) + 1) if whole[at : at + len(own)] == own]
    if not starts or getattr(processor, "truncation_side", "right") != "right":
        raise _no_rule(folder, "its special tokens stand within the text, or it cuts texts at the beginning")
    prefix, suffix = whole[: starts[0]], whole[starts[0] + len(own) :]
    if len(prefix) + len(suffix) >= max_length:
        raise _no_rule(folder, f"{max_length} tokens leave no room beside {len(prefix) + len(suffix)} special ones")
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
                f"The tokenizer cannot be described to an app: of {text[:60]!r} it makes {wanted[:12]}, the rule "
                f"{rule.ids(text)[:12]}.",
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


def _no_rule(folder: Path, reason: str) -> ModelError:
    return ModelError(f"The tokenizer cannot be described to an app: {reason}.", where=str(folder))
