"""Tests of timed rounds: order, warm-up, pairing, exclusion of disturbed rounds, and the sampling of requests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

import numpy as np
import pytest
from scipy import stats

from compress.benchmark import rounds as subject
from compress.benchmark.record import TimingRecord
from compress.benchmark.reference_timing import ReferenceTimes
from compress.benchmark.rounds import (
    RoundTimes,
    TimedRounds,
    batches_by_length,
    evenly_spaced,
    interleave,
    length_buckets,
    mixed_rounds,
    one_of_each_length,
    request_gaps_ms,
    sample_by_length,
    warm_up,
)


class Clock:
    """A clock that advances only while a model runs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def model(self, latency_ms: Callable[[int], float]) -> subject.Run:
        count = iter(range(1_000_000))

        def run(calls: Sequence[int]) -> RoundTimes:
            latencies = [latency_ms(next(count)) for _ in calls]
            self.seconds += sum(latencies) / 1000
            return RoundTimes(latencies)

        return run


def still() -> float:
    """Return the reference time of a machine that nothing slows down."""
    return 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(subject, "time", clock)
    return clock


def test_sampling_ends_with_its_time_budget(clock: Clock) -> None:
    rounds = TimedRounds()
    models = {"steady": clock.model(lambda _: 10.0), "restless": clock.model(lambda i: 10.0 * (1 + i % 5))}
    list(interleave(models, itertools.repeat([0]), 0, 3.99, rounds, still))
    # A round takes 10 ms and 30 ms on average, so that 3.99 s end during the 100th round.
    assert len(rounds.calls) == 100


def test_launch_has_at_least_one_round_and_order_alternates(clock: Clock) -> None:
    requested = []

    def run(name: str, calls: Sequence[int]) -> RoundTimes:
        requested.append(name)
        return RoundTimes([60_000.0] * len(calls))

    rounds = TimedRounds()
    for launch in range(4):
        list(
            interleave({name: partial(run, name) for name in "abc"}, itertools.repeat([0]), launch, 0.0, rounds, still)
        )
    assert "".join(requested) == "abccba" * 2 and rounds.launches == [0, 1, 2, 3]


def calm(*latencies_ms: float) -> RoundTimes:
    return RoundTimes(list(latencies_ms), [False] * len(latencies_ms))


def test_ratios_pair_calls_within_rounds_and_blocks() -> None:
    """The ratio of a round is the median over its calls, and the ratio of a block the median over its rounds."""
    rounds = TimedRounds(
        calls=[[0, 1, 2], [2, 1, 0], [0, 1, 2], [1, 2, 0], [0, 1, 2], [2, 0, 1]],
        launches=[0, 0, 0, 0, 0, 1],
        times={
            "a": [calm(2, 20, 90), calm(9, 8, 7), calm(6, 6, 6), calm(3, 3, 30), calm(1, 1, 1), calm(5, 5, 5)],
            "b": [calm(1, 10, 10), calm(3, 2, 1), calm(2, 2, 2), calm(2, 2, 2), calm(2, 2, 2), calm(1, 1, 1)],
        },
    )
    # Rounds: median(2, 2, 9) = 2, median(3, 4, 7) = 4, 3; median(1.5, 1.5, 15) = 1.5, 0.5, 5. Two launches, two blocks.
    assert rounds.ratios("a", "b") == pytest.approx([3.0, 1.5])
    assert rounds.ratios("b", "a") == pytest.approx([1 / 3, 1 / 1.5])


def test_pairs_with_a_disturbed_call_are_excluded() -> None:
    first = RoundTimes([2.0, 8.0, 2.0, 2.0], [False, True, False, False])
    second = RoundTimes([1.0, 1.0, 9.0, 1.0], [False, False, True, False])
    assert TimedRounds([[0, 1, 2, 3]], [0], {"a": [first], "b": [second]}).ratios("a", "b") == pytest.approx([2.0])


def test_disturbed_round_counts_only_without_alternative() -> None:
    wild = (RoundTimes([9.0, 9.0], [True, False]), RoundTimes([1.0, 1.0], [False, True]))
    still = (calm(2.0, 2.0), calm(1.0, 1.0))
    a, b = ([wild[i], still[i], wild[i], wild[i]] for i in range(2))
    both = TimedRounds([[0, 1]] * 4, [0, 0, 1, 1], {"a": a, "b": b})
    assert both.ratios("a", "b") == pytest.approx([2.0, 9.0])


