"""Interleaved rounds: models are timed one after another in each round, so that a disturbance affects all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np


@dataclass(frozen=True)
class RoundTimes:
    """Times of one model's calls in one round, and the processor time and energy of all of them together.

    ``disturbed`` marks the calls during which the system gave the processor to another process.
    """

    latencies_ms: list[float]
    disturbed: list[bool] = field(default_factory=list)
    cpu_ms: float = 0.0
    energy_mj: float | None = None


@dataclass(frozen=True)
class GenerationTimes:
    """Times of one generated text in ms: from the prompt to its first token, and of each token after that.

    ``tokens`` are all generated ids, the first included. ``disturbed`` has a mark for each of them. ``cached`` states
    whether the graph keeps keys and values of earlier tokens.
    """

    first_ms: float
    steps_ms: list[float]
    disturbed: list[bool]
    tokens: list[int]
    cached: bool
    vocabulary: int


@dataclass(frozen=True)
class ImageTimes:
    """Times of one generated image in ms: of all of it, its text encoder, each denoiser step, and the decoder.

    ``disturbed`` has a mark for the text encoder, for each step, and for the decoder.
    """

    image_ms: float
    text_ms: float
    steps_ms: list[float]
    decoder_ms: float
    disturbed: list[bool]

    @property
    def loop_ms(self) -> float:
        """Return the time between the calls of components: the scheduler and guidance."""
        return max(0.0, self.image_ms - self.text_ms - sum(self.steps_ms) - self.decoder_ms)


Run = Callable[[Sequence[int]], RoundTimes]
"""Function that times one call for each numbered batch."""
ProductTimer = Callable[[], float]
"""Function that times a small, fixed matrix product, in ms."""
Timed = TypeVar("Timed")

_STEADY = 0.05
_STEADY_IN_A_ROW = 2
_WARM_UP_ROUNDS = 20
_SHAPES_AT_ONCE = 8
_USUAL = 0.05
"""Quantile of the product's times that stands for an undisturbed machine."""
_SLOWED = 1.15
"""Ratio to the undisturbed time of the same work from which on the machine counts as slowed from outside."""
_FEWEST_LEFT, _LEAST_SHARE, _FEWEST_LAUNCHES = 12, 0.1, 3


