from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from compress.bench import rounds as subject
from compress.bench.rounds import MINIMUM_ROUNDS, Rounds, interleave, is_narrow, warm_up


class Clock:
    """A clock that only runs while a model does."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def model(self, latency_ms: Callable[[int], float]) -> subject.Run:
        count = iter(range(1_000_000))

        def run(calls: Sequence[int]) -> list[float]:
            latencies = [latency_ms(next(count)) for _ in calls]
            self.seconds += sum(latencies) / 1000
            return latencies

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(subject, "time", clock)
    return clock


def test_sampling_stops_once_every_interval_is_narrow(clock: Clock) -> None:
    rounds = Rounds()
    models = {"a": clock.model(lambda _: 1.0), "b": clock.model(lambda i: 1.0 + 0.001 * (i % 2))}
    steps = list(interleave(models, [[0], [1], [2]], seconds=1e9, rounds=rounds))
    assert len(steps) == len(rounds.calls) == MINIMUM_ROUNDS
    assert [calls for (calls,) in rounds.calls] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_the_schedule_is_finished_before_a_narrow_interval_counts(clock: Clock) -> None:
    rounds = Rounds()
    list(interleave({"a": clock.model(lambda _: 1.0)}, [[i] for i in range(30)], 1e9, rounds))
    assert len(rounds.calls) == 30


def test_sampling_stops_at_the_budget_when_one_stays_wide(clock: Clock) -> None:
    rounds = Rounds()
    models = {"steady": clock.model(lambda _: 10.0), "wide": clock.model(lambda i: 10.0 * (1 + i % 5))}
    list(interleave(models, [[0]], seconds=3.99, rounds=rounds))
    # Each round takes 10 ms and on average 30 ms: 3.99 s are over in the 100th.
    assert len(rounds.calls) == 100


def test_a_slow_model_still_gets_its_fewest_rounds(clock: Clock) -> None:
    rounds = Rounds()
    list(interleave({"slow": clock.model(lambda _: 60_000.0)}, [[0]], seconds=1.0, rounds=rounds))
    assert len(rounds.calls) == MINIMUM_ROUNDS


def test_the_order_turns_round(clock: Clock) -> None:
    asked = []

    def spy(name: str) -> subject.Run:
        def run(calls: Sequence[int]) -> list[float]:
            asked.append(name)
            return [1.0] * len(calls)

        return run

    list(interleave({name: spy(name) for name in "abc"}, [[0]], seconds=0.0, rounds=Rounds()))
    assert "".join(asked) == "abccba" * (MINIMUM_ROUNDS // 2)


def test_warm_up_waits_until_successive_rounds_agree(clock: Clock) -> None:
    # 64, 32, ..., 2 and then 1 for good: the first two successive agreements end at the tenth call.
    warm = warm_up(clock.model(lambda i: 2.0 ** max(0, 6 - i)), [[0]], seconds=1e9)
    assert (warm.rounds, warm.steady) == (9, True)


def test_warm_up_visits_every_shape_once(clock: Clock) -> None:
    seen: list[int] = []

    def run(calls: Sequence[int]) -> list[float]:
        seen.extend(calls)
        return [1.0] * len(calls)

    assert warm_up(run, [[0, 1], [2], [3]], seconds=1e9).steady
    assert set(seen) == {0, 1, 2, 3}


def test_warm_up_gives_up_on_a_restless_model(clock: Clock) -> None:
    warm = warm_up(clock.model(lambda i: 1.0 + i % 2), [[0]], seconds=1e9)
    assert (warm.rounds, warm.steady) == (21, False)


def test_warm_up_keeps_its_budget(clock: Clock) -> None:
    warm = warm_up(clock.model(lambda i: 1000.0 * (1 + i % 2)), [[0]] * 100, seconds=3.0)
    assert not warm.steady
    assert clock.seconds <= 3.0 + 2 * 3.0 + 2.0


@pytest.mark.parametrize(("spread", "narrow"), [(0.005, True), (0.05, False)])
def test_narrow_means_two_per_cent_of_the_median(spread: float, narrow: bool) -> None:
    # Of 9 samples the interval runs from the second to the eighth: 6 spacings.
    medians = 100 * (1 + spread * np.arange(-4, 5) / 2)
    assert is_narrow(medians) is narrow
