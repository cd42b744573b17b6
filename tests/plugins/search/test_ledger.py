"""The ledger: whole lines on the disk, or none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from compress.plugins.search.ledger import Ledger, LedgerEntry, LedgerHeader
from compress.plugins.search.outcome import TrialOutcome
from compress.utils.errors import InputError, StorageError


def header() -> LedgerHeader:
    return LedgerHeader(recipe={"name": "tiny"}, knobs=(("prune", (True, False)),), rungs=(1.0,), machine={"cores": 2})


def entry(number: int) -> LedgerEntry:
    outcome = TrialOutcome(final={"accuracy": 0.5}, seconds=1.5)
    return LedgerEntry(number=number, point=(number, 0), rung=0, words="prune", identity="abc", outcome=outcome)


def test_what_was_added_is_read_in_order(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.create(header())
    for number in range(3):
        ledger.append(entry(number))
    assert Ledger(tmp_path).read() == (header(), [entry(number) for number in range(3)])


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path)
    ledger.create(header())
    ledger.append(entry(0))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="full"):
            ledger.append(entry(1))
    assert Ledger(tmp_path).read()[1] == [entry(0)]
    ledger.append(entry(1))
    assert Ledger(tmp_path).read()[1] == [entry(0), entry(1)]


def test_a_line_that_was_cut_short_anywhere_is_taken_off(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.create(header())
    ledger.append(entry(0))
    whole = ledger.path.read_bytes()
    ledger.append(entry(1))
    both = ledger.path.read_bytes()
    for cut in range(len(whole), len(both)):
        ledger.path.write_bytes(both[:cut])
        assert Ledger(tmp_path).read()[1] == [entry(0)]
        assert ledger.path.read_bytes() == whole
    ledger.append(entry(1))
    assert ledger.path.read_bytes() == both


@pytest.mark.parametrize("content", [b"", b"{}\n", b'{"version": 1}\n', b"not json\n"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    Ledger(tmp_path).path.write_bytes(content)
    with pytest.raises(InputError, match="begin anew"):
        Ledger(tmp_path).read()
