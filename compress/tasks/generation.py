"""What tasks share that write a text token by token: what is kept of it, and of logits beside the right one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from compress.tasks.classes import agreement_row
from compress.tasks.task import Examples, Kept
from compress.tasks.tokens import IGNORED
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    from compress.results.measurement import Measurement

TEXTS = "texts"
"""The output of a session that writes, and what is kept of it: [batch] strings."""
_LOSS, _RIGHT = "loss", "right"


def keep_texts(outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]) -> Kept:
    """The texts, [batch] strings; or, of logits beside the target, each row's loss and share of right tokens.

    Raises `DataError` for rows without a target, `ModelError` for logits that are not finite.
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

    wanted = labels[labels != IGNORED].astype(np.int64)
    own = logits[: len(wanted)]
    if not np.isfinite(own).all():
        raise ModelError("The model's outputs are not finite.", hint="export or quantize it anew")
    loss = negative_log_likelihood(own, wanted)
    return float(loss.mean()), float((own.argmax(axis=-1) == wanted).mean())


def next_token_row(kept: Kept, model: str, target: str) -> Measurement:
    """The share of right tokens, where logits were kept."""
    from compress.tasks.classes import mean_row

    return mean_row("next_token_accuracy", kept[_RIGHT], model, target)


def stripped(texts: np.ndarray) -> list[str]:
    """Strings without white space around them."""
    return [str(text).strip() for text in texts]


def same_texts(kept: Kept, reference: Kept, model: str, target: str) -> list[Measurement]:
    """How many texts are the baseline's to the letter."""
    return [agreement_row(kept[TEXTS] == reference[TEXTS], model, target)]
