"""The history: what goes in comes out, whole or not at all, in the order of nights."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import nights
import pytest
from nights import FIRST, HOST, SUITE, ignore, night, outcome, row

from compress.plugins.nightly.history import NightHistory
from compress.plugins.nightly.record import Host, NightFinding
from compress.results.measurement import Measurement
from compress.utils.errors import InputError, StorageError

OTHER = Host(digest="00000000000000bb", words="Another processor")


@pytest.fixture
def history(tmp_path: Path) -> NightHistory:
    return NightHistory(tmp_path / "deep" / "history.sqlite", ignore)


def test_nothing_is_there_before_the_first_night(history: NightHistory) -> None:
    assert history.read(SUITE) == ()
    assert history.series(SUITE) == ()
    assert not history.path.exists()


def test_what_goes_in_comes_out(history: NightHistory) -> None:
    finding = NightFinding(
        entry="tiny", kind="gate", metric="accuracy", target="cpu", effect=-0.01, what="lower", since="1"
    )
    first_night = night(0, [outcome(notes=("a", "b")), outcome("bad", "failed", reason="why", exit_code=-9)], [finding],
                 software={"kernel": "6"}, commit="ab" * 20)  # fmt: skip
    rows = (row("accuracy", 0.75, "ratio", spread=0.1), row("size_bytes", 123456789.0, "bytes"))
    appended = history.append(first_night, {"tiny": rows})
    assert appended == first_night.model_copy(update={"number": 1})
    assert history.read(SUITE) == (appended,)
    series = history.series(SUITE)
    assert [(line.entry, line.metric, line.unit, line.host) for line in series] == [
        ("tiny", "accuracy", "ratio", HOST),
        ("tiny", "size_bytes", "bytes", HOST),
    ]
    assert series[0].points == ((1, first_night.started, 0.75, rows[0].low, rows[0].high, True),)


def test_suites_and_hosts_are_kept_apart(history: NightHistory) -> None:
    for number in range(4):
        host = OTHER if number % 2 else HOST
        history.append(night(number, host=host), {"tiny": (row("latency_ms", 1.0 + number, "ms"),)})
    other = night(9).model_copy(update={"suite": "other"})
    history.append(other, {"tiny": (row("latency_ms", 99.0, "ms"),)})
    lines = {line.host.digest: [point.value for point in line.points] for line in history.series(SUITE)}
    assert lines == {HOST.digest: [1.0, 3.0], OTHER.digest: [2.0, 4.0]}
    assert [past_night.number for past_night in history.read(SUITE)] == [1, 2, 3, 4]
    assert [past_night.number for past_night in history.read("other")] == [5]


def test_a_clock_that_jumps_back_changes_no_order_and_is_told(history: NightHistory) -> None:
    first = history.append(night(0), {"tiny": (row("latency_ms", 1.0, "ms"),)})
    back = history.append(night(1, started=FIRST - timedelta(days=400)), {"tiny": (row("latency_ms", 2.0, "ms"),)})
    again = history.append(night(2), {"tiny": (row("latency_ms", 3.0, "ms"),)})
    assert (first.notes, again.notes) == ((), ())
    assert len(back.notes) == 1
    assert back.started in back.notes[0]
    assert first.started in back.notes[0]
    assert [point.value for point in history.series(SUITE)[0].points] == [1.0, 2.0, 3.0]
    assert history.read(SUITE)[1].notes == back.notes


@pytest.mark.parametrize("field", ["value", "low", "high"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_refused_and_nothing_is_added(
    history: NightHistory, field: str, number: float
) -> None:
    history.append(night(0), {"tiny": (row("latency_ms", 1.0, "ms"),)})
    good, bad = row("latency_ms", 2.0, "ms", spread=0.1), row("f1", 0.5, "ratio", spread=0.1)
    broken = Measurement.model_construct(**{**dict(bad), field: number})
    with pytest.raises(InputError, match="finite") as refused:
        history.append(night(1), {"tiny": (good, broken)})
    assert refused.value.where == "tiny: f1 of final on cpu"
    assert len(history.read(SUITE)) == 1
    assert [len(line.points) for line in history.series(SUITE)] == [1]


def test_a_night_that_breaks_off_is_not_in_it(history: NightHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    history.append(night(0), {"tiny": (row("latency_ms", 1.0, "ms"),)})

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.plugins.nightly.history._insert_many", stop)
    with pytest.raises(KeyboardInterrupt):
        history.append(night(1), {"tiny": (row("latency_ms", 2.0, "ms"),)})
    monkeypatch.undo()
    assert [past_night.number for past_night in history.read(SUITE)] == [1]


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from nights import NightHistory, ignore, night, outcome, row
history = NightHistory(Path(sys.argv[2]), ignore)
for place in range(15):
    rows = tuple(row(f"m{i}", place + 1.0, "ms") for i in range(40))
    history.append(night(place, [outcome(sys.argv[3])]), {sys.argv[3]: rows})
"""


def test_nights_that_end_at_once_all_get_in(history: NightHistory) -> None:
    nights_folder = str(Path(nights.__file__).parent)
    arguments = [sys.executable, "-c", WRITER, nights_folder, str(history.path)]
    writers = [subprocess.Popen([*arguments, name], stderr=subprocess.PIPE, text=True) for name in ("a", "b")]
    error_outputs = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], error_outputs
    assert [past_night.number for past_night in history.read(SUITE)] == list(range(1, 31))
    series = history.series(SUITE)
    assert len(series) == 80
    assert all([point.value for point in line.points] == [number + 1.0 for number in range(15)] for line in series)


def test_a_folder_or_a_stranger_is_no_history(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder"):
        NightHistory(tmp_path, ignore).read(SUITE)
    stranger = tmp_path / "stranger.sqlite"
    with sqlite3.connect(stranger) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    connection.close()
    bytes_before = stranger.read_bytes()
    with pytest.raises(InputError, match="no history of nights"):
        NightHistory(stranger, ignore).append(night(0), {})
    assert stranger.read_bytes() == bytes_before


def test_a_newer_schema_is_refused(history: NightHistory) -> None:
    history.append(night(0), {})
    with sqlite3.connect(history.path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(InputError, match="schema 2"):
        history.read(SUITE)


def test_a_history_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="history cannot be used"):
        NightHistory(tmp_path / "file" / "history.sqlite", ignore).append(night(0), {})


def test_beside_the_file_lie_its_lock_and_backups_alone(history: NightHistory) -> None:
    history.append(night(0), {"tiny": (row("latency_ms", 1.0, "ms"),)})
    names = {path.name for path in history.path.parent.iterdir()}
    assert names == {"history.sqlite", "history.sqlite.lock", "history.sqlite.backup-1"}
    with sqlite3.connect(history.path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        (software,) = connection.execute("SELECT software FROM nights").fetchone()
    connection.close()
    assert json.loads(software) == {}
