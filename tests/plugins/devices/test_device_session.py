from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from loopback_sshd import Server

from compress.plugins.devices.blobs import Blob, send_blobs
from compress.plugins.devices.connection import Connection
from compress.plugins.devices.session import bootstrap_program, follow_session, open_session
from compress.utils.errors import DeviceError
from compress.utils.progress import SilentProgress

SCRIPT = """
import json, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from compress.plugins.devices.agent import RESULT, write_json
from compress.plugins.devices.bootstrap import append_progress
def main(place):
    folder = pathlib.Path(place)
    for done in range(1, 5):
        time.sleep(0.3)
        append_progress(folder, {"done": done, "total": 4})
    write_json(folder / RESULT, {"found": (folder / "files" / "sub" / "a").read_text()})
"""
"""In the place of the harness."""


class Notes(SilentProgress):
    """Cuts connections when the first launch is done; keeps what was said."""

    def __init__(self, server: Server) -> None:
        self.server, self.notes, self.seen = server, [], []  # type: ignore[var-annotated]

    def track(self, items: Any, description: str, total: int) -> Any:
        for item in items:
            self.seen.append(item)
            if len(self.seen) == 1:
                self.server.drop_connections()
            yield item

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def archive(tmp_path: Path) -> Blob:
    """A package with the agent and a harness that measures nothing."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "code.zip", "w") as made:
        for path, text in {**bootstrap_program(), "compress/plugins/devices/harness.py": SCRIPT}.items():
            made.writestr(path, text)
    return Blob.from_file(tmp_path / "code.zip")


def order(archive: Blob, files: dict[str, str], **changed: Any) -> dict[str, Any]:
    return {"code": archive.digest, "files": files, "requirements": [], "imports": [], "bench": {}, **changed}


def result(connection: Connection, archive: Blob, files: dict[str, Path], progress: Any, **changed: Any) -> Any:
    blobs = {path: Blob.from_file(file) for path, file in files.items()}
    with open_session(connection) as session:
        send_blobs(connection, session, [archive, *blobs.values()], [], SilentProgress())
        asked = order(archive, {path: blob.digest for path, blob in blobs.items()}, **changed)
        connection.request("order", session=session, order=asked)
        return follow_session(connection, session, 4, progress)


@pytest.fixture
def connection(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("compress.plugins.devices.blobs.ENVIRONMENT_BYTES", 0)
    with server.connect(server.device(tmp_path / "cache")) as made:
        yield made


def test_a_session_goes_on_while_its_connection_is_cut(
    server: Server, connection: Connection, archive: Blob, tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("content")
    progress = Notes(server)
    assert result(connection, archive, {"sub/a": tmp_path / "a"}, progress) == {"found": "content"}
    assert progress.seen == [1, 2, 3, 4], "no line is lost or told twice"
    assert any("connecting again" in note for note in progress.notes)
    left = {path.name: len(list(path.iterdir())) for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    assert left == {"blobs": 2, "code": 1, "venvs": 1, "sessions": 0}, "only the cache stays"


def test_a_second_bench_is_told_who_holds_the_device_and_since_when(
    server: Server, connection: Connection, tmp_path: Path
) -> None:
    with open_session(connection) as session, server.connect(server.device(tmp_path / "cache"), "again") as second:
        holder = second.request("probe", blobs=[], requirements=[])["holder"]
        assert holder["session"] == session
        with pytest.raises(DeviceError, match="is taken") as caught, open_session(second):
            pass
        assert holder["who"] in str(caught.value)
        assert f"since {holder['since']}" in str(caught.value)
        assert second.request("clear")["holder"] == holder, "nor may its cache be removed"
        # Asking twice, as after a lost connection, starts no second session.
        assert connection.request("begin", session=session, who="x", since="y", program={})["holder"] is None
    with open_session(connection):
        pass
    assert connection.request("clear")["bytes"] > 0
    assert not (tmp_path / "cache").exists()


def test_a_session_that_is_killed_frees_the_device_and_is_told(
    connection: Connection, archive: Blob, tmp_path: Path
) -> None:
    with pytest.raises(DeviceError, match="ended without a result"), open_session(connection) as session:
        psutil.Process(connection.request("probe", blobs=[], requirements=[])["holder"]["pid"]).kill()
        follow_session(connection, session, 4, SilentProgress())
    with open_session(connection):
        pass


def test_a_session_that_nobody_follows_ends_and_removes_itself(
    server: Server, connection: Connection, tmp_path: Path
) -> None:
    program = bootstrap_program()
    text = {path: code.replace("WAIT_SECONDS = 300.0", "WAIT_SECONDS = 0.2") for path, code in program.items()}
    connection.request("begin", session="a" * 32, who="x", since="y", program=text)
    deadline = time.monotonic() + 20
    while connection.request("probe", blobs=[], requirements=[])["holder"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not (tmp_path / "cache" / "sessions" / ("a" * 32)).exists()
    with pytest.raises(DeviceError, match="the session is gone"):
        connection.request("touch", session="a" * 32)


@pytest.mark.parametrize("path", ["/tmp/a", "sub/../../a"])
def test_a_path_that_leads_out_of_the_session_is_refused(
    connection: Connection, archive: Blob, tmp_path: Path, path: str
) -> None:
    (tmp_path / "a").write_text("content")
    with pytest.raises(DeviceError, match="leads out of the session's folder"):
        result(connection, archive, {path: tmp_path / "a"}, SilentProgress())


def test_packages_that_cannot_be_had_are_told_and_leave_no_half_environment(
    connection: Connection, archive: Blob, tmp_path: Path
) -> None:
    missing = [f"compress-nowhere @ file://{tmp_path}/nowhere-1-py3-none-any.whl"]
    with pytest.raises(DeviceError, match="packages of the harness cannot be installed") as caught:
        result(connection, archive, {}, SilentProgress(), requirements=missing)
    assert "nowhere-1-py3-none-any.whl" in str(caught.value)
    assert list((tmp_path / "cache" / "venvs").iterdir()) == []


@pytest.mark.parametrize("field", [{"session": "../x"}, {"session": "a" * 31}])
def test_names_from_outside_are_checked_there_too(connection: Connection, field: dict[str, str]) -> None:
    with pytest.raises(DeviceError, match="is no session"):
        connection.request("end", **field)
    with pytest.raises(DeviceError, match="is no SHA-256 digest"):
        connection.request("receive", blob="../../x", offset=0, size=0)
