"""How long is trained: by steps as torch's own schedulers have it, and by a clock that the test moves."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from compress.stages.training import length as clock
from compress.stages.training.length import Length
from compress.utils.errors import StageError


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_rate_falls_as_transformers_schedules_do(decay: str) -> None:
    """But for a warm-up that reaches the peak in its last step, and begins above nothing."""
    steps, warmup = 40, 8
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make = get_linear_schedule_with_warmup if decay == "linear" else get_cosine_schedule_with_warmup
    schedule, length = make(optimizer, warmup, steps), Length(steps)
    for step in range(steps):
        expected = schedule.get_last_lr()[0] if step >= warmup else (step + 1) / warmup
        assert length.rate(step, warmup / steps, decay) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        schedule.step()


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(clock.time, "monotonic", lambda: self.now)


def walk(length: Length, seconds: float, now: Clock) -> list[float]:
    rates: list[float] = []
    while not length.is_over(len(rates)):
        rates.append(length.rate(len(rates), 0.1, "linear"))
        now.now += seconds
    return rates


def test_a_budget_takes_the_steps_that_fit_and_ends_near_a_rate_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock(monkeypatch)
    length = Length(3, seconds=60.0)
    length.begin()
    rates = walk(length, 0.5, now)
    assert len(rates) == 120 and length.share(120) == 1.0
    assert max(rates) == pytest.approx(1.0, abs=0.1) and rates[-1] < 0.02 and rates[0] < 0.5
    assert rates[60] == pytest.approx(0.5 / 0.9, abs=0.01)


def test_a_killed_run_has_spent_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock(monkeypatch)
    length = Length(3, seconds=10.0)
    length.go_on(4.0)
    now.now += 5.0
    assert length.seconds_spent() == 9.0 and not length.is_over(9)
    now.now += 0.5
    assert length.is_over(9)


def test_a_budget_below_one_step_is_refused_with_what_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock(monkeypatch)
    length = Length(3, seconds=2.0)
    length.begin()
    now.now += 5.0
    with pytest.raises(StageError, match=r"A budget of 2 s is too short for one step, which took 5.0 s"):
        length.is_over(1)


def test_of_a_cosine_half_the_way_is_half_the_rate() -> None:
    assert Length(100).rate(50, 0.0, "cosine") == pytest.approx((1 + math.cos(math.pi * 49 / 99)) / 2)


def test_of_seconds_the_steps_in_all_are_told_by_those_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock(monkeypatch)
    length = Length(300, seconds=60.0)
    length.begin()
    assert length.steps_in_all(0) == 300
    now.now += 6.0
    assert length.steps_in_all(12) == 120 and Length(300).steps_in_all(12) == 300
    now.now += 60.0
    assert length.steps_in_all(130) == 130