def shared_machine(slowed: Sequence[bool], launches: Sequence[int] | None = None) -> TimedRounds:
    """Return rounds on a machine that is slowed down in some of them.

    Slowed rounds take 1.5 times as long for the float model, and twice as long for the integer model and reference.
    """
    rounds = TimedRounds()
    for number, slow in enumerate(slowed):
        turns = {"float": calm(6.0 if slow else 4.0), "integer": calm(4.0 if slow else 2.0)}
        rounds.add(
            [number], launches[number] if launches else number % 4, turns, 2.0 if slow else 1.0 + number % 10 / 100
        )
    return rounds


def test_rounds_on_slowed_machine_are_excluded() -> None:
    """Two thirds of the rounds are slowed: without them the ratio is 4 / 2, with them the ratio of medians is 6 / 4."""
    rounds = shared_machine([number % 3 > 0 for number in range(60)])
    assert rounds.ratios("float", "integer") == pytest.approx([1.5] * 4)
    counted = rounds.undisturbed()
    assert [calls[0] for calls in counted.calls] == list(range(0, 60, 3))
    assert counted.launches == [number % 4 for number in range(0, 60, 3)]
    assert counted.ratios("float", "integer") == pytest.approx([2.0] * 4)
    assert subject.slowed_rounds_note(rounds, counted) == (
        "20 of 60 rounds are used: around the others a reference product took "
        "up to 2.0 times as long, so other load slowed the machine"
    )


def test_reference_times_exclude_slowed_rounds() -> None:
    reference = [ReferenceTimes(0.4 if number % 2 else 0.25, 6.0) for number in range(40)]
    slowed = TimingRecord({"single": shared_machine([number % 3 > 0 for number in range(60)])}, reference=reference)
    assert [times.matmul_ms for times in slowed.undisturbed().reference] == [0.25] * 20
    quiet = TimingRecord({"single": shared_machine([False] * 60)}, reference=reference)
    assert quiet.undisturbed().reference == reference


def test_model_times_do_not_affect_exclusion_of_rounds() -> None:
    rounds = shared_machine([False] * 60)
    rounds.times["integer"][::2] = [calm(9.0)] * 30
    assert rounds.undisturbed().times == rounds.times
    assert subject.slowed_rounds_note(rounds, rounds.undisturbed()) is None