@dataclass
class TimedRounds:
    """Times of all rounds. In round r, ``calls[r]`` are the batches and ``times[model][r]`` their times.

    ``launches[r]`` numbers the set of processes that ran the round. Each launch starts fresh processes, because the
    position of a process in memory may make it a little faster or slower for all its life. ``product_ms[r]`` is the
    longest time of the reference product before, between and after the round's calls.
    """

    calls: list[list[int]] = field(default_factory=list)
    launches: list[int] = field(default_factory=list)
    times: dict[str, list[RoundTimes]] = field(default_factory=dict)
    product_ms: list[float] = field(default_factory=list)

    def add(self, calls: Sequence[int], launch: int, times: Mapping[str, RoundTimes], product_ms: float) -> None:
        """Append one round of all models.

        Args:
            calls: Batches that each model was timed on.
            launch: Number of the set of processes.
            times: Times of each model.
            product_ms: Longest time of the reference product during the round.
        """
        for model, round_times in times.items():
            self.times.setdefault(model, []).append(round_times)
        self.calls.append(list(calls))
        self.launches.append(launch)
        self.product_ms.append(product_ms)

    def undisturbed(self) -> TimedRounds:
        """Return the rounds during which no other work slowed the machine.

        On a shared machine, other work can halve the speed of a core. It doesn't slow all models alike: integer
        products lose more than float ones. Only the times of the reference product decide which rounds count, never a
        model's own times, so that no model is favoured. Rounds with at most 1.15 times the 5% quantile of these times
        count. All rounds count if fewer than twelve, a tenth, or three launches would remain, or if the machine was
        never slow.
        """
        product_ms = np.array(self.product_ms)
        if not len(product_ms):
            return self
        # The limits below keep enough rounds for an interval, so a busy machine gives a wide interval instead of none.
        usable = np.flatnonzero(is_undisturbed(product_ms))
        launches = len({self.launches[r] for r in usable})
        few = launches < min(_FEWEST_LAUNCHES, len(set(self.launches)))
        if len(usable) == len(product_ms) or len(usable) < max(_FEWEST_LEFT, _LEAST_SHARE * len(product_ms)) or few:
            return self
        return TimedRounds(
            [self.calls[r] for r in usable],
            [self.launches[r] for r in usable],
            {model: [times[r] for r in usable] for model, times in self.times.items()},
            [self.product_ms[r] for r in usable],
        )

    def latencies_ms(self, model: str) -> list[list[float]]:
        """Return the latencies of a model in ms, [rounds][calls]."""
        return [round_times.latencies_ms for round_times in self.times[model]]

    def by_launch(self, model: str) -> list[list[list[float]]]:
        """Return the latencies of a model in ms, [launches][rounds][calls]."""
        grouped: dict[int, list[list[float]]] = {}
        for launch, latencies in zip(self.launches, self.latencies_ms(model), strict=True):
            grouped.setdefault(launch, []).append(latencies)
        return list(grouped.values())

    def ratios(self, baseline: str, candidate: str) -> np.ndarray:
        """Return the latency of ``baseline`` divided by that of ``candidate``, one value for each launch, [launches].

        Each call is paired with the other model's call on the same example in the same round. The median over calls is
        the ratio of a round. The rounds, in their order, are split into as many equal blocks as there were launches, so
        that a launch with few rounds doesn't have the weight of a full one. The median over a block is its value. Pairs
        in which either call was disturbed don't count, and rounds without any undisturbed pair don't count either,
        unless a block has no other rounds.
        """
        ratios, usable = np.empty(len(self.calls)), np.empty(len(self.calls), dtype=bool)
        for number, times in enumerate(zip(self.times[baseline], self.times[candidate], strict=True)):
            first, second = (np.asarray(one.latencies_ms) for one in times)
            disturbed = np.any([np.array(one.disturbed, dtype=bool) for one in times], axis=0)
            usable[number] = not disturbed.all()
            ratios[number] = np.median((first / second)[~disturbed] if usable[number] else first / second)
        # A block uses its undisturbed rounds, or all of its rounds if every one was disturbed.
        blocks = np.array_split(np.arange(len(ratios)), len(set(self.launches)))
        return np.array([np.median(ratios[block[usable[block]] if usable[block].any() else block]) for block in blocks])

    def relative_rounds(self, model: str) -> np.ndarray:
        """Return the time of each round relative to the whole, [rounds].

        It is the median of its calls, each divided by the median of its example.
        """
        # Examples differ in length, so each call is compared with the same example only.
        by_call: dict[int, list[float]] = {}
        rounds = [list(zip(*pair, strict=True)) for pair in zip(self.calls, self.latencies_ms(model), strict=True)]
        for call, latency in (timed for calls in rounds for timed in calls):
            by_call.setdefault(call, []).append(latency)
        typical = {call: float(np.median(latencies)) for call, latencies in by_call.items()}
        return np.array([np.median([latency / typical[call] for call, latency in calls]) for calls in rounds])

    def relative_launches(self, model: str) -> np.ndarray:
        """Return the time of each launch relative to the whole, [launches]: the median of its `relative_rounds`."""
        relative, launches = self.relative_rounds(model), np.array(self.launches)
        return np.array([np.median(relative[launches == launch]) for launch in np.unique(launches)])


@dataclass(frozen=True)
class WarmUp:
    """Warm-up of one model: the number of rounds, and whether successive rounds agreed at the end."""

    rounds: int
    steady: bool


def round_order(models: Sequence[str], round_number: int) -> list[str]:
    """Return the order of models in a round: forwards, then backwards, so that no model always follows the same one."""
    return list(models) if round_number % 2 == 0 else list(reversed(models))


def is_undisturbed(times_ms: np.ndarray) -> np.ndarray:
    """Return which times of the same work are those of an undisturbed machine, as booleans [times]."""
    return np.asarray(times_ms <= _SLOWED * np.quantile(times_ms, _USUAL))


def slowed_rounds_note(whole: TimedRounds, counted: TimedRounds, of: str = "") -> str | None:
    """Return a note on the rounds that don't count, or None if all count.

    Args:
        whole: All rounds.
        counted: Rounds that count.
        of: Phrase that names their work, such as ` of context 128`.
    """
    if len(counted.calls) == len(whole.calls):
        return None
    slowest, usual = max(whole.product_ms), min(counted.product_ms)
    return (
        f"{len(counted.calls)} of {len(whole.calls)} rounds{of} are used: around the others a reference product took "
        f"up to {slowest / usual:.1f} times as long, so other load slowed the machine"
    )


def run_round(runs: Mapping[str, Callable[[], Timed]], time_product: ProductTimer) -> tuple[dict[str, Timed], float]:
    """Run each model's calls with the reference product before, between and after them.

    Returns:
        The result of each model, and the longest time of the product in ms.
    """
    product_ms = [time_product()]
    results = {}
    for name, run in runs.items():
        results[name] = run()
        product_ms.append(time_product())
    return results, max(product_ms)


