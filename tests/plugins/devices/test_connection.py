from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from loopback_sshd import Server

from compress.plugins.devices.connection import printable
from compress.utils.errors import DeviceError, InputError


def fingerprint(public: Path) -> str:
    """As ssh-keygen says it."""
    command = ["ssh-keygen", "-lf", str(public)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1]


def test_the_agent_answers_from_a_cache_that_is_not_there_yet(server: Server, tmp_path: Path) -> None:
    strange = tmp_path / "a cache; touch '$(injected)'"
    with server.connect(server.device(strange)) as connection:
        probed = connection.request("probe", blobs=[], requirements=[])
    assert probed["cache"] == str(strange)
    assert probed["python"].startswith("3.")
    assert abs(probed["free_bytes"] / shutil.disk_usage(tmp_path).free - 1) < 0.1
    assert (probed["holder"], probed["has_environment"]) == (None, False)
    assert list(tmp_path.iterdir()) == [], "asking leaves nothing behind"


def test_another_host_key_is_refused_and_both_are_told(server: Server, tmp_path: Path) -> None:
    kind, key = (server.folder / "other.pub").read_text().split()[:2]
    with (
        pytest.raises(InputError, match="another host key") as caught,
        server.connect(server.device(tmp_path, host_key=f"{kind} {key}")),
    ):
        pass
    message = str(caught.value)
    assert fingerprint(server.folder / "other.pub") in message
    assert f"it showed ssh-ed25519 {fingerprint(server.folder / 'host.pub')}" in message
    assert f"ssh-keyscan -p {server.port} 127.0.0.1" in message


def test_a_host_key_of_a_kind_that_the_device_lacks_is_refused(server: Server, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", str(tmp_path / "key")], check=True)
    kind, key = (tmp_path / "key.pub").read_text().split()[:2]
    with (
        pytest.raises(InputError, match="another host key"),
        server.connect(server.device(tmp_path, host_key=f"{kind} {key}")),
    ):
        pass


def test_a_key_that_the_device_does_not_know_is_told_with_the_way_to_bring_it_there(
    server: Server, tmp_path: Path
) -> None:
    with (
        pytest.raises(DeviceError, match="does not let") as caught,
        server.connect(server.device(tmp_path, key="other")),
    ):
        pass
    assert f"ssh-copy-id -i other -p {server.port}" in str(caught.value)


def test_a_private_key_must_be_there_be_private_and_have_no_passphrase(server: Server, tmp_path: Path) -> None:
    key = tmp_path / "key"
    with pytest.raises(InputError, match="cannot be read"), server.connect(server.device(tmp_path, key=str(key))):
        pass
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(key)], check=True)
    with pytest.raises(InputError, match="cannot be used"), server.connect(server.device(tmp_path, key=str(key))):
        pass
    key.chmod(0o644)
    with pytest.raises(InputError, match="read by others"), server.connect(server.device(tmp_path, key=str(key))):
        pass


def test_a_device_that_is_not_there_is_told_at_once(server: Server, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DeviceError, match="cannot be reached"), server.connect(server.device(tmp_path, port=port)):
        pass


def test_a_device_that_accepts_and_says_nothing_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.plugins.devices.connection._CONNECT_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        device = server.device(tmp_path, port=mute.getsockname()[1])
        with pytest.raises(DeviceError, match="cannot be reached"), server.connect(device):
            pass


@pytest.mark.parametrize("is_old", [False, True])
def test_no_python_or_an_old_one_is_told(server: Server, tmp_path: Path, is_old: bool) -> None:
    python = tmp_path / "my python"
    if is_old:
        # It runs the command line that it is given, as an older one would.
        lines = ["import sys", "sys.version_info, sys.version = (3, 9, 2), '3.9.2 (main)'", "exec(sys.argv[3])"]
        (tmp_path / "old.py").write_text("\n".join(lines))
        python.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{tmp_path / 'old.py'}' \"$@\"\n")
        python.chmod(0o755)
    device, message = server.device(tmp_path, python=str(python)), "no Python that can be used"
    with server.connect(device) as connection, pytest.raises(DeviceError, match=message) as caught:
        connection.request("probe", blobs=[], requirements=[])
    assert ("this is 3.9.2" if is_old else "No such file") in str(caught.value)


def test_a_request_whose_connection_is_cut_is_made_again(server: Server, tmp_path: Path) -> None:
    python, asked = tmp_path / "python", tmp_path / "asked"
    # The first time it is asked, it waits until its connection is cut.
    python.write_text(f'#!/bin/sh\n[ -e {asked} ] || {{ touch {asked}; sleep 60; }}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with server.connect(server.device(tmp_path, python=str(python))) as connection:
        threading.Thread(target=cut_when, args=(server, asked)).start()
        assert connection.request("probe", blobs=[], requirements=[])["holder"] is None


def cut_when(server: Server, asked: Path) -> None:
    while not asked.exists():
        time.sleep(0.05)
    assert server.drop_connections() >= 1


def test_a_device_that_stays_away_is_given_up(server: Server, tmp_path: Path) -> None:
    relay = Relay(server.port)
    try:
        device = server.device(tmp_path, port=relay.port)
        with server.connect(device, patience_seconds=1.0) as connection:
            connection.request("probe", blobs=[], requirements=[])
            relay.close()
            with pytest.raises(DeviceError, match="went away"):
                connection.request("probe", blobs=[], requirements=[])
    finally:
        relay.close()


def test_a_device_that_hangs_is_given_up(server: Server, tmp_path: Path) -> None:
    relay = Relay(server.port)
    try:
        device = server.device(tmp_path, port=relay.port)
        with server.connect(device, patience_seconds=1.0) as connection:
            connection.request("probe", blobs=[], requirements=[])
            relay.hangs = True
            with pytest.raises(DeviceError, match="went away: no answer within"):
                connection.request("probe", timeout=0.5, blobs=[], requirements=[])
    finally:
        relay.close()


def test_what_a_device_says_does_nothing_to_the_terminal() -> None:
    assert printable("Ünable\x1b[2J\rto\nwrite\x07") == "Ünable?[2J?to\nwrite?"


class Relay:
    """A port that passes connections on, until it hangs or is closed."""

    def __init__(self, port: int) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._ends: list[socket.socket] = []
        self.hangs = False
        threading.Thread(target=self._serve, args=(port,), daemon=True).start()

    def _serve(self, port: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", port))
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                if not self.hangs:
                    sink.sendall(data)
        except OSError:
            pass

    def close(self) -> None:
        """Cut it, and answer no more."""
        for end in (self._listening, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
