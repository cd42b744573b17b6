"""The benchmark of drift of use and A/B at a tiny scale."""

from __future__ import annotations

import random
from pathlib import Path

import drift_of_use
import numpy as np
import pytest
import tiny
from tiny_use import write_run

from compress.numerics.differences import paired_difference

LOCAL = [name for name in drift_of_use.SHIFTS if not any(word in name for word in ("snippets", "verses", "Wikipedia"))]


def test_twenty_shifts_are_planted_and_all_change_their_rows() -> None:
    texts = tiny.texts(200)
    assert len(drift_of_use.SHIFTS) == 20
    for name in LOCAL:
        if name.startswith(("capitals", "the ")):
            continue
        changed = drift_of_use.SHIFTS[name](texts, random.Random(0))
        assert len(changed) == len(texts)
        assert sum(old != new for old, new in zip(texts, changed, strict=True)) > 40, name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_shifts_are_found_and_windows_of_one_source_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_of_use, "REFERENCE", 80)
    monkeypatch.setattr(drift_of_use, "WINDOW", 50)
    _, model = drift_of_use.opened(write_run(tmp_path / "run"))
    whole = drift_of_use.seen(model, tiny.texts(200, seed=5))
    chosen = ["web addresses", "texts three times as long", "Greek words"]
    found = drift_of_use.find_shifts(model, whole.take(np.arange(80)), tiny.texts(200, seed=6), chosen)
    assert all(found[name] for name in chosen)
    alarms = drift_of_use.windows(model, whole, 6, 200)
    assert sum(map(bool, alarms)) <= 1


def test_a_loss_is_found_after_about_as_many_requests_as_it_takes() -> None:
    assert drift_of_use.fixed_size() == 870
    right = np.arange(1000) < 850
    needed = [drift_of_use.requests_until_found(right, seed, most=6000) for seed in range(3)]
    assert min(needed) > 100 and max(needed) < 6000


def test_an_interval_of_fixed_size_is_wrong_where_one_looks_often() -> None:
    right = np.random.default_rng(0).random(1200) < 0.85
    wrong = np.array([drift_of_use.against_itself(right, seed, requests=400) for seed in range(12)])
    anytime, fixed = wrong.sum(axis=0)
    assert anytime <= 1 < fixed
    # The same outcomes by hand: the interval that is looked at is that of compare.
    assert paired_difference([1, 1], [1, 0], 0.95).value == -0.5