def warm_up(
    run: Run, shapes: Sequence[int], calls: Sequence[int], seconds: float, least_seconds: float = 0.0
) -> WarmUp:
    """Run one batch of every shape, then ``calls`` repeatedly until successive medians agree within 5%.

    Args:
        run: Function that times batches.
        shapes: One batch of each input shape, since a runtime plans its memory anew for every shape.
        calls: Batches of a warm-up round.
        seconds: Time after which warm-up ends, even if the medians don't agree. After 20 rounds it ends as well.
        least_seconds: Time for which warm-up continues in any case.
    """
    began = time.perf_counter()
    # A few shapes at a time, so that the time limit can end the loop between them.
    for start in range(0, len(shapes), _SHAPES_AT_ONCE):
        if time.perf_counter() - began > seconds:
            break
        run(shapes[start : start + _SHAPES_AT_ONCE])
    previous = float(np.median(run(calls).latencies_ms))
    agreeing, rounds = 0, 1
    while True:
        rounds += 1
        median = float(np.median(run(calls).latencies_ms))
        # One agreement may be chance, so several in a row count.
        agreeing = agreeing + 1 if abs(median - previous) <= _STEADY * previous else 0
        elapsed = time.perf_counter() - began
        steady = agreeing >= _STEADY_IN_A_ROW and elapsed >= least_seconds
        if steady or elapsed > seconds or (rounds > _WARM_UP_ROUNDS and elapsed >= least_seconds):
            return WarmUp(rounds, steady)
        previous = median


def interleave(
    runs: Mapping[str, Run],
    schedule: Iterable[Sequence[int]],
    launch: int,
    seconds: float,
    rounds: TimedRounds,
    pulse: ProductTimer,
) -> Iterator[None]:
    """Add rounds of one launch, at least one, and yield after each until ``seconds`` are over.

    Args:
        runs: Function of each model that times batches.
        schedule: Batches of each round. It continues from launch to launch.
        launch: Number of the set of processes.
        seconds: Time for the rounds of this launch.
        rounds: Record that rounds are added to.
        pulse: Function that times the reference product.
    """
    models = list(runs)
    began = time.perf_counter()
    for calls in schedule:
        # The order alternates, since a model may find warm caches after another one.
        order = round_order(models, len(rounds.calls))
        times, product_ms = run_round({model: partial(runs[model], calls) for model in order}, pulse)
        rounds.add(calls, launch, times, product_ms)
        yield
        if time.perf_counter() - began >= seconds:
            return


Groups = list[list[int]]


def sample_by_length(lengths: np.ndarray, count: int, seed: int) -> list[int]:
    """Return up to ``count`` random examples without replacement, in the order of their lengths."""
    sampled = np.random.default_rng(seed).permutation(len(lengths))[:count]
    return [int(i) for i in sampled[np.argsort(lengths[sampled], kind="stable")]]


def mixed_rounds(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yield rounds of ``size`` of ``count`` examples without end, every example once before any repeats.

    Each pass over the examples has a new random order. A round at its end takes the remainder from the next pass.
    """
    generator = np.random.default_rng(seed)
    pending: list[int] = []
    while True:
        while len(pending) < size:
            pending += generator.permutation(count).tolist()
        yield pending[:size]
        pending = pending[size:]


def one_of_each_length(lengths: np.ndarray) -> list[int]:
    """Return the first example of each length, since a runtime plans its memory anew for every shape."""
    _, first = np.unique(lengths, return_index=True)
    return [int(i) for i in first]


def request_gaps_ms(count: int, per_second: float, seed: int) -> list[float]:
    """Return times between requests of a Poisson process in ms: exponential with mean 1000 / ``per_second``."""
    gaps: list[float] = np.random.default_rng(seed).exponential(1000 / per_second, count).tolist()
    return gaps


def batches_by_length(count: int, size: int) -> Groups:
    """Return batches of exactly ``size`` of ``count`` examples sorted by length, which need little padding.

    A short remainder is left out. Fewer examples than one batch are repeated to fill it.
    """
    if count < size:
        return [[i % count for i in range(size)]]
    return [list(range(start, start + size)) for start in range(0, count - size + 1, size)]


def evenly_spaced(items: list[int], count: int) -> list[int]:
    """Return ``count`` of ``items``, spread over the list without its ends, or all if there are fewer."""
    if count >= len(items):
        return items
    return [items[int((k + 0.5) * len(items) / count)] for k in range(count)]


def length_buckets(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Return the quarters of the data by length as (shortest, longest), fewer if equal lengths lie on a boundary."""
    # Equal quartiles collapse into one boundary, so no bucket is empty.
    edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75, 1.0], method="inverted_cdf"))
    buckets = []
    below = -1
    for edge in edges:
        inside = lengths[(lengths > below) & (lengths <= edge)]
        buckets.append((int(inside.min()), int(inside.max())))
        below = edge
    return buckets
