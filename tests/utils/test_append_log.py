"""Lines that are only ever added."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from compress.utils.append_log import AppendOnlyFile
from compress.utils.errors import StorageError


def test_a_disk_that_takes_few_bytes_at_a_time_gets_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:3]))
    lines = AppendOnlyFile(tmp_path / "lines")
    lines.add(b"the first")
    lines.add(b"the second")
    assert lines.path.read_bytes() == b"the first\nthe second\n"


def test_a_disk_that_is_full_in_the_middle_of_a_line_keeps_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = AppendOnlyFile(tmp_path / "lines")
    lines.add(b"the first")
    write, room = os.write, [4]

    def filling(descriptor: int, content: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(descriptor, content[: room[0]])
        room[0] -= taken
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", filling)
        with pytest.raises(StorageError, match="full"):
            lines.add(b"the second")
    assert lines.path.read_bytes() == b"the first\n"


def test_what_stands_behind_the_last_line_break_is_no_line(tmp_path: Path) -> None:
    lines = AppendOnlyFile(tmp_path / "lines")
    lines.add(b"one")
    lines.add("zwei \u2028 lines for str.splitlines".encode())
    with lines.path.open("ab") as file:
        file.write(b"cut sho")
    whole_lines, incomplete = lines.read()
    assert (len(whole_lines), incomplete) == (2, b"cut sho")
    assert lines.read(4)[0] == whole_lines[1:]
    assert lines.repair() == 7
    assert lines.read() == (whole_lines, b"")
