"""Interleaved rounds: the models take turns, so that whatever the machine does meanwhile hits them all."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from compress.numerics.statistics import median_interval

Run = Callable[[Sequence[int]], list[float]]
"""Times one call for each numbered batch, in milliseconds."""

MINIMUM_ROUNDS = 8
NARROW = 0.02
"""Width of the 95% interval of the median, as a share of the median, at which sampling may stop."""
_STEADY = 0.05
_STEADY_IN_A_ROW = 2
_WARM_UP_ROUNDS = 20


@dataclass
class Rounds:
    """What was timed. ``calls[r]`` are the batches of round r, ``latencies_ms[model][r]`` their times."""

    calls: list[list[int]] = field(default_factory=list)
    latencies_ms: dict[str, list[list[float]]] = field(default_factory=dict)

    def medians(self, model: str) -> np.ndarray:
        """Median of each round in ms, [rounds]."""
        return np.array([np.median(latencies) for latencies in self.latencies_ms[model]])


@dataclass(frozen=True)
class WarmUp:
    """How a model got warm: the rounds it took, and whether successive rounds agreed at the end."""

    rounds: int
    steady: bool


def in_turn(models: Sequence[str], round_number: int) -> list[str]:
    """The order of a round: forwards, then backwards, so that no model always follows the same one."""
    return list(models) if round_number % 2 == 0 else list(reversed(models))


def warm_up(run: Run, schedule: Sequence[Sequence[int]], seconds: float) -> WarmUp:
    """Run every round of ``schedule`` once, then the first again until successive medians agree within 5%.

    Gives up after ``seconds``, or after 20 rounds of repeating.
    """
    began = time.perf_counter()
    done = 0
    for calls in schedule[1:]:
        if time.perf_counter() - began > seconds:
            break
        run(calls)
        done += 1
    previous = float(np.median(run(schedule[0])))
    agreeing = 0
    for repeat in range(_WARM_UP_ROUNDS):
        median = float(np.median(run(schedule[0])))
        agreeing = agreeing + 1 if abs(median - previous) <= _STEADY * previous else 0
        if agreeing == _STEADY_IN_A_ROW:
            return WarmUp(done + repeat + 2, True)
        if time.perf_counter() - began > 2 * seconds:
            return WarmUp(done + repeat + 2, False)
        previous = median
    return WarmUp(done + 1 + _WARM_UP_ROUNDS, False)


def interleave(
    runs: Mapping[str, Run], schedule: Sequence[Sequence[int]], seconds: float, rounds: Rounds
) -> Iterator[None]:
    """Fill ``rounds``, yielding after each, until every model's interval is narrow or ``seconds`` are over.

    The schedule is run through at least once if time allows, and `MINIMUM_ROUNDS` are run in any case.
    """
    models = list(runs)
    rounds.latencies_ms.update({model: [] for model in models})
    began = time.perf_counter()
    for number, calls in enumerate(itertools.cycle(schedule)):
        for model in in_turn(models, number):
            rounds.latencies_ms[model].append(runs[model](calls))
        rounds.calls.append(list(calls))
        yield
        if number + 1 < MINIMUM_ROUNDS:
            continue
        if time.perf_counter() - began >= seconds:
            return
        if number + 1 >= len(schedule) and all(is_narrow(rounds.medians(model)) for model in models):
            return


def is_narrow(medians: np.ndarray) -> bool:
    """Whether the 95% interval of the median of the rounds is within `NARROW` of it."""
    low, high = median_interval(medians)
    return bool(high - low <= NARROW * np.median(medians))
