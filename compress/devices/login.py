"""Getting into a device: its one host key, the user's one key, and nothing else that might let anybody in."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shlex
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from compress.devices.inventory import Device
from compress.errors import CompressError, DeviceError, InputError

_CONNECT_SECONDS = 20.0
_ALIAS = "device"
_OPTIONS = {
    # Nothing asked, no other way in, nothing forwarded.
    "BatchMode": "yes",
    "IdentitiesOnly": "yes",
    "IdentityAgent": "none",
    "PreferredAuthentications": "publickey",
    "ClearAllForwardings": "yes",
    "ControlPath": "none",
    "StrictHostKeyChecking": "yes",
    "HostKeyAlias": _ALIAS,
    "CheckHostIP": "no",
    "UpdateHostKeys": "no",
    "GlobalKnownHostsFile": "none",
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "3",
    "LogLevel": "ERROR",
}
_STRANGER = ("Host key verification failed", "no matching host key type")
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]+")


class LostError(Exception):
    """The connection is gone, or as good as gone."""


@dataclass(frozen=True)
class Login:
    """How one device is entered; ``key`` is the path of the private key."""

    name: str
    device: Device
    key: Path

    def address(self) -> str:
        """For messages."""
        return f"{self.device.user}@{self.device.host}, port {self.device.port}"

    def command(self, known_hosts: Path, command: str) -> list[str]:
        """What runs ``command`` there; ``known_hosts`` is written, with the only key that the device may have.

        Raises `InputError` for a private key that can't be used, and without ssh.
        """
        program = shutil.which("ssh")
        if program is None:
            raise InputError(
                "Devices are reached with ssh, which is not on PATH.",
                mend="install OpenSSH's client (Debian: apt-get install openssh-client)",
            )
        self._check_key()
        known_hosts.write_text(f"{_ALIAS} {self.device.host_key}\n", encoding="utf-8")
        options = {
            **_OPTIONS,
            "ConnectTimeout": str(math.ceil(_CONNECT_SECONDS)),
            "UserKnownHostsFile": f'"{known_hosts}"',
        }
        given = [f"-o{name}={value}" for name, value in options.items()]
        way = ["-i", str(self.key), "-p", str(self.device.port), "-l", self.device.user, self.device.host]
        return [program, "-F", "none", "-T", "-e", "none", *given, *way, command]

    def failure(self, said: str) -> LostError | CompressError:
        """Why ssh itself failed, of which it ``said`` so much."""
        if "Permission denied" in said:
            return DeviceError(
                f"The device {self.name!r} does not let {self.device.user!r} in: {_last_line(said)}",
                where=self.address(),
                expected=f"the public half of {self.device.key} in ~/.ssh/authorized_keys there",
                mend=f"ssh-copy-id -i {shlex.quote(self.device.key)} -p {self.device.port} "
                f"{shlex.quote(f'{self.device.user}@{self.device.host}')}",
            )
        if any(words in said for words in _STRANGER):
            kind, key = self.device.host_key.split()[:2]
            digest = base64.b64encode(hashlib.sha256(base64.b64decode(key)).digest()).decode().rstrip("=")
            seen = _FINGERPRINT.search(said)
            return InputError(
                f"The device {self.name!r} answers with another host key than the inventory has; nothing was sent to "
                "it.",
                where=self.address(),
                expected=f"{kind} SHA256:{digest}; it showed {f'{kind} {seen[0]}' if seen else 'none of that kind'}",
                mend=f"if it is the right machine, `ssh-keyscan -p {self.device.port} {self.device.host}` shows its "
                "keys; compare with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` at the machine itself, then put "
                "the key under host_key",
            )
        return LostError(_last_line(said) or "the connection was closed before an answer came")

    def _check_key(self) -> None:
        try:
            if stat.S_IMODE(self.key.stat().st_mode) & 0o077:
                raise InputError(
                    "The private key may be read by others.", where=str(self.key), mend=f"chmod 600 {self.key}"
                )
        except OSError as error:
            raise InputError(f"The private key cannot be read: {error.strerror}", where=str(self.key)) from None
        command = ["ssh-keygen", "-y", "-P", "", "-f", str(self.key)]
        read = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if read.returncode:
            raise InputError(
                f"The private key cannot be used: {_last_line(read.stderr)}",
                where=str(self.key),
                expected="a private key without a passphrase, made for this",
                mend=f"ssh-keygen -t ed25519 -N '' -f {self.key}-device",
            )


def _last_line(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1].strip() if lines else ""
