"""Connection to one device: requests to its agent, and transfer of files. Lost requests are sent again."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from compress.benchmark.subprocess_client import PipedProcess
from compress.plugins.devices.agent import BYTES_AT_ONCE
from compress.plugins.devices.inventory import Device
from compress.plugins.devices.replies import REQUIRED, printable, read_reply
from compress.utils.errors import CompressError, DeviceError, InputError

Reply = dict[str, Any]

_CONNECT_SECONDS = 20
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
_PYTHON_TOO_OLD = "compress needs Python 3.11, and this is"
_BOOT = (
    f"import sys; sys.version_info >= (3, 11) or sys.exit('{_PYTHON_TOO_OLD} %s' % sys.version.split()[0]); "
    "import json; given = sys.stdin.buffer; message = json.loads(given.readline()); "
    "place = {'__name__': 'compress_agent'}; "
    "exec(compile(given.read(message['agent_bytes']), 'agent.py', 'exec'), place); place['answer'](message)"
)
_AGENT = Path(__file__).with_name("agent.py")
_SSH_FAILED = 255
_NOT_FOUND = (126, 127)
_FAREWELL_SECONDS = 20.0
_ANSWER_SECONDS = 120.0
_DIGEST_SECONDS = 600.0


class ConnectionLostError(Exception):
    """Lost connection, or one that has been silent for too long."""


class Connection:
    """Context manager that sends requests to a device.

    A relative path of the key counts from ``folder``, the inventory's folder. Each request is an SSH connection of its
    own. A lost request is repeated until the device has been silent for ``patience_seconds``. All actions of the agent
    can be repeated safely.
    """

    def __init__(self, name: str, device: Device, folder: Path, patience_seconds: float = 120.0) -> None:
        self.name, self.device = name, device
        self._key, self._patience = folder / Path(device.key).expanduser(), patience_seconds
        self._heard = time.monotonic()
        self._scratch = tempfile.TemporaryDirectory(prefix="compress-ssh-")

    def __enter__(self) -> Self:
        """Connect once. Raises `DeviceError` or `InputError` at once if the device does not allow it."""
        try:
            self._check_key()
            with self._command("echo {}") as process:
                self._reply(process, _ANSWER_SECONDS)
        except ConnectionLostError as error:
            self._scratch.cleanup()
            raise DeviceError(
                f"The device {self.name!r} cannot be reached: {error}.",
                where=self._address,
                expected="a running SSH server at that address and port",
            ) from None
        except CompressError:
            self._scratch.cleanup()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._scratch.cleanup()

    def request(self, do: str, timeout: float = _ANSWER_SECONDS, **fields: object) -> Reply:
        """Return the agent's answer; `agent` documents the actions. A lost request is sent again.

        Raises:
            DeviceError: The agent refuses, or the device has been silent for too long.
        """
        self._heard, pause = time.monotonic(), 0.5
        while True:
            try:
                answer = self._answer({"do": do, **fields}, timeout)
                if missing := REQUIRED.get(do, set()) - answer.keys():
                    raise self.unreadable(f"{do}: no {', '.join(sorted(missing))}")
                return answer
            except ConnectionLostError as lost:
                if time.monotonic() + pause - self._heard > self._patience:
                    raise DeviceError(
                        f"The device {self.name!r} went away: {lost}.",
                        where=self._address,
                        hint=f"it was tried for {self._patience:.0f} s; the same command goes on from what has arrived",
                    ) from None
                time.sleep(pause)
                pause = min(2 * pause, 15.0)

    def follow(self, silence_seconds: float = 60.0, **fields: object) -> Iterator[Reply]:
        """Yield the lines that `agent.follow` prints; the last one is its answer.

        Raises `ConnectionLostError` if nothing arrives for ``silence_seconds``.
        """
        with self._agent({"do": "follow", **fields}) as process:
            while (reply := self._next(process, silence_seconds)) is not None:
                yield reply
                if reply.get("ended"):
                    return
            raise ConnectionLostError(
                f"the agent stopped talking: {printable(process.stderr_tail()) or 'it said nothing'}"
            )

    def upload(self, file: Path, blob: str, offset: int) -> Iterator[Reply]:
        """Send ``file`` from byte ``offset`` on to a blob, and yield the replies of `agent.receive`.

        Raises `ConnectionLostError`; the caller resumes.
        """
        with self._agent({"do": "receive", "blob": blob, "offset": offset, "size": file.stat().st_size}) as talk:
            with file.open("rb") as source:
                source.seek(offset)
                while block := source.read(BYTES_AT_ONCE):
                    self._write(talk, block)
                    yield self._reply(talk, _ANSWER_SECONDS)
            yield self._reply(talk, _DIGEST_SECONDS)

    def try_request(self, do: str, **fields: object) -> None:
        """Send a request once, and ignore a missing answer."""
        with contextlib.suppress(DeviceError, InputError, ConnectionLostError):
            self._answer({"do": do, **fields}, _FAREWELL_SECONDS)

    def refusal_error(self, told: Reply) -> DeviceError:
        """Return the error for a refusal of the agent."""
        return DeviceError(f"The device {self.name!r}: {told['what']}", where=self._address, expected=told["expected"])

    def unreadable(self, reason: str) -> DeviceError:
        """Return the error for a reply that cannot be right."""
        return DeviceError(
            f"What the device {self.name!r} sends cannot be read: {reason}",
            where=self._address,
            expected="the replies of the agent that was sent there",
            hint="look for a login script that prints JSON, and for failing memory; `compress devices` asks it again",
        )

    @property
    def _address(self) -> str:
        """Return user, host and port for messages."""
        return f"{self.device.user}@{self.device.host}, port {self.device.port}"

    @contextmanager
    def _command(self, command: str) -> Iterator[PipedProcess]:
        """Run a command on the device over a connection of its own."""
        known_hosts = Path(self._scratch.name) / "known_hosts"
        known_hosts.write_text(f"{_ALIAS} {self.device.host_key}\n", encoding="utf-8")
        options = {**_OPTIONS, "ConnectTimeout": str(_CONNECT_SECONDS), "UserKnownHostsFile": f'"{known_hosts}"'}
        ssh = ["ssh", "-F", "none", "-T", "-e", "none", *(f"-o{name}={value}" for name, value in options.items())]
        address = ["-i", str(self._key), "-p", str(self.device.port), "-l", self.device.user, self.device.host]
        process = PipedProcess([*ssh, *address, command], apart=True)
        try:
            yield process
        finally:
            process.kill()

    @contextmanager
    def _agent(self, message: Reply) -> Iterator[PipedProcess]:
        """Start the agent with a message."""
        with self._command(shlex.join([self.device.python, "-I", "-c", _BOOT])) as process:
            agent = _AGENT.read_bytes()
            header = json.dumps({"cache": self.device.cache, "agent_bytes": len(agent), **message})
            self._write(process, header.encode() + b"\n" + agent)
            yield process

    def _answer(self, message: Reply, timeout: float) -> Reply:
        """Return the agent's answer to a message, without a second attempt."""
        with self._agent(message) as process:
            return self._reply(process, timeout)

    def _write(self, talk: PipedProcess, content: bytes) -> None:
        """Write bytes to a process. Raises `ConnectionLostError` if it does not take them."""
        try:
            talk.write(content, _ANSWER_SECONDS)
        except TimeoutError:
            raise ConnectionLostError(f"nothing was taken within {_ANSWER_SECONDS:.3g} s") from None

    def _next(self, talk: PipedProcess, seconds: float) -> Reply | None:
        """Return the agent's next line, or None if it has ended. Lines that a login script wrote are skipped."""
        try:
            while (line := talk.line(seconds)) is not None:
                if (reply := read_reply(line)) is not None:
                    self._heard = time.monotonic()
                    if reply.get("refusal"):
                        raise self.refusal_error(reply["refusal"])
                    return reply
        except ValueError as error:
            raise self.unreadable(str(error)) from None
        except TimeoutError:
            raise ConnectionLostError(f"no answer within {seconds:.3g} s") from None
        return None

    def _reply(self, talk: PipedProcess, seconds: float) -> Reply:
        """Return the agent's next line. Raises an error with the reason if it has ended."""
        reply = self._next(talk, seconds)
        if reply is not None:
            return reply
        code, message = talk.process.wait(), printable(talk.stderr_tail())
        if code == _SSH_FAILED:
            raise self._unreached(message)
        if code in _NOT_FOUND or _PYTHON_TOO_OLD in message:
            raise DeviceError(
                f"The device {self.name!r} has no Python that can be used: {message}",
                where=f"{self._address}, {self.device.python}",
                expected="Python 3.11 or newer",
                hint="install one there, and name it in the inventory: `python: python3.11`",
            )
        raise DeviceError(
            f"The agent on {self.name!r} failed with exit code {code}: {message or 'it said nothing'}",
            where=self._address,
        )

    def _unreached(self, message: str) -> ConnectionLostError | CompressError:
        """Return the error for a failure of ssh itself, by what it wrote."""
        port, host, key = self.device.port, self.device.host, self.device.key
        if "Permission denied" in message:
            return DeviceError(
                f"The device {self.name!r} does not let {self.device.user!r} in: {_last_line(message)}",
                where=self._address,
                expected=f"the public half of {key} in ~/.ssh/authorized_keys there",
                hint=f"ssh-copy-id -i {shlex.quote(key)} -p {port} {shlex.quote(f'{self.device.user}@{host}')}",
            )
        if any(phrase in message for phrase in _STRANGER):
            kind, pinned = self.device.host_key.split()[:2]
            digest = base64.b64encode(hashlib.sha256(base64.b64decode(pinned)).digest()).decode().rstrip("=")
            fingerprint = _FINGERPRINT.search(message)
            shown = f"{kind} {fingerprint[0]}" if fingerprint else "none of that kind"
            return InputError(
                f"The device {self.name!r} answers with another host key than the inventory has; nothing was sent to "
                "it.",
                where=self._address,
                expected=f"{kind} SHA256:{digest}; it showed {shown}",
                hint=f"if it is the right machine, `ssh-keyscan -p {port} {host}` shows its keys; compare with "
                "`ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` at the machine itself, then put the key under "
                "host_key",
            )
        return ConnectionLostError(_last_line(message) or "the connection was closed before an answer came")

    def _check_key(self) -> None:
        """Raise `InputError` for a private key that cannot be used."""
        key = self._key
        if shutil.which("ssh") is None:
            raise InputError(
                "Devices are reached with ssh, which is not on PATH.",
                hint="install OpenSSH's client (Debian: apt-get install openssh-client)",
            )
        try:
            if stat.S_IMODE(key.stat().st_mode) & 0o077:
                raise InputError("The private key may be read by others.", where=str(key), hint=f"chmod 600 {key}")
        except OSError as error:
            raise InputError(f"The private key cannot be read: {error.strerror}", where=str(key)) from None
        command = ["ssh-keygen", "-y", "-P", "", "-f", str(key)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(
                f"The private key cannot be used: {_last_line(done.stderr)}",
                where=str(key),
                expected="a private key without a passphrase, made for this",
                hint=f"ssh-keygen -t ed25519 -N '' -f {key}-device",
            )


def _last_line(text: str) -> str:
    """Return the last line of a text."""
    return text.strip().rpartition("\n")[2].strip()
