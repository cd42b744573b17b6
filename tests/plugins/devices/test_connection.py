"""Tests of device connections over SSH, of sessions, and of the inventory."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from loopback_sshd import Server

from compress.plugins.devices.agent import RefusedError
from compress.plugins.devices.bootstrap import path_inside
from compress.plugins.devices.connection import Connection
from compress.plugins.devices.device_host import Blob, send_blobs
from compress.plugins.devices.inventory import choose_devices, find_inventory, read_inventory
from compress.plugins.devices.replies import printable
from compress.plugins.devices.session import bootstrap_program, follow_session, open_session
from compress.utils.errors import CompressError, DeviceError, InputError
from compress.utils.progress import SilentProgress

pytestmark = pytest.mark.slow


def fingerprint(public: Path) -> str:
    """Return the fingerprint of a public key from ssh-keygen."""
    command = ["ssh-keygen", "-lf", str(public)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1]


def test_probe_works_without_an_existing_cache(server: Server, tmp_path: Path) -> None:
    strange = tmp_path / "a cache; touch '$(injected)'"
    with server.connect(server.device(strange)) as connection:
        probed = connection.request("probe", blobs=[], requirements=[])
    assert probed["cache"] == str(strange)
    assert probed["python"].startswith("3.")
    assert abs(probed["free_bytes"] / shutil.disk_usage(tmp_path).free - 1) < 0.1
    assert (probed["holder"], probed["has_environment"]) == (None, False)
    assert list(tmp_path.iterdir()) == [], "asking leaves nothing behind"


def refused(server: Server, error: type[CompressError], says: str, **changed: object) -> str:
    """Return the error message of connecting to a device with changed fields."""
    device = server.device(Path("unused"), **changed)
    with pytest.raises(error, match=says) as caught, server.connect(device):
        pass
    return str(caught.value)


def test_other_host_key_is_refused_and_both_are_shown(server: Server) -> None:
    kind, key = (server.folder / "other.pub").read_text().split()[:2]
    message = refused(server, InputError, "another host key", host_key=f"{kind} {key}")
    assert fingerprint(server.folder / "other.pub") in message
    assert f"it showed ssh-ed25519 {fingerprint(server.folder / 'host.pub')}" in message
    assert f"ssh-keyscan -p {server.port} 127.0.0.1" in message


def test_error_for_an_unknown_client_key_suggests_ssh_copy_id(server: Server) -> None:
    assert f"ssh-copy-id -i other -p {server.port}" in refused(server, DeviceError, "does not let", key="other")


def test_private_key_must_exist_be_private_and_have_no_passphrase(server: Server, tmp_path: Path) -> None:
    key = tmp_path / "key"
    refused(server, InputError, "cannot be read", key=str(key))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(key)], check=True)
    refused(server, InputError, "cannot be used", key=str(key))
    key.chmod(0o644)
    refused(server, InputError, "read by others", key=str(key))


def test_absent_and_unresponsive_devices_time_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.plugins.devices.connection._CONNECT_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        refused(server, DeviceError, "cannot be reached", port=port)
    refused(server, DeviceError, "cannot be reached", port=port)


@pytest.mark.parametrize("is_old", [False, True])
def test_missing_and_old_python_are_errors(server: Server, tmp_path: Path, is_old: bool) -> None:
    python = tmp_path / "my python"
    if is_old:
        # This script executes its command line with the version of an older Python.
        lines = ["import sys", "sys.version_info, sys.version = (3, 9, 2), '3.9.2 (main)'", "exec(sys.argv[3])"]
        (tmp_path / "old.py").write_text("\n".join(lines))
        python.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{tmp_path / 'old.py'}' \"$@\"\n")
        python.chmod(0o755)
    device, message = server.device(tmp_path, python=str(python)), "no Python that can be used"
    with server.connect(device) as connection, pytest.raises(DeviceError, match=message) as caught:
        connection.request("probe", blobs=[], requirements=[])
    assert ("this is 3.9.2" if is_old else "No such file") in str(caught.value)


def test_request_is_repeated_after_a_lost_connection(server: Server, tmp_path: Path) -> None:
    python, asked = tmp_path / "python", tmp_path / "asked"
    # The first request blocks until its connection is dropped.
    python.write_text(f'#!/bin/sh\n[ -e {asked} ] || {{ touch {asked}; sleep 60; }}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with server.connect(server.device(tmp_path, python=str(python))) as connection:
        threading.Thread(target=cut_when, args=(server, asked)).start()
        assert connection.request("probe", blobs=[], requirements=[])["holder"] is None


def cut_when(server: Server, asked: Path) -> None:
    while not asked.exists():
        time.sleep(0.05)
    assert server.drop_connections() >= 1


@pytest.mark.parametrize("hangs", [False, True], ids=["closed", "hangs"])
def test_device_that_disappears_is_an_error(server: Server, tmp_path: Path, hangs: bool) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 5\n")
    python.chmod(0o755)
    with server.connect(server.device(tmp_path), patience_seconds=1.0) as connection:
        connection.request("probe", blobs=[], requirements=[])
        # No server listens on port 1.
        connection.device = server.device(tmp_path, **({"python": str(python)} if hangs else {"port": 1}))
        with pytest.raises(DeviceError, match="went away: no answer within" if hangs else "went away"):
            connection.request("probe", timeout=0.5, blobs=[], requirements=[])


def test_control_characters_from_devices_are_replaced() -> None:
    assert printable("Ünable\x1b[2J\rto\nwrite\x07") == "Ünable?[2J?to\nwrite?"


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
"""A stub of the measuring harness."""


class Notes(SilentProgress):
    """A progress that drops connections after the first launch and keeps notes."""

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
    """Zip a package with the agent and the stub of the harness."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "code.zip", "w") as made:
        for path, text in {**bootstrap_program(), "compress/plugins/devices/harness.py": SCRIPT}.items():
            made.writestr(path, text)
    return Blob.from_file(tmp_path / "code.zip")


