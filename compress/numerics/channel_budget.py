"""Which channels to keep: a share of each coupling, or the least loss for a cost that all layers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Count:
    """How many inputs or outputs a layer has: ``fixed``, and ``of[c]`` for each place kept in coupling c."""

    fixed: float
    of: Mapping[int, float] = field(default_factory=dict)

    def at(self, kept: Sequence[int]) -> float:
        """Their number once ``kept[c]`` places are left."""
        return self.fixed + sum(kept[index] * each for index, each in self.of.items())


@dataclass(frozen=True)
class Cost:
    """What a layer costs: ``each`` x inputs x outputs."""

    each: float
    inputs: Count
    outputs: Count

    def at(self, kept: Sequence[int]) -> float:
        """The cost once ``kept[c]`` places are left."""
        return self.each * self.inputs.at(kept) * self.outputs.at(kept)


def ladder(places: int, step: int) -> list[int]:
    """The numbers of places that may be kept, downwards: all, then multiples of ``step``, the least of them last."""
    return [places, *range((places - 1) // step * step, 0, -step)]


def nearest_rung(rungs: Sequence[int], wanted: float) -> int:
    """The rung nearest to ``wanted``; of two that are as near the larger."""
    return min(rungs, key=lambda rung: (abs(rung - wanted), -rung))


def least_loss(
    scores: Sequence[torch.Tensor], rungs: Sequence[Sequence[int]], costs: Sequence[Cost], limit: float
) -> list[int]:
    """How many places to keep in each coupling, so that the costs sum to ``limit`` or less.

    Again and again the step down is taken that loses least importance for what it saves, as in a knapsack filled
    greedily (Dantzig 1957). A coupling of ``scores`` [places] keeps its best places. Where even the lowest rungs cost
    more than ``limit``, these are given.
    """
    ordered = [torch.cumsum(found.double().sort().values, 0).tolist() for found in scores]
    couplings = range(len(scores))
    touching = [[cost for cost in costs if index in {**cost.inputs.of, **cost.outputs.of}] for index in couplings]
    at = [0] * len(scores)
    kept = [steps[0] for steps in rungs]
    total = sum(cost.at(kept) for cost in costs)
    while total > limit:
        best: tuple[float, int, float] | None = None
        for index, steps in enumerate(rungs):
            if at[index] + 1 == len(steps):
                continue
            lower = [*kept]
            lower[index] = steps[at[index] + 1]
            saved = sum(cost.at(kept) - cost.at(lower) for cost in touching[index])
            loss = _lost(ordered[index], kept[index], lower[index])
            if saved > 0 and (best is None or loss / saved < best[0]):
                best = (loss / saved, index, saved)
        if best is None:
            break
        _, index, saved = best
        at[index] += 1
        kept[index] = rungs[index][at[index]]
        total -= saved
    return kept


def _lost(cumulated: Sequence[float], before: int, after: int) -> float:
    """The importance of the places that go when ``after`` are kept in place of ``before``."""
    places = len(cumulated)
    gone = cumulated[places - after - 1]
    return gone - (cumulated[places - before - 1] if before < places else 0.0)
