from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import disks
import pytest
from loopback_sshd import Server

from compress.plugins.devices.connection import Connection
from compress.plugins.devices.device_host import ENVIRONMENT_BYTES, Blob, send_blobs
from compress.plugins.devices.session import open_session
from compress.utils.errors import DeviceError
from compress.utils.progress import SilentProgress

Item = TypeVar("Item")
MEGABYTE = 1 << 20


class Cutting(SilentProgress):
    """A progress that counts steps and drops all connections once, after ``after`` steps."""

    def __init__(self, server: Server, after: int | None = None) -> None:
        self._server, self._after = server, after
        self.steps = 0

    def track(self, items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
        for item in items:
            yield item
            self.steps += 1
            if self.steps == self._after:
                assert self._server.drop_connections() >= 1


def made(folder: Path, name: str, size: int) -> Blob:
    (folder / name).write_bytes(os.urandom(size))
    return Blob.from_file(folder / name)


def sent(connection: Connection, blobs: list[Blob], progress: SilentProgress) -> int:
    with open_session(connection) as session:
        return send_blobs(connection, session, blobs, [], progress)


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Require no disk space for an environment, since these tests create none."""
    monkeypatch.setattr("compress.plugins.devices.device_host.ENVIRONMENT_BYTES", 0)


def test_existing_blobs_are_not_sent_again(server: Server, tmp_path: Path) -> None:
    cache, progress = tmp_path / "cache", Cutting(server)
    first, second = made(tmp_path, "a", 3 * MEGABYTE + 5), made(tmp_path, "b", 7)
    twin = Blob.from_file(tmp_path / "b")
    empty = made(tmp_path, "c", 0)
    with server.connect(server.device(cache)) as connection:
        assert sent(connection, [first, second, twin], progress) == first.size + second.size
        assert progress.steps == 5
        assert sent(connection, [first, second], progress) == 0
        assert sent(connection, [first, second, empty], progress) == 0
    stored = {path.name: path.read_bytes() for path in (cache / "blobs").iterdir()}
    assert stored.keys() == {first.digest, second.digest, empty.digest}
    assert all(hashlib.sha256(content).hexdigest() == name for name, content in stored.items())
    assert list((cache / "sessions").iterdir()) == [], "a session that has ended leaves nothing"


def test_interrupted_copy_is_resumed(server: Server, tmp_path: Path) -> None:
    big = made(tmp_path, "big", 8 * MEGABYTE)
    progress = Cutting(server, after=5)
    with server.connect(server.device(tmp_path / "cache")) as connection:
        # The count includes bytes that are sent more than once.
        assert sent(connection, [big], progress) == big.size
    assert progress.steps == 8
    assert (tmp_path / "cache" / "blobs" / big.digest).read_bytes() == big.file.read_bytes()


def test_partial_blobs_are_resumed_unless_damaged(server: Server, tmp_path: Path) -> None:
    good, bad = made(tmp_path, "good", 4 * MEGABYTE), made(tmp_path, "bad", 2 * MEGABYTE)
    blobs = tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{good.digest}.part").write_bytes(good.file.read_bytes()[: 3 * MEGABYTE + 100])
    (blobs / f"{bad.digest}.part").write_bytes(b"x" * (MEGABYTE + 100))
    with server.connect(server.device(tmp_path / "cache")) as connection:
        # The last MB of `good`, the second MB of `bad`, and then both MB of `bad`.
        assert sent(connection, [good, bad], SilentProgress()) == (1 + 1 + 2) * MEGABYTE
    for blob in (good, bad):
        assert (blobs / blob.digest).read_bytes() == blob.file.read_bytes()


def test_file_changed_during_the_transfer_is_refused(server: Server, tmp_path: Path) -> None:
    blob = made(tmp_path, "a", 10)
    blob.file.write_bytes(b"other byte")
    device = server.device(tmp_path / "cache")
    with server.connect(device) as connection, pytest.raises(DeviceError, match="not what was sent"):
        sent(connection, [blob], SilentProgress())
    assert list((tmp_path / "cache" / "blobs").iterdir()) == []


def test_insufficient_disk_space_is_refused_before_sending(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.plugins.devices.device_host.ENVIRONMENT_BYTES", ENVIRONMENT_BYTES)
    with disks.mounted(tmp_path / "disk", 30) as disk, server.connect(server.device(disk / "cache")) as connection:
        with pytest.raises(DeviceError, match=r"too little room: 3[01] MB are free") as caught:
            sent(connection, [made(tmp_path, "a", 2 * MEGABYTE)], SilentProgress())
        assert "622 MB, of which 600 MB are for an environment" in str(caught.value)
        assert list((disk / "cache" / "blobs").iterdir()) == []


def test_disk_full_during_the_transfer_is_an_error(server: Server, tmp_path: Path) -> None:
    with disks.mounted(tmp_path / "disk", 30) as disk, server.connect(server.device(disk / "cache")) as connection:
        filling = disks.Filler(disk, "Copying", room=MEGABYTE)
        with pytest.raises(DeviceError, match="cannot write what is sent"):
            sent(connection, [made(tmp_path, "a", 4 * MEGABYTE)], filling)
        assert [path.suffix for path in (disk / "cache" / "blobs").iterdir()] == [".part"]
