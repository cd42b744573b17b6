from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest

from compress.bench import rounds as subject
from compress.bench.rounds import Rounds, Turn, interleave, warm_up


class Clock:
    """A clock that only runs while a model does."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def model(self, latency_ms: Callable[[int], float]) -> subject.Run:
        count = iter(range(1_000_000))

        def run(calls: Sequence[int]) -> Turn:
            latencies = [latency_ms(next(count)) for _ in calls]
            self.seconds += sum(latencies) / 1000
            return Turn(latencies)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(subject, "time", clock)
    return clock


def test_sampling_ends_when_its_time_is_over(clock: Clock) -> None:
    rounds = Rounds()
    models = {"steady": clock.model(lambda _: 10.0), "restless": clock.model(lambda i: 10.0 * (1 + i % 5))}
    list(interleave(models, itertools.repeat([0]), 0, 3.99, rounds))
    # Each round takes 10 ms and on average 30 ms: 3.99 s are over in the 100th.
    assert len(rounds.calls) == 100


def test_a_launch_of_a_slow_model_has_one_round(clock: Clock) -> None:
    rounds = Rounds()
    for launch in range(3):
        list(interleave({"slow": clock.model(lambda _: 60_000.0)}, itertools.repeat([0]), launch, 1.0, rounds))
    assert rounds.launches == [0, 1, 2]


def test_the_order_turns_round_across_launches(clock: Clock) -> None:
    asked = []

    def spy(name: str) -> subject.Run:
        def run(calls: Sequence[int]) -> Turn:
            asked.append(name)
            return Turn([1.0] * len(calls))

        return run

    rounds = Rounds()
    for launch in range(4):
        list(interleave({name: spy(name) for name in "abc"}, itertools.repeat([0]), launch, 0.0, rounds))
    assert "".join(asked) == "abccba" * 2


def calm(*latencies_ms: float) -> Turn:
    return Turn(list(latencies_ms), [False] * len(latencies_ms))


def test_ratios_pair_calls_within_rounds_and_blocks() -> None:
    """By hand: a round's ratio is the median of its calls', a block's the median of its rounds'."""
    rounds = Rounds(
        calls=[[0, 1, 2], [2, 1, 0], [0, 1, 2], [1, 2, 0], [0, 1, 2], [2, 0, 1]],
        launches=[0, 0, 0, 0, 0, 1],
        turns={
            "a": [calm(2, 20, 90), calm(9, 8, 7), calm(6, 6, 6), calm(3, 3, 30), calm(1, 1, 1), calm(5, 5, 5)],
            "b": [calm(1, 10, 10), calm(3, 2, 1), calm(2, 2, 2), calm(2, 2, 2), calm(2, 2, 2), calm(1, 1, 1)],
        },
    )
    # Rounds: median(2, 2, 9) = 2, median(3, 4, 7) = 4, 3; median(1.5, 1.5, 15) = 1.5, 0.5, 5. Two launches, two blocks.
    assert rounds.ratios("a", "b") == pytest.approx([3.0, 1.5])
    assert rounds.ratios("b", "a") == pytest.approx([1 / 3, 1 / 1.5])


def test_pairs_with_a_disturbed_call_are_left_out() -> None:
    first = Turn([2.0, 8.0, 2.0, 2.0], [False, True, False, False])
    second = Turn([1.0, 1.0, 9.0, 1.0], [False, False, True, False])
    assert Rounds([[0, 1, 2, 3]], [0], {"a": [first], "b": [second]}).ratios("a", "b") == pytest.approx([2.0])
    assert Rounds([[0, 1, 2, 3]], [0], {"a": [first]}).disturbed_share("a") == 0.25


def test_a_wholly_disturbed_round_counts_only_where_there_is_no_other() -> None:
    wild = (Turn([9.0, 9.0], [True, False]), Turn([1.0, 1.0], [False, True]))
    still = (calm(2.0, 2.0), calm(1.0, 1.0))
    a, b = ([wild[i], still[i], wild[i], wild[i]] for i in range(2))
    both = Rounds([[0, 1]] * 4, [0, 0, 1, 1], {"a": a, "b": b})
    assert both.ratios("a", "b") == pytest.approx([2.0, 9.0])


def test_relative_rounds_take_out_what_examples_differ_by() -> None:
    turns = [Turn([1.0, 100.0]), Turn([100.0, 1.0]), Turn([1.2, 120.0])]
    rounds = Rounds([[0, 1], [1, 0], [0, 1]], [0, 0, 0], {"a": turns})
    assert rounds.relative_rounds("a") == pytest.approx([1.0, 1.0, 1.2])


def test_warm_up_waits_until_successive_rounds_agree(clock: Clock) -> None:
    # 64, 32, ..., 2 and then 1 for good: the first two successive agreements end at the tenth call.
    warm = warm_up(clock.model(lambda i: 2.0 ** max(0, 6 - i)), [], [0], seconds=1e9)
    assert (warm.rounds, warm.steady) == (9, True)


def test_warm_up_visits_every_shape_once(clock: Clock) -> None:
    seen: list[int] = []

    def run(calls: Sequence[int]) -> Turn:
        seen.extend(calls)
        return Turn([1.0] * len(calls))

    assert warm_up(run, range(1, 20), [0], seconds=1e9).steady
    assert seen[:19] == list(range(1, 20))


def test_warm_up_gives_up_on_a_restless_model(clock: Clock) -> None:
    warm = warm_up(clock.model(lambda i: 1.0 + i % 2), [], [0], seconds=1e9)
    assert (warm.rounds, warm.steady) == (21, False)


def test_warm_up_keeps_its_budget(clock: Clock) -> None:
    warm = warm_up(clock.model(lambda i: 1000.0 * (1 + i % 2)), range(100), [0], seconds=3.0)
    assert not warm.steady
    # Eight shapes are run at once, and what was begun is ended.
    assert clock.seconds <= 8 * 1.5 + 2 * 2.0
