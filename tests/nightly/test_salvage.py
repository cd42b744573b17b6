"""A damaged history: what can be read is kept, the damaged file is kept too, and it is said."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from nights import SUITE, ignore, night, outcome, row

from compress.errors import InputError
from compress.nightly.history import History
from compress.nightly.salvage import is_sound

NIGHTS, METRICS, PAGE = 30, 40, 4096


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sound history of 30 nights of 40 rows."""
    path = tmp_path_factory.mktemp("whole") / "history.sqlite"
    history = History(path, ignore)
    for place in range(NIGHTS):
        rows = tuple(row(f"metric_{index}", 100.0 * place + index, "ms", spread=0.01) for index in range(METRICS))
        history.append(night(place, [outcome()]), {"tiny": rows})
    assert is_sound(path)
    return path.read_bytes()


def salvaged(folder: Path, content: bytes) -> tuple[History, list[str]]:
    """The history of a damaged file, and what was said while it was read for the first time."""
    path = folder / "history.sqlite"
    path.write_bytes(content)
    assert not is_sound(path)
    said: list[str] = []
    history = History(path, said.append)
    history.nights(SUITE)
    (beside,) = folder.glob("history.sqlite.damaged-*")
    assert beside.read_bytes() == content
    assert len(said) == 1
    assert beside.name in said[0]
    assert is_sound(path)
    return History(path, ignore), said


def check_values(history: History) -> int:
    """How many measurements are left; every one is what was put in."""
    count = 0
    for one in history.series(SUITE):
        index = int(one.metric.removeprefix("metric_"))
        assert all(point.value == 100.0 * (point.night - 1) + index for point in one.points)
        count += len(one.points)
    return count


def test_a_lost_page_costs_only_its_own_rows(tmp_path: Path, whole: bytes) -> None:
    # The last pages are leaves of the measurements: one of 40 to 60 rows.
    pages = len(whole) // PAGE
    history, said = salvaged(tmp_path, whole[: (pages - 4) * PAGE] + b"\xff" * PAGE + whole[(pages - 3) * PAGE :])
    left = check_values(history)
    assert NIGHTS * METRICS - 80 <= left < NIGHTS * METRICS
    assert len(history.nights(SUITE)) == NIGHTS
    assert f"{NIGHTS} nights and {left} measurements" in said[0]


def test_any_lost_page_costs_at_most_its_own_rows(tmp_path: Path, whole: bytes) -> None:
    for page in range(1, len(whole) // PAGE):
        path = tmp_path / f"{page}.sqlite"
        path.write_bytes(whole[: page * PAGE] + b"\xff" * PAGE + whole[(page + 1) * PAGE :])
        history = History(path, lambda message: None)
        read = history.nights(SUITE)
        assert [one.number for one in read] == list(range(1, NIGHTS + 1))
        assert [one.started for one in read] == [night(place).started for place in range(NIGHTS)]
        # Fifty or so measurements fit on a page of 4096 bytes.
        assert check_values(history) >= NIGHTS * METRICS - 80


def test_a_long_text_over_several_pages_is_read(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    reason = "äöü" * 20_000
    History(path, ignore).append(night(0, [outcome(reason=reason), outcome("b", reason="short")]), {})
    path.write_bytes(b"\0" * 100 + path.read_bytes()[100:])
    (read,) = History(path, lambda message: None).nights(SUITE)
    assert [one.reason for one in read.outcomes] == [reason, "short"]


def test_a_lost_header_costs_nothing(tmp_path: Path, whole: bytes) -> None:
    history, _ = salvaged(tmp_path, b"\0" * PAGE + whole[PAGE:])
    assert check_values(history) == NIGHTS * METRICS
    assert [one.number for one in history.nights(SUITE)] == list(range(1, NIGHTS + 1))


def test_a_file_cut_short_keeps_its_first_part(tmp_path: Path, whole: bytes) -> None:
    history, _ = salvaged(tmp_path, whole[: len(whole) // 2 + 100])
    assert 0.3 * NIGHTS * METRICS < check_values(history) < 0.6 * NIGHTS * METRICS


def test_the_next_night_goes_on_where_the_numbers_stood(tmp_path: Path, whole: bytes) -> None:
    history, _ = salvaged(tmp_path, b"\0" * PAGE + whole[PAGE:])
    assert history.append(night(NIGHTS), {}).number == NIGHTS + 1


def test_bytes_turned_over_by_chance_never_come_back_as_numbers(tmp_path: Path, whole: bytes) -> None:
    chance = random.Random(3)
    damaged = 0
    for attempt in range(12):
        content = bytearray(whole)
        for _ in range(60):
            content[chance.randrange(2 * PAGE, len(content))] ^= 0xFF
        path = tmp_path / f"{attempt}.sqlite"
        path.write_bytes(content)
        said: list[str] = []
        history = History(path, said.append)
        read = history.nights(SUITE)
        assert all(one.suite == SUITE for one in read)
        assert is_sound(path)
        damaged += len(said)
    assert damaged >= 10


@pytest.mark.parametrize("content", [b"hello\n" * 3000, b"\0" * 20_000, b"x"])
def test_a_file_without_a_night_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no history"):
        History(path, ignore).append(night(0), {})
    assert path.read_bytes() == content
    assert list(tmp_path.glob("*damaged*")) == []


def test_an_empty_file_becomes_a_history(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    path.touch()
    assert History(path, ignore).nights(SUITE) == ()
    assert History(path, ignore).append(night(0), {}).number == 1
