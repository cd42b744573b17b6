"""Shared functions of tasks that generate text: collected texts, and losses of reference tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from compress.tasks.classes import agreement_row
from compress.tasks.task import CollectedOutputs, Examples
from compress.tasks.tokens import IGNORED
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    from compress.results.measurement import Measurement

TEXTS = "texts"
"""Output of a generating session, and its collected form: [batch] strings."""
_LOSS, _RIGHT = "loss", "right"


def keep_texts(outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]) -> CollectedOutputs:
    """Return the generated texts [batch], or from logits each row's loss and share of correct tokens.

    Raises `DataError` for rows without a target, and `ModelError` for logits that are not finite.
    """
    if examples.labels is None:
        raise DataError("The split has no targets, so nothing can be evaluated on it.", expected="a column target")
    if TEXTS in outputs:
        return {TEXTS: outputs[TEXTS]}
    logits = outputs[examples.answer]
    pairs = [_judged(logits[row], examples.labels[index]) for row, index in enumerate(indices)]
    return {name: np.array(values) for name, values in zip((_LOSS, _RIGHT), zip(*pairs, strict=True), strict=True)}


def _judged(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    from compress.numerics.next_token import negative_log_likelihood

    target_ids = labels[labels != IGNORED].astype(np.int64)
    target_logits = logits[: len(target_ids)]
    if not np.isfinite(target_logits).all():
        raise ModelError("The model's outputs are not finite.", hint="export or quantize it anew")
    loss = negative_log_likelihood(target_logits, target_ids)
    return float(loss.mean()), float((target_logits.argmax(axis=-1) == target_ids).mean())


def next_token_row(collected: CollectedOutputs, model: str, target: str) -> Measurement:
    """Return the share of correct tokens, if logits were collected."""
    from compress.tasks.classes import mean_row

    return mean_row("next_token_accuracy", collected[_RIGHT], model, target)


def stripped(texts: np.ndarray) -> list[str]:
    """Return the strings without surrounding white space."""
    return [str(text).strip() for text in texts]


def same_texts(collected: CollectedOutputs, reference: CollectedOutputs, model: str, target: str) -> list[Measurement]:
    """Return the share of texts that equal the baseline's.

    Args:
        collected: Collected outputs of the model.
        reference: Collected outputs of the baseline.
        model: Name of the model in the report.
        target: Name of the target in the report.
    """
    return [agreement_row(collected[TEXTS] == reference[TEXTS], model, target)]
