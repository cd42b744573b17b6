"""Run an SSH server on the loopback address with temporary keys, so that this machine can serve as a device."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from compress.plugins.devices.connection import Connection
    from compress.plugins.devices.inventory import Device

SSHD_PATHS = ("/usr/sbin/sshd", "/usr/local/sbin/sshd", "/opt/homebrew/sbin/sshd")


@dataclass
class Server:
    """A running SSH server; ``folder`` has its keys, configuration and log."""

    process: subprocess.Popen[bytes]
    folder: Path
    port: int

    def device(self, cache: Path, **changed: object) -> Device:
        """Return a device that is this server, with its cache in ``cache``."""
        _, kind, key = self.scan().split()[:3]
        fields = {"host": "127.0.0.1", "port": self.port, "user": getpass.getuser(), "key": "client"}
        from compress.plugins.devices.inventory import Device

        return Device(**{**fields, "host_key": f"{kind} {key}", "cache": str(cache), **changed})

    def scan(self) -> str:
        """Return the line of this server in a known_hosts file."""
        return f"[127.0.0.1]:{self.port} {(self.folder / 'host.pub').read_text()}"

    def connect(self, device: Device, name: str = "loop", patience_seconds: float = 20.0) -> Connection:
        """Return a connection that is not yet open."""
        from compress.plugins.devices.connection import Connection

        return Connection(name, device, self.folder, patience_seconds)

    def drop_connections(self) -> int:
        """Kill the processes that serve connections, but not those that they started. Return their number."""
        killed = 0
        for process in psutil.Process(self.process.pid).children(recursive=True):
            # A connection may end by itself at this moment.
            with suppress(psutil.NoSuchProcess):
                if process.name().startswith("sshd"):
                    process.kill()
                    killed += 1
        return killed


def find_binary() -> str | None:
    """Return the path of sshd, or None if it is not installed (Debian: openssh-server)."""
    return shutil.which("sshd") or next((candidate for candidate in SSHD_PATHS if Path(candidate).exists()), None)


@contextmanager
def running(binary: str, folder: Path) -> Iterator[Server]:
    """Run a server as this user. ``folder`` receives keys, configuration and log."""
    folder.chmod(0o700)
    for name in ("host", "client", "other"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "temporary", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    shutil.copy(folder / "client.pub", folder / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "config").write_text(_config(folder, port))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([binary, "-D", "-e", "-f", str(folder / "config")], stderr=log)
    try:
        _wait(port, process, folder / "log")
        yield Server(process, folder, port)
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.terminate()
        process.wait(10)


def _config(folder: Path, port: int) -> str:
    # Sessions inherit the package index of pip, and the library path of emulated ARM programs.
    passed = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(("PIP_", "QEMU_"))]
    variables = "SetEnv " + " ".join(f'"{variable}"' for variable in passed) if passed else ""
    return f"""
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
PidFile none
AuthorizedKeysFile {folder}/authorized
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
MaxStartups 100
Subsystem sftp internal-sftp
{variables}
"""


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        if process.poll() is not None:
            raise RuntimeError(f"sshd ended: {log.read_text()}")
        try:
            socket.create_connection(("127.0.0.1", port), 0.5).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("sshd does not accept connections")
