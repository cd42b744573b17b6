"""Proof that what was made answers as what it was made of, on padded batches and a single example."""

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
"""From the places of examples to what is answered to them as one batch, [n, ...]."""
RAISE_TOLERANCE = "raise tolerance if the difference is acceptable"
_BATCH = 8
_SPREAD = 32


@dataclass(frozen=True)
class Distance:
    """``worst`` is the largest difference of any entry, NaN where one is; what is expected lies from ``lowest`` to
    ``highest``.
    """

    worst: float
    lowest: float
    highest: float

    @property
    def largest(self) -> float:
        """The largest magnitude that is expected."""
        return max(-self.lowest, self.highest)


def distance(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Distance:
    """How far arrays are apart, of pairs of what is expected and what was found."""
    worst, lowest, highest = 0.0, np.inf, -np.inf
    for expected, found in pairs:
        # Unlike max, numpy's maximum does not lose a NaN.
        worst = float(np.maximum(worst, np.abs(found - expected).max()))
        lowest, highest = min(lowest, float(expected.min())), max(highest, float(expected.max()))
    return Distance(worst, lowest, highest)


def measure(reference: Answers, session: Answers, examples: Examples) -> Distance:
    """How far the answers of ``session`` are from those of ``reference``, over padded and single batches."""

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for indices in mixed_batches(examples):
            expected = reference(indices)
            yield expected, examples.aligned(session(indices), expected)

    return distance(pairs())


def prove(
    reference: Answers,
    session: Answers,
    examples: Examples,
    tolerance: float,
    what: str,
    condition: str = "on padded batches",
    hint: str = RAISE_TOLERANCE,
) -> Distance:
    """What `measure` finds; ``what`` tells who differs from whom. Raises `IntegrityError` above ``tolerance``.

    Batches mix lengths from the shortest to the longest example, so padding is put to the test; the first example
    also runs alone.
    """
    found = measure(reference, session, examples)
    if not found.worst <= tolerance:
        raise IntegrityError(f"{what} by {found.worst:.2e}.", expected=f"at most {tolerance:g} {condition}", hint=hint)
    return found


def prove_shipped(
    runtime: str,
    plain: Session,
    made: Session,
    reference: Answers,
    examples: Examples,
    tolerance: float,
    original: str = "torch",
) -> str:
    """What to tell of ``made``; ``plain`` is the same in fp32, and held to ``tolerance``.

    ``runtime`` is what both run in, and ``original`` what ``reference`` is of, in words for people. Raises
    `IntegrityError`.
    """
    words = examples.answer_label
    what = f"In {runtime} the {words} differ from {original}"
    exact = prove(reference, of_session(plain, examples), examples, tolerance, what, "on padded batches, in fp32")
    text = f"{words} differ by at most {exact.worst:.1e} from {original} in fp32"
    if made is plain:
        return text
    shipped = measure(reference, of_session(made, examples), examples)
    if not np.isfinite(shipped.worst):
        raise IntegrityError(
            f"In {runtime} the {words} are not all finite in fewer bits, and are in fp32.",
            where="precision",
            expected="finite answers of the file that ships",
            hint="set precision: int8_weights, fp16 or fp32, whichever the format has",
        )
    return f"{text}, by {shipped.worst:.1e} as they ship, where the largest is {exact.largest:.1f}"


def of_torch(module: Any, examples: Examples) -> Answers:
    """What a torch module answers, computed once for each batch."""
    import torch

    from compress.tasks.inference import answers, tensors

    @functools.cache
    def answered(indices: tuple[int, ...]) -> np.ndarray:
        found = tensors(examples, list(indices))
        inputs = {name: value for name, value in found.items() if name in examples.padding}
        with torch.inference_mode():
            logits: np.ndarray = answers(examples, module.eval()(**inputs), inputs).numpy()
        return logits

    return lambda indices: answered(tuple(indices))


def of_session(session: Session, examples: Examples) -> Answers:
    """What a runtime's session answers."""

    def answered(indices: Sequence[int]) -> np.ndarray:
        batch = examples.batch(indices)
        return examples.answers(session.predict(batch), batch)

    return answered


def mixed_batches(examples: Examples) -> list[list[int]]:
    """Up to four batches whose members lie far apart in length, and one single example; of whole calls a few."""
    if examples.full_call:
        return [[place] for place in range(min(_BATCH, len(examples)))]
    order = np.argsort(examples.lengths(), kind="stable")
    spread = order[np.linspace(0, len(order) - 1, min(_SPREAD, len(order))).round().astype(int)]
    groups = [spread[start :: max(1, len(spread) // _BATCH)] for start in range(max(1, len(spread) // _BATCH))]
    return [[int(i) for i in group] for group in groups] + [[int(order[0])]]
