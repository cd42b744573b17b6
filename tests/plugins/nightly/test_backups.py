"""Tests of history backups: recovery of damaged files, full disks and killed writers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import disks
import pytest
from nights import METRICS, SUITE, add, ignore, night, start_writer

from compress.plugins.nightly.history import BACKUP_COUNT, NightHistory, backups_of, is_undamaged
from compress.utils.errors import InputError, StorageError

NIGHTS, PAGE = 12, 4096


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an undamaged history of 12 nights with 40 measurements each, with its backups, and return the folder."""
    folder = tmp_path_factory.mktemp("whole")
    add(NightHistory(folder / "history.sqlite", ignore), range(NIGHTS))
    return folder


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    """Return the path of a copy of this history that tests may damage."""
    shutil.copytree(whole, tmp_path / "kept")
    return tmp_path / "kept" / "history.sqlite"


def check_values(history: NightHistory) -> int:
    """Check that nights have no gaps and all values are as written, and return the number of nights."""
    read = history.read(SUITE)
    assert [past_night.number for past_night in read] == list(range(1, len(read) + 1))
    series = history.series(SUITE)
    assert len(series) == METRICS or not read
    for line in series:
        index = int(line.metric.removeprefix("metric_"))
        assert [point.value for point in line.points] == [100.0 * number + index for number in range(len(read))]
    return len(read)


def damage(path: Path) -> bytes:
    """Overwrite the first page with zeros and return the damaged content."""
    content = b"\0" * PAGE + path.read_bytes()[PAGE:]
    path.write_bytes(content)
    assert not is_undamaged(path)
    return content


def opened(path: Path) -> tuple[NightHistory, str]:
    """Recover a damaged history and return it with the message of its first reading."""
    messages: list[str] = []
    NightHistory(path, messages.append).read(SUITE)
    assert is_undamaged(path)
    (message,) = messages
    return NightHistory(path, ignore), message


def test_last_three_backups_are_kept(whole: Path) -> None:
    path = whole / "history.sqlite"
    assert [backup.name for backup in backups_of(path)] == [f"history.sqlite.backup-{age}" for age in (1, 2, 3)]
    assert BACKUP_COUNT == 3
    assert [check_values(NightHistory(backup, ignore)) for backup in backups_of(path)] == [12, 11, 10]


def test_damaged_file_is_restored_from_its_newest_backup(path: Path) -> None:
    content = damage(path)
    history, messages = opened(path)
    assert check_values(history) == NIGHTS
    (beside,) = path.parent.glob("*.damaged-*")
    assert beside.read_bytes() == content
    for words in (str(path), beside.name, "history.sqlite.backup-1", "night 12 of 2026-08-12"):
        assert words in messages
    assert history.append(night(NIGHTS), {}).number == NIGHTS + 1


def test_damaged_backups_are_skipped_and_named(path: Path) -> None:
    for damaged in (path, *backups_of(path)[:2]):
        damage(damaged)
    history, messages = opened(path)
    assert check_values(history) == NIGHTS - 2
    assert "(history.sqlite.backup-1, history.sqlite.backup-2 cannot be read either)" in messages
    assert "ends with night 10 of 2026-08-10: what a later night had measured is lost" in messages


def test_random_corruption_is_never_read_as_values(whole: Path, tmp_path: Path) -> None:
    chance, damaged = random.Random(3), 0
    for attempt in range(12):
        folder = tmp_path / str(attempt)
        shutil.copytree(whole, folder)
        path = folder / "history.sqlite"
        content = bytearray(path.read_bytes())
        for _ in range(60):
            content[chance.randrange(2 * PAGE, len(content))] ^= 0xFF
        path.write_bytes(content)
        messages: list[str] = []
        assert check_values(NightHistory(path, messages.append)) == NIGHTS
        damaged += len(messages)
    assert damaged >= 10


@pytest.mark.parametrize("content", [b"hello\n" * 3000, b"\0" * 20_000, b"x"])
def test_file_that_is_no_history_is_not_modified(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no history"):
        NightHistory(path, ignore).append(night(0), {})
    assert path.read_bytes() == content
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "notes.txt.lock"}


def test_damaged_file_without_backup_is_not_modified(path: Path) -> None:
    content = damage(path)
    for backup in backups_of(path):
        damage(backup)
    with pytest.raises(InputError, match="no backup of it can be read"):
        NightHistory(path, ignore).read(SUITE)
    assert path.read_bytes() == content
    assert list(path.parent.glob("*.damaged-*")) == []


def test_an_empty_file_becomes_a_history(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    path.touch()
    assert NightHistory(path, ignore).read(SUITE) == ()
    assert NightHistory(path, ignore).append(night(0), {}).number == 1


def test_night_is_kept_if_the_disk_has_no_space_for_its_backup(tmp_path: Path) -> None:
    with disks.mounted(tmp_path / "disk", 4) as disk:
        path = disk / "history.sqlite"
        add(NightHistory(path, ignore), range(NIGHTS))
        # Space for the journal of a night, but not for its backup.
        disks.Filler(disk, "", room=path.stat().st_size // 2).fill()
        messages: list[str] = []
        history = NightHistory(path, messages.append)
        history.append(night(NIGHTS), {})
        assert len(messages) == 1
        assert messages[0].startswith(f"No backup of the history {path} could be written: ")
        assert [past_night.number for past_night in history.read(SUITE)] == list(range(1, NIGHTS + 2))
        night_counts = [len(NightHistory(backup, ignore).read(SUITE)) for backup in backups_of(path)]
        assert night_counts == [NIGHTS, NIGHTS - 1, NIGHTS - 2]
        disks.Filler(disk, "", room=0).fill()
        with pytest.raises(StorageError, match="history cannot be used"):
            add(history, range(NIGHTS + 1, NIGHTS + 9))
        assert [past_night.number for past_night in history.read(SUITE)][: NIGHTS + 1] == list(range(1, NIGHTS + 2))


def test_full_disk_postpones_recovery_of_a_damaged_file(tmp_path: Path) -> None:
    with disks.mounted(tmp_path / "disk", 4) as disk:
        path = disk / "history.sqlite"
        add(NightHistory(path, ignore), range(3))
        content = damage(path)
        filler = disks.Filler(disk, "", room=0)
        filler.fill()
        with pytest.raises(StorageError, match="No space left"):
            NightHistory(path, ignore).read(SUITE)
        assert path.read_bytes() == content
        assert list(disk.glob("*.damaged-*")) == list(disk.glob("*-new")) == []
        filler.file.unlink()
        assert check_values(opened(path)[0]) == 3


def test_killed_writer_leaves_complete_nights_and_intact_backups(tmp_path: Path) -> None:
    path, known, chance = tmp_path / "history.sqlite", 0, random.Random(5)
    for _ in range(6):
        writer = start_writer(path, "tiny", known, 10_000)
        while not path.exists() or path.stat().st_mtime_ns == 0 or _count(path) <= known + 2:
            assert writer.poll() is None
            time.sleep(0.01)
        time.sleep(chance.random() * 0.1)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        night_count = check_values(NightHistory(path, ignore))
        assert night_count >= known + 2
        assert backups_of(path)
        assert all(is_undamaged(backup) for backup in backups_of(path))
        known = night_count


def _count(path: Path) -> int:
    try:
        with sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10) as connection:
            (count,) = connection.execute("SELECT count(*) FROM nights").fetchone()
        connection.close()
    except sqlite3.OperationalError:
        return 0
    return int(count)