def result(connection: Connection, archive: Blob, files: dict[str, Path], progress: Any, **changed: Any) -> Any:
    blobs = {path: Blob.from_file(file) for path, file in files.items()}
    order = {"code": archive.digest, "files": {path: blob.digest for path, blob in blobs.items()}, "requirements": [],
             "imports": [], "bench": {}, **changed}  # fmt: skip
    with open_session(connection) as session:
        send_blobs(connection, session, [archive, *blobs.values()], [], SilentProgress())
        connection.request("order", session=session, order=order)
        return follow_session(connection, session, 4, progress)


@pytest.fixture
def connection(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("compress.plugins.devices.device_host.ENVIRONMENT_BYTES", 0)
    with server.connect(server.device(tmp_path / "cache")) as made:
        yield made


def test_session_survives_a_lost_connection(
    server: Server, connection: Connection, archive: Blob, tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("content")
    progress = Notes(server)
    assert result(connection, archive, {"sub/a": tmp_path / "a"}, progress) == {"found": "content"}
    assert progress.seen == [1, 2, 3, 4], "no line is lost or told twice"
    assert any("connecting again" in note for note in progress.notes)
    left = {path.name: len(list(path.iterdir())) for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    assert left == {"blobs": 2, "code": 1, "venvs": 1, "sessions": 0}, "only the cache stays"


def test_second_session_is_refused_with_the_holder(server: Server, connection: Connection, tmp_path: Path) -> None:
    with open_session(connection) as session, server.connect(server.device(tmp_path / "cache"), "again") as second:
        holder = second.request("probe", blobs=[], requirements=[])["holder"]
        assert holder["session"] == session
        with pytest.raises(DeviceError, match="is taken") as caught, open_session(second):
            pass
        assert holder["who"] in str(caught.value)
        assert f"since {holder['since']}" in str(caught.value)
        assert second.request("clear")["holder"] == holder, "nor may its cache be removed"
        # A repeated request, as after a lost connection, starts no second session.
        assert connection.request("begin", session=session, who="x", since="y", program={})["holder"] is None
    with open_session(connection):
        pass
    assert connection.request("clear")["bytes"] > 0
    assert not (tmp_path / "cache").exists()


def test_a_killed_session_frees_the_device(connection: Connection, archive: Blob, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="ended without a result"), open_session(connection) as session:
        psutil.Process(connection.request("probe", blobs=[], requirements=[])["holder"]["pid"]).kill()
        follow_session(connection, session, 4, SilentProgress())
    with open_session(connection):
        pass


def test_abandoned_session_removes_itself(server: Server, connection: Connection, tmp_path: Path) -> None:
    program = bootstrap_program()
    text = {path: code.replace("WAIT_SECONDS = 300.0", "WAIT_SECONDS = 0.2") for path, code in program.items()}
    connection.request("begin", session="a" * 32, who="x", since="y", program=text)
    deadline = time.monotonic() + 20
    while connection.request("probe", blobs=[], requirements=[])["holder"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not (tmp_path / "cache" / "sessions" / ("a" * 32)).exists()
    with pytest.raises(DeviceError, match="the session is gone"):
        connection.request("touch", session="a" * 32)


def test_path_outside_the_session_is_refused(connection: Connection, archive: Blob, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("content")
    with pytest.raises(DeviceError, match="leads out of the session's folder"):
        result(connection, archive, {"sub/../../a": tmp_path / "a"}, SilentProgress())
    with pytest.raises(RefusedError, match="leads out of the session's folder"):
        path_inside(tmp_path, "/tmp/a")


def test_missing_packages_leave_no_partial_environment(connection: Connection, archive: Blob, tmp_path: Path) -> None:
    missing = [f"compress-nowhere @ file://{tmp_path}/nowhere-1-py3-none-any.whl"]
    with pytest.raises(DeviceError, match="packages of the harness cannot be installed") as caught:
        result(connection, archive, {}, SilentProgress(), requirements=missing)
    assert "nowhere-1-py3-none-any.whl" in str(caught.value)
    assert list((tmp_path / "cache" / "venvs").iterdir()) == []


def test_device_validates_session_and_blob_names(connection: Connection) -> None:
    for session in ("../x", "a" * 31):
        with pytest.raises(DeviceError, match="is no session"):
            connection.request("end", session=session)
    with pytest.raises(DeviceError, match="is no SHA-256 digest"):
        connection.request("receive", blob="../../x", offset=0, size=0)


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFw8Wo1fcPJ2YaQh39pku1En4bRAAAtI4N1kUcftxxsl"
GOOD = f"""
devices:
  pi:
    host: 192.168.1.20
    user: pi
    key: ~/.ssh/id_ed25519
    host_key: {KEY}
  bench-2:
    host: "fe80::1%eth0"
    port: 2222
    user: someone
    key: keys/device
    host_key: {KEY} of the bench
    python: /opt/python 3.12/bin/python3
    cache: /var/tmp/compress
"""


def written(folder: Path, text: str) -> Path:
    (folder / "devices.yaml").write_text(text)
    return folder / "devices.yaml"


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        read_inventory(written(folder, text))
    return str(caught.value)


def test_inventory_is_read_with_defaults(tmp_path: Path) -> None:
    inventory = read_inventory(written(tmp_path, GOOD))
    assert list(inventory) == ["pi", "bench-2"]
    pi, bench = inventory.values()
    assert (pi.port, pi.python, pi.cache) == (22, "python3", ".cache/compress-device")
    assert (bench.port, bench.cache) == (2222, "/var/tmp/compress")


def test_inventory_errors_have_lines_and_suggestions(tmp_path: Path) -> None:
    text = GOOD.replace("    host: 192", "    hots: 192").replace("port: 2222", "port: 99999") + "password: x\n"
    problems = refusal(tmp_path, text)
    assert "devices.yaml:4: devices.pi.hots: found an unknown field" in problems
    assert "Did you mean 'host'?" in problems
    assert "devices.pi.host: found nothing" in problems
    assert "devices.yaml:10: devices.bench-2.port: found 99999; expected a number of at most 65535" in problems
    assert "password: found an unknown field; expected only devices" in problems


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host", "-oProxyCommand=touch x"),
        ("host", "pi;reboot"),
        ("user", "-l"),
        ("user", "pi$(id)"),
        ("python", "-c"),
        ("python", "python3\\nreboot"),
        ("cache", "../other"),
        ("cache", "~/x"),
        ("cache", "./"),
        ("cache", "//"),
        ("host_key", KEY[:-3]),
        ("host_key", KEY.replace("ssh-ed25519 ", "ssh-rsa ")),
    ],
)
def test_values_that_could_inject_options_or_commands_are_refused(tmp_path: Path, field: str, value: str) -> None:
    fields = {"host": "h", "user": "u", "key": "k", "host_key": KEY, field: value}
    lines = "\n".join(f'    {name}: "{field_text}"' for name, field_text in fields.items())
    assert f"devices.pi.{field}: found" in refusal(tmp_path, f"devices:\n  pi:\n{lines}\n")


@pytest.mark.parametrize("name", ["all", "Pi", "a b", "../x"])
def test_invalid_device_names_are_refused(tmp_path: Path, name: str) -> None:
    assert "expected a name of up to 40 small letters" in refusal(tmp_path, GOOD.replace("  pi:", f'  "{name}":'))


@pytest.mark.parametrize("text", ["", "devices:", "devices: {}", "- pi", "devices: [pi", "devices: 3"])
def test_inventory_without_devices_is_refused(tmp_path: Path, text: str) -> None:
    assert "inventory" in (problems := refusal(tmp_path, text)) and "recipe" not in problems


def test_devices_are_chosen_by_name_or_all(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    known = read_inventory(file)
    assert list(choose_devices(known, ["bench-2"], file)) == ["bench-2"]
    assert list(choose_devices(known, ["bench-2", "all"], file)) == ["bench-2", "pi"]
    with pytest.raises(InputError, match=r"There is no device 'bench2'. Did you mean 'bench-2'\?") as caught:
        choose_devices(known, ["bench2"], file)
    assert "one of pi, bench-2, all" in str(caught.value)


def test_inventory_is_found_beside_the_recipe_or_in_current_folder(tmp_path: Path) -> None:
    recipes, current_folder = tmp_path / "recipes", tmp_path / "here"
    recipes.mkdir()
    current_folder.mkdir()
    with pytest.raises(InputError, match="There is no inventory") as caught:
        find_inventory(None, [recipes, current_folder])
    assert str(recipes / "devices.yaml") in str(caught.value)
    later = written(current_folder, GOOD)
    assert find_inventory(None, [recipes, current_folder]) == later
    first = written(recipes, GOOD)
    assert find_inventory(None, [recipes, current_folder]) == first
    assert find_inventory(later, [recipes]) == later
