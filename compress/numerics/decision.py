"""Whether a change is worse, better, the same, or not yet known, from its confidence interval and a margin."""

from __future__ import annotations

import math
from typing import Literal

from compress.numerics.statistics import Estimate

Verdict = Literal["better", "same", "worse", "can't tell"]
"""What a comparison says of one metric."""


def decide(loss: Estimate, margin: float) -> Verdict:
    """The verdict on a change whose positive direction is the bad one; ``margin`` is the smallest that matters.

    *worse* if the interval excludes 0 and the estimate reaches the margin, *better* likewise on the other side,
    *same* if the whole interval lies within the margin on both sides (equivalence by two one-sided tests,
    Schuirmann 1987), else *can't tell*. With a margin of 0 any change that the interval shows counts, and *same*
    is an interval of width 0. Raises `ValueError` for a negative margin or values that are no interval.
    """
    if not margin >= 0:
        raise ValueError(f"expected a margin of at least 0, found {margin}")
    if not loss.low <= loss.value <= loss.high:
        raise ValueError(f"expected low <= value <= high, found {loss}")
    if loss.low > 0 and loss.value >= margin:
        return "worse"
    if loss.high < 0 and loss.value <= -margin:
        return "better"
    if (-margin < loss.low and loss.high < margin) or loss.low == loss.high == 0:
        return "same"
    return "can't tell"


def samples_to_settle(loss: Estimate, margin: float, n: int) -> int | None:
    """How many samples beyond ``n`` should turn *can't tell* into a verdict, if the estimate stays where it is.

    The interval narrows with the square root of the samples. It has to get narrower than the distance to 0 if
    the estimate reaches the margin, and than the distance to the margin otherwise. ``None`` where no number of samples
    would do (the estimate is at the margin itself, or at 0 with a margin of 0); 0 where it is settled already.
    """
    if decide(loss, margin) != "can't tell":
        return 0
    half = max(loss.high - loss.value, loss.value - loss.low)
    wanted = abs(loss.value) if abs(loss.value) >= margin else margin - abs(loss.value)
    if wanted <= 0 or not math.isfinite(half / wanted):
        return None
    return max(1, math.ceil(n * (half / wanted) ** 2) - n)