@pytest.mark.parametrize(
    ("slowed", "launches"),
    [
        ([number >= 11 for number in range(60)], None),  # eleven rounds would remain
        ([number >= 14 for number in range(150)], None),  # less than a tenth
        ([number >= 20 for number in range(60)], [number // 10 for number in range(60)]),  # two launches
    ],
)
def test_all_rounds_count_if_few_would_remain(slowed: list[bool], launches: list[int] | None) -> None:
    rounds = shared_machine(slowed, launches)
    assert rounds.undisturbed() is rounds


def test_reference_is_timed_around_every_turn() -> None:
    product_times = iter([1.0, 5.0, 2.0])
    order: list[str] = []

    def pulse() -> float:
        order.append("pulse")
        return next(product_times)

    results, slowest_ms = subject.run_round(
        {name: lambda name=name: order.append(name) or name for name in "ab"}, pulse
    )
    assert (results, slowest_ms) == ({"a": "a", "b": "b"}, 5.0)
    assert order == ["pulse", "a", "pulse", "b", "pulse"]


def test_relative_rounds_remove_differences_between_examples() -> None:
    turns = [RoundTimes([1.0, 100.0]), RoundTimes([100.0, 1.0]), RoundTimes([1.2, 120.0])]
    rounds = TimedRounds([[0, 1], [1, 0], [0, 1]], [0, 0, 0], {"a": turns})
    assert rounds.relative_rounds("a") == pytest.approx([1.0, 1.0, 1.2])


def test_warm_up_waits_until_successive_rounds_agree(clock: Clock) -> None:
    # 64, 32, ..., 2 and then always 1: the first two successive agreements end at the tenth call.
    warm = warm_up(clock.model(lambda i: 2.0 ** max(0, 6 - i)), [], [0], seconds=1e9)
    assert (warm.rounds, warm.steady) == (9, True)


def test_warm_up_visits_every_shape_once(clock: Clock) -> None:
    seen: list[int] = []

    def run(calls: Sequence[int]) -> RoundTimes:
        seen.extend(calls)
        return RoundTimes([1.0] * len(calls))

    assert warm_up(run, range(1, 20), [0], seconds=1e9).steady
    assert seen[:19] == list(range(1, 20))


def test_warm_up_lasts_minimum_time_despite_early_plateau(clock: Clock) -> None:
    # Times are also steady in the first tier of a JIT compiler, until optimized code replaces it after a second.
    warm = warm_up(clock.model(lambda i: 10.0 if i < 100 else 5.0), [], [0], seconds=1e9, least_seconds=1.2)
    assert warm.steady and 100 + (1.2 - 1.0) / 0.005 <= warm.rounds <= 145
    assert warm_up(clock.model(lambda i: 10.0), [], [0], seconds=0.5, least_seconds=1.2).rounds < 55


def test_warm_up_stops_for_unstable_model_within_budget(clock: Clock) -> None:
    warm = warm_up(clock.model(lambda i: 1.0 + i % 2), [], [0], seconds=1e9)
    assert (warm.rounds, warm.steady) == (21, False)
    clock.seconds = 0.0
    warm = warm_up(clock.model(lambda i: 1000.0 * (1 + i % 2)), range(100), [0], seconds=3.0)
    assert not warm.steady
    # Eight shapes run in one call, and a call that has started is completed.
    assert clock.seconds <= 8 * 1.5 + 2 * 2.0


def test_examples_are_sampled_once_and_ordered_by_length() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 500)
    sampled = sample_by_length(lengths, 100, seed=1)
    assert len(set(sampled)) == 100
    assert list(lengths[sampled]) == sorted(lengths[sampled])
    assert sampled == sample_by_length(lengths, 100, seed=1) != sample_by_length(lengths, 100, seed=2)
    # If there are fewer examples than requested, all are used.
    assert sample_by_length(np.array([5, 3, 4]), 10, seed=0) == [1, 2, 0]


@pytest.mark.parametrize(("count", "size"), [(256, 32), (250, 32), (7, 32), (10, 1)])
def test_every_example_is_used_once_before_any_repeats(count: int, size: int) -> None:
    calls = [i for calls in islice(mixed_rounds(count, size, seed=0), 3 * count) for i in calls]
    for start in range(0, len(calls) - count + 1, count):
        assert sorted(calls[start : start + count]) == list(range(count))


def test_rounds_are_full_and_in_random_order() -> None:
    rounds = list(islice(mixed_rounds(50, 1, seed=0), 50))
    assert {len(calls) for calls in rounds} == {1}
    assert abs(np.corrcoef([i for (i,) in rounds], np.arange(50))[0, 1]) < 0.5


def test_arrivals_are_a_poisson_process() -> None:
    gaps = np.array(request_gaps_ms(20_000, per_second=250.0, seed=0))
    # Gaps are exponential with mean 4 ms, and successive gaps are uncorrelated.
    assert stats.kstest(gaps, "expon", args=(0, 4.0)).pvalue > 0.01
    assert np.corrcoef(gaps[1:], gaps[:-1])[0, 1] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (one_of_each_length(np.array([4, 4, 7, 9, 9, 9])), [0, 2, 3]),
        (batches_by_length(10, 4), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (batches_by_length(3, 4), [[0, 1, 2, 0]]),
        (evenly_spaced(list(range(8)), 2), [2, 6]),
        (evenly_spaced(list(range(8)), 1), [4]),
        (evenly_spaced([3, 4], 5), [3, 4]),
        (length_buckets(np.arange(1, 101)), [(1, 25), (26, 50), (51, 75), (76, 100)]),
        (length_buckets(np.array([7] * 9)), [(7, 7)]),
        (length_buckets(np.array([3, 3, 3, 3, 3, 3, 8, 9])), [(3, 3), (8, 9)]),
    ],
)
def test_example_groups_match_values_by_hand(actual: object, expected: object) -> None:
    assert actual == expected
