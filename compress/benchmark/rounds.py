"""Interleaved rounds: the models take turns, so that whatever the machine does meanwhile hits them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

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


@dataclass(frozen=True)
class Drawing:
    """One picture: ms of all of it, of its text, of each step of the denoiser, and of the decoder.

    ``disturbed`` has a mark for the text, for each step, and for the decoder.
    """

    picture_ms: float
    text_ms: float
    steps_ms: list[float]
    decoder_ms: float
    disturbed: list[bool]

    @property
    def loop_ms(self) -> float:
        """What lies between the calls: the scheduler, and guidance."""
        return max(0.0, self.picture_ms - self.text_ms - sum(self.steps_ms) - self.decoder_ms)


Run = Callable[[Sequence[int]], Turn]
"""Times one call for each numbered batch."""
Pulse = Callable[[], float]
"""Milliseconds that a small, fixed piece of work takes now."""
Taken = TypeVar("Taken")

_STEADY = 0.05
_STEADY_IN_A_ROW = 2
_WARM_UP_ROUNDS = 20
_SHAPES_AT_ONCE = 8
_USUAL = 0.05
"""The quantile of all pulses that is taken for what the machine does when nothing else has it."""
_SLOWED = 1.15
"""A machine that takes so many times as long as usual for the same work is slowed from outside."""
_FEWEST_LEFT, _LEAST_SHARE, _FEWEST_LAUNCHES = 12, 0.1, 3


@dataclass
class Rounds:
    """What was timed. In round r, ``calls[r]`` are the batches and ``turns[model][r]`` what they took.

    ``launches[r]`` numbers the set of processes that ran it: each launch has fresh ones, since where a process
    happens to lie in memory may make it a little faster or slower for all its life. ``pulses_ms[r]`` is the longest of
    the pulses that were taken before, between and after its turns.
    """

    calls: list[list[int]] = field(default_factory=list)
    launches: list[int] = field(default_factory=list)
    turns: dict[str, list[Turn]] = field(default_factory=dict)
    pulses_ms: list[float] = field(default_factory=list)

    def add(self, calls: Sequence[int], launch: int, turns: Mapping[str, Turn], pulse_ms: float) -> None:
        """Keep one round of all models."""
        for model, turn in turns.items():
            self.turns.setdefault(model, []).append(turn)
        self.calls.append(list(calls))
        self.launches.append(launch)
        self.pulses_ms.append(pulse_ms)

    def undisturbed(self) -> Rounds:
        """The rounds around which the machine was as fast as it is when nothing else has it.

        On a shared machine a neighbour that comes and goes halves what a core does, and doesn't slow all models alike:
        integer products lose more by it than float ones. Pulses alone decide which rounds count, never a model's own
        times, so that none is favoured: those of at most 1.15 times the 5% quantile. All rounds count where fewer
        than twelve, a tenth or three launches would be left, or the machine was never slow.
        """
        pulses = np.array(self.pulses_ms)
        if not len(pulses):
            return self
        kept = np.flatnonzero(are_usual(pulses))
        launches = len({self.launches[r] for r in kept})
        few = launches < min(_FEWEST_LAUNCHES, len(set(self.launches)))
        if len(kept) == len(pulses) or len(kept) < max(_FEWEST_LEFT, _LEAST_SHARE * len(pulses)) or few:
            return self
        return Rounds(
            [self.calls[r] for r in kept],
            [self.launches[r] for r in kept],
            {model: [turns[r] for r in kept] for model, turns in self.turns.items()},
            [self.pulses_ms[r] for r in kept],
        )

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


def are_usual(times_ms: np.ndarray) -> np.ndarray:
    """Which times of the same work, [times], are those of a machine that nothing else slows; booleans, [times]."""
    return np.asarray(times_ms <= _SLOWED * np.quantile(times_ms, _USUAL))


def note_on(whole: Rounds, counted: Rounds, of: str = "") -> str | None:
    """What a reader must know of the rounds that don't count; ``of`` says of which work they are."""
    if len(counted.calls) == len(whole.calls):
        return None
    slowest, usual = max(whole.pulses_ms), min(counted.pulses_ms)
    return (
        f"{len(counted.calls)} of {len(whole.calls)} rounds{of} count: around the others a small product took "
        f"up to {slowest / usual:.1f} times as long, so that something else had slowed the machine"
    )


def take_turns(turns: Mapping[str, Callable[[], Taken]], pulse: Pulse) -> tuple[dict[str, Taken], float]:
    """What each brings, one after another with pulses around them, and the longest pulse."""
    pulses = [pulse()]
    taken = {}
    for name, turn in turns.items():
        taken[name] = turn()
        pulses.append(pulse())
    return taken, max(pulses)


def warm_up(
    run: Run, shapes: Sequence[int], calls: Sequence[int], seconds: float, least_seconds: float = 0.0
) -> WarmUp:
    """Run one batch of every shape, then ``calls`` again and again until successive medians agree within 5%.

    Goes on for ``least_seconds`` even so; gives up after ``seconds``, or, once those are over, after 20 rounds.
    """
    began = time.perf_counter()
    for start in range(0, len(shapes), _SHAPES_AT_ONCE):
        if time.perf_counter() - began > seconds:
            break
        run(shapes[start : start + _SHAPES_AT_ONCE])
    previous = float(np.median(run(calls).latencies_ms))
    agreeing, rounds = 0, 1
    while True:
        rounds += 1
        median = float(np.median(run(calls).latencies_ms))
        agreeing = agreeing + 1 if abs(median - previous) <= _STEADY * previous else 0
        taken = time.perf_counter() - began
        steady = agreeing >= _STEADY_IN_A_ROW and taken >= least_seconds
        if steady or taken > seconds or (rounds > _WARM_UP_ROUNDS and taken >= least_seconds):
            return WarmUp(rounds, steady)
        previous = median


def interleave(
    runs: Mapping[str, Run],
    schedule: Iterable[Sequence[int]],
    launch: int,
    seconds: float,
    rounds: Rounds,
    pulse: Pulse,
) -> Iterator[None]:
    """Add rounds of one launch, at least one, yielding after each, until ``seconds`` are over.

    ``schedule`` gives the calls of the rounds and goes on from launch to launch.
    """
    models = list(runs)
    began = time.perf_counter()
    for calls in schedule:
        order = in_turn(models, len(rounds.calls))
        taken, slowest_ms = take_turns({model: partial(runs[model], calls) for model in order}, pulse)
        rounds.add(calls, launch, taken, slowest_ms)
        yield
        if time.perf_counter() - began >= seconds:
            return
