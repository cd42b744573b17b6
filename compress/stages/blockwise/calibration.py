"""The calibration text: windows of token ids from the train split, refused where they could teach nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.models.checkpoint import Checkpoint
from compress.models.processor import load_tokenizer
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    from compress.stages.base import Context

_SPLIT = "train"
_MONOTONOUS = 0.9
"""A share of one token beyond which text is no text."""


def calibration_sequences(context: Context, checkpoint: Checkpoint, samples: int, length: int) -> torch.Tensor:
    """Token ids [samples, length], drawn with the recipe's seed, in the order of the text.

    Raises `DataError` for text that is too short or repeats one token, `ModelError` for ids that the model lacks.
    """
    tokenizer = load_tokenizer(checkpoint.folder)
    rows = context.data.split(_SPLIT)
    examples = context.task.encode(rows, tokenizer, None, length)
    windows = [example["input_ids"] for example in examples.inputs if len(example["input_ids"]) == length]
    if len(windows) < samples:
        raise DataError(
            f"The calibration text is too short: it gives {len(windows)} windows of {length} tokens.",
            where=f"data.splits.{_SPLIT}",
            expected=f"{samples} windows, {samples * length:,} tokens",
            hint=f"give more text, or lower samples{f' to {len(windows)}' if windows else ''} or sequence_length",
        )
    chosen = np.sort(np.random.default_rng(context.seed).choice(len(windows), samples, replace=False))
    ids = torch.from_numpy(np.stack([windows[index] for index in chosen]))
    _check(ids, tokenizer, checkpoint)
    return ids


def _check(ids: torch.Tensor, tokenizer: Any, checkpoint: Checkpoint) -> None:
    values, counts = torch.unique(ids, return_counts=True)
    share = int(counts.max()) / ids.numel()
    if share > _MONOTONOUS:
        token = tokenizer.convert_ids_to_tokens(int(values[counts.argmax()]))
        raise DataError(
            f"{share:.0%} of the calibration text is the one token {token!r}.",
            where=f"data.splits.{_SPLIT}",
            expected="ordinary text, so that every input of a layer is seen at work",
        )
    known = checkpoint.config.get("vocab_size")
    if isinstance(known, int) and int(values.max()) >= known:
        raise ModelError(
            f"The tokenizer gives the id {int(values.max())}; the model's vocabulary has {known}.",
            where=str(checkpoint.folder),
            expected="the tokenizer that the model was trained with",
        )
