"""Comparison of a converted model with its source on padded batches and on a single example."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.formats.runtime import Session
from compress.tasks.task import Examples
from compress.utils.errors import IntegrityError

Answers = Callable[[Sequence[int]], np.ndarray]
"""Function from the indices of examples to the answers to them as one batch, [n, ...]."""
RAISE_TOLERANCE = "raise tolerance if the difference is acceptable"
_BATCH = 8
_SPREAD = 32


@dataclass(frozen=True)
class Distance:
    """Largest difference between two sets of arrays, and the range of the expected values.

    ``worst`` is the largest difference of any entry, or NaN if one entry is NaN. Expected values are between
    ``lowest`` and ``highest``.
    """

    worst: float
    lowest: float
    highest: float

    @property
    def largest(self) -> float:
        """Largest magnitude of the expected values."""
        return max(-self.lowest, self.highest)


def distance(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Distance:
    """Return the distance over pairs of an expected array and a computed array."""
    worst, lowest, highest = 0.0, np.inf, -np.inf
    for expected, actual in pairs:
        # Unlike max, numpy's maximum does not lose a NaN.
        worst = float(np.maximum(worst, np.abs(actual - expected).max()))
        lowest, highest = min(lowest, float(expected.min())), max(highest, float(expected.max()))
    return Distance(worst, lowest, highest)


def measure_distance(reference: Answers, session: Answers, examples: Examples) -> Distance:
    """Return the distance between the answers of ``session`` and ``reference`` over padded and single batches."""

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for indices in mixed_batches(examples):
            expected = reference(indices)
            yield expected, examples.aligned(session(indices), expected)

    return distance(pairs())


def check_parity(
    reference: Answers,
    session: Answers,
    examples: Examples,
    tolerance: float,
    what: str,
    condition: str = "on padded batches",
    hint: str = RAISE_TOLERANCE,
) -> Distance:
    """Return the result of `measure_distance`, or raise an error if the answers differ too much.

    Batches mix lengths from the shortest to the longest example, so that padding is tested. The first example also
    runs alone.

    Args:
        reference: Expected answers.
        session: Answers to check.
        examples: Examples that both answer.
        tolerance: Largest accepted difference.
        what: Start of the error message, which names the two sides that differ.
        condition: End of the sentence in the error message that states the tolerance.
        hint: Advice in the error message.

    Raises:
        IntegrityError: The largest difference exceeds ``tolerance`` or is NaN.
    """
    measured = measure_distance(reference, session, examples)
    if not measured.worst <= tolerance:
        raise IntegrityError(
            f"{what} by {measured.worst:.2e}.", expected=f"at most {tolerance:g} {condition}", hint=hint
        )
    return measured


def check_shipped_parity(
    runtime: str,
    plain: Session,
    made: Session,
    reference: Answers,
    examples: Examples,
    tolerance: float,
    original: str = "torch",
) -> str:
    """Compare the fp32 and the shipped model with the reference and return a summary for people.

    Args:
        runtime: Name of the runtime that runs both models.
        plain: Session of the model in fp32, which has to be within ``tolerance``.
        made: Session of the model as it ships, whose answers have to be finite.
        reference: Expected answers.
        examples: Examples that all of them answer.
        tolerance: Largest accepted difference in fp32.
        original: Name of the reference in the summary.

    Raises:
        IntegrityError: The fp32 answers differ too much, or the shipped model's answers are not finite.
    """
    words = examples.answer_label
    what = f"In {runtime} the {words} differ from {original}"
    # In fp32 the conversion itself must be exact; fewer bits may only add rounding.
    answers, condition = session_answers(plain, examples), "on padded batches, in fp32"
    exact = check_parity(reference, answers, examples, tolerance, what, condition)
    text = f"{words} differ by at most {exact.worst:.1e} from {original} in fp32"
    if made is plain:
        return text
    shipped = measure_distance(reference, session_answers(made, examples), examples)
    if not np.isfinite(shipped.worst):
        raise IntegrityError(
            f"In {runtime} the {words} are not all finite in fewer bits, and are in fp32.",
            where="precision",
            expected="finite answers of the file that ships",
            hint="set precision: int8_weights, fp16 or fp32, whichever the format has",
        )
    return f"{text}, by {shipped.worst:.1e} as they ship, where the largest is {exact.largest:.1f}"


def torch_answers(module: Any, examples: Examples) -> Answers:
    """Return a function that answers with a torch module and computes each batch only once."""
    import torch

    from compress.tasks.inference import answers, tensors

    @functools.cache
    def answered(indices: tuple[int, ...]) -> np.ndarray:
        batch = tensors(examples, list(indices))
        inputs = {name: value for name, value in batch.items() if name in examples.padding}
        with torch.inference_mode():
            logits: np.ndarray = answers(examples, module.eval()(**inputs), inputs).numpy()
        return logits

    return lambda indices: answered(tuple(indices))


def session_answers(session: Session, examples: Examples) -> Answers:
    """Return a function that answers with a runtime's session."""

    def answered(indices: Sequence[int]) -> np.ndarray:
        batch = examples.batch(indices)
        return examples.answers(session.predict(batch), batch)

    return answered


def mixed_batches(examples: Examples) -> list[list[int]]:
    """Return up to four batches that mix lengths, and one single example; for whole calls, a few single examples."""
    if examples.full_call:
        return [[index] for index in range(min(_BATCH, len(examples)))]
    # Sort by length, spread over all lengths, and take every n-th example into a batch.
    order = np.argsort(examples.lengths(), kind="stable")
    spread = order[np.linspace(0, len(order) - 1, min(_SPREAD, len(order))).round().astype(int)]
    count = max(1, len(spread) // _BATCH)
    return [spread[start::count].tolist() for start in range(count)] + [[int(order[0])]]
