"""Interleaved rounds: the models take turns, so that whatever the machine does meanwhile hits them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Turn:
    """One model's calls of one round: ms of each, and what all of them took of the processor and of energy.

    ``disturbed`` marks the calls in which the system gave the processor to another process.
    """

    latencies_ms: list[float]
    disturbed: list[bool] = field(default_factory=list)
    cpu_ms: float = 0.0
    energy_mj: float | None = None


@dataclass(frozen=True)
class Generation:
    """One generated text: ms from the prompt to its first token, and of each token after that.

    ``tokens`` are all that came, the first included; ``disturbed`` has a mark for each of them. ``cached`` tells
    whether the graph keeps keys and values of earlier tokens.
    """

    first_ms: float
    steps_ms: list[float]
    disturbed: list[bool]
    tokens: list[int]
    cached: bool
    vocabulary: int


Run = Callable[[Sequence[int]], Turn]
"""Times one call for each numbered batch."""

_STEADY = 0.05
_STEADY_IN_A_ROW = 2
_WARM_UP_ROUNDS = 20
_SHAPES_AT_ONCE = 8


@dataclass
class Rounds:
    """What was timed. In round r, ``calls[r]`` are the batches and ``turns[model][r]`` what they took.

    ``launches[r]`` numbers the set of processes that ran it: each launch has fresh ones, since where a process
    happens to lie in memory may make it a little faster or slower for all its life.
    """

    calls: list[list[int]] = field(default_factory=list)
    launches: list[int] = field(default_factory=list)
    turns: dict[str, list[Turn]] = field(default_factory=dict)

    def latencies_ms(self, model: str) -> list[list[float]]:
        """[rounds][calls]"""
        return [turn.latencies_ms for turn in self.turns[model]]

    def by_launch(self, model: str) -> list[list[list[float]]]:
        """[launches][rounds][calls] latencies in ms."""
        grouped: dict[int, list[list[float]]] = {}
        for launch, latencies in zip(self.launches, self.latencies_ms(model), strict=True):
            grouped.setdefault(launch, []).append(latencies)
        return list(grouped.values())

    def ratios(self, baseline: str, candidate: str) -> np.ndarray:
        """How many times longer ``baseline`` takes, as many values as launches, [launches].

        Each call is paired with the other model's call for the same example in the same round; the median over
        calls is a round's ratio. The rounds, in their order, are cut into as many equal blocks as there were launches
        (so that a launch which a busy machine left with few rounds doesn't weigh like the others), and the median
        over a block is its value. Pairs in which either call was disturbed are left out, and rounds without any
        other pair, unless a block has no other.
        """
        found = []
        for first, second in zip(self.turns[baseline], self.turns[candidate], strict=True):
            pairs = np.asarray(first.latencies_ms) / np.asarray(second.latencies_ms)
            clean = ~(np.array(first.disturbed, dtype=bool) | np.array(second.disturbed, dtype=bool))
            usable = pairs[clean] if clean.any() else pairs
            found.append((float(np.median(usable)), bool(clean.any())))
        blocks = np.array_split(np.arange(len(found)), len(set(self.launches)))
        return np.array([np.median(_best([found[i] for i in block])) for block in blocks])

    def disturbed_share(self, model: str) -> float:
        """The part of a model's calls in which the processor went to another process."""
        marks = [mark for turn in self.turns[model] for mark in turn.disturbed]
        return sum(marks) / len(marks) if marks else 0.0

    def relative_rounds(self, model: str) -> np.ndarray:
        """How each round went against the whole, [rounds]: the median of its calls, each over its example's median."""
        seen: dict[int, list[float]] = {}
        for calls, latencies in zip(self.calls, self.latencies_ms(model), strict=True):
            for call, latency in zip(calls, latencies, strict=True):
                seen.setdefault(call, []).append(latency)
        typical = {call: float(np.median(latencies)) for call, latencies in seen.items()}
        return np.array(
            [
                np.median([latency / typical[call] for call, latency in zip(calls, latencies, strict=True)])
                for calls, latencies in zip(self.calls, self.latencies_ms(model), strict=True)
            ]
        )

    def relative_launches(self, model: str) -> np.ndarray:
        """How each launch went against the whole, [launches]: the median of its `relative_rounds`."""
        relative, launches = self.relative_rounds(model), np.array(self.launches)
        return np.array([np.median(relative[launches == launch]) for launch in np.unique(launches)])


def _best(rounds: Sequence[tuple[float, bool]]) -> list[float]:
    """The ratios of rounds with undisturbed calls, or all if there is none."""
    return [ratio for ratio, clean in rounds if clean] or [ratio for ratio, _ in rounds]


@dataclass(frozen=True)
class WarmUp:
    """How a model got warm: the rounds it took, and whether successive rounds agreed at the end."""

    rounds: int
    steady: bool


def in_turn(models: Sequence[str], round_number: int) -> list[str]:
    """The order of a round: forwards, then backwards, so that no model always follows the same one."""
    return list(models) if round_number % 2 == 0 else list(reversed(models))


def warm_up(run: Run, shapes: Sequence[int], calls: Sequence[int], seconds: float) -> WarmUp:
    """Run one batch of every shape, then ``calls`` again and again until successive medians agree within 5%.

    Gives up after ``seconds``, or after 20 rounds of repeating.
    """
    began = time.perf_counter()
    for start in range(0, len(shapes), _SHAPES_AT_ONCE):
        if time.perf_counter() - began > seconds:
            break
        run(shapes[start : start + _SHAPES_AT_ONCE])
    previous = float(np.median(run(calls).latencies_ms))
    agreeing = 0
    for repeat in range(_WARM_UP_ROUNDS):
        median = float(np.median(run(calls).latencies_ms))
        agreeing = agreeing + 1 if abs(median - previous) <= _STEADY * previous else 0
        if agreeing == _STEADY_IN_A_ROW:
            return WarmUp(repeat + 2, True)
        if time.perf_counter() - began > seconds:
            return WarmUp(repeat + 2, False)
        previous = median
    return WarmUp(1 + _WARM_UP_ROUNDS, False)


def interleave(
    runs: Mapping[str, Run],
    schedule: Iterable[Sequence[int]],
    launch: int,
    seconds: float,
    rounds: Rounds,
) -> Iterator[None]:
    """Add rounds of one launch, at least one, yielding after each, until ``seconds`` are over.

    ``schedule`` gives the calls of the rounds and goes on from launch to launch.
    """
    models = list(runs)
    for model in models:
        rounds.turns.setdefault(model, [])
    began = time.perf_counter()
    for calls in schedule:
        taken = {model: runs[model](calls) for model in in_turn(models, len(rounds.calls))}
        for model in models:
            rounds.turns[model].append(taken[model])
        rounds.calls.append(list(calls))
        rounds.launches.append(launch)
        yield
        if time.perf_counter() - began >= seconds:
            return
