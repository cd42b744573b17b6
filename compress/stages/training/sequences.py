"""What a language model's student reads: windows of tokens, of which those of a conversation's answers count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compress.stages.base import Context
from compress.stages.distill_language_model.settings import LanguageDistillation
from compress.tasks.task import Examples
from compress.tasks.token_sequences import cut, learned_tokens, prefix_tokens, spread
from compress.utils.errors import DataError

if TYPE_CHECKING:
    from compress.models.model import Processor

HELD_OUT = 8
"""Windows that say how well the student does, before and after."""


@dataclass(frozen=True)
class TokenSequences:
    """Token ids to learn from and to be judged by; every window has the same length.

    Where not all tokens are to be foretold, `labels` [windows, length] of ``train`` are 1 for those that are.
    """

    train: Examples
    held_out: Examples


def training_sequences(processor: Processor, settings: LanguageDistillation, context: Context) -> TokenSequences:
    """Return the sequences of the recipe's text. Raises `DataError` for too little text."""
    length = settings.sequence_length or context.max_length
    learned, counted = _windows(context, "train", processor, settings, length)
    if "validation" in context.data.splits:
        judged, _ = _windows(context, "validation", processor, settings, length)
    else:
        last = max(1, min(HELD_OUT, len(learned) // 10))
        judged, learned, counted = learned[-last:], learned[:-last], counted[:-last]
    check_enough(learned, judged, settings.batch_size, length)
    step = settings.batch_size * length
    if settings.tokens is not None and settings.tokens < step:
        raise DataError(
            f"{settings.tokens:,} tokens are too few for one step, which takes {step:,}.",
            where="tokens",
            expected=f"at least {step:,}: {settings.batch_size} windows of {length} tokens",
            hint="raise tokens, or lower batch_size",
        )
    judged = [judged[position] for position in spread(len(judged), HELD_OUT)]
    labels = None if all(mask.all() for mask in counted) else np.stack(counted).astype(np.int64)
    return TokenSequences(_examples(learned, labels), _examples(judged))


def check_enough(learned: Sequence[object], judged: Sequence[object], batch_size: int, length: int) -> None:
    """Raise `DataError` for fewer sequences than one step takes, or none that is held out.

    Args:
        learned: Sequences to train on.
        judged: Held-out sequences.
        batch_size: Sequences of a step.
        length: Tokens of a sequence.
    """
    if not judged or len(learned) < batch_size:
        raise DataError(
            f"The text is too short: {len(learned)} windows of {length} tokens to learn from and {len(judged)} held "
            "out.",
            where="data.splits",
            expected=f"at least {batch_size} and 1",
            hint="name more text, or lower sequence_length",
        )


def _windows(
    context: Context, split: str, processor: Processor, settings: LanguageDistillation, length: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Windows of a split, and which tokens of each count; those in which none does are left out."""
    end = None
    if settings.documents == "end_token":
        end = processor.eos_token_id
        if end is None:
            raise DataError(
                "The model's tokenizer has no token that ends a text.",
                where="documents",
                expected="an eos_token in tokenizer_config.json",
                hint="set documents: blank_line",
            )
    ids, counted = learned_tokens(context.data.split(split), processor, end)
    first = prefix_tokens(processor)
    windows, marks = cut(ids, first, length), cut(counted.astype(np.int64), [0] * len(first), length)
    selected = [position for position, mark in enumerate(marks) if mark.any()]
    plain = counted.all()
    return [windows[position] for position in selected], [
        np.ones(length, bool) if plain else marks[position].astype(bool) for position in selected
    ]


def _examples(windows: list[np.ndarray], labels: np.ndarray | None = None) -> Examples:
    return Examples([{"input_ids": window} for window in windows], {"input_ids": 0}, labels)
