"""The way to one device: requests to the agent there, and files; what was lost on the way is asked again."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
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

from compress.benchmark.rpc import PipedProcess
from compress.plugins.devices.agent import BYTES_AT_ONCE
from compress.plugins.devices.inventory import Device
from compress.utils.errors import CompressError, DeviceError, InputError

Reply = dict[str, Any]

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


class LostError(Exception):
    """The connection is gone, or as good as gone."""


class Connection:
    """A context manager. ``folder`` is that of the inventory, which a relative key path counts from.

    Each request is an SSH connection of its own. One that is lost is made again, until the device has not been heard of
    for ``patience_seconds``; everything that the agent does may be asked twice.
    """

    def __init__(self, name: str, device: Device, folder: Path, patience_seconds: float = 120.0) -> None:
        self.name, self.device = name, device
        self._key, self._patience = folder / Path(device.key).expanduser(), patience_seconds
        self._heard = time.monotonic()
        self._scratch = tempfile.TemporaryDirectory(prefix="compress-ssh-")

    def __enter__(self) -> Self:
        """See whether it lets us in. Raises `DeviceError` or `InputError` at once where it doesn't."""
        try:
            self._check_key()
            with self._command("echo {}") as talk:
                self._reply(talk, _ANSWER_SECONDS)
        except LostError as lost:
            self._scratch.cleanup()
            raise DeviceError(
                f"The device {self.name!r} cannot be reached: {lost}.",
                where=self._address,
                expected="a running SSH server at that address and port",
            ) from None
        except CompressError:
            self._scratch.cleanup()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._scratch.cleanup()

    def ask(self, do: str, timeout: float = _ANSWER_SECONDS, **fields: Any) -> Reply:
        """The agent's answer; see `agent` for what it can do. Raises `DeviceError` for what it refuses.

        Where the connection is lost, ask again. Raises `DeviceError` in the end.
        """
        self._heard, pause = time.monotonic(), 0.5
        while True:
            try:
                return self._answer({"do": do, **fields}, timeout)
            except LostError as lost:
                if time.monotonic() + pause - self._heard > self._patience:
                    raise DeviceError(
                        f"The device {self.name!r} went away: {lost}.",
                        where=self._address,
                        hint=f"it was tried for {self._patience:.0f} s; the same command goes on from what has arrived",
                    ) from None
                time.sleep(pause)
                pause = min(2 * pause, 15.0)

    def follow(self, silence_seconds: float = 60.0, **fields: Any) -> Iterator[Reply]:
        """What `agent.follow` prints, the answer last; raises `LostError` after so long without a word."""
        with self._agent({"do": "follow", **fields}) as talk:
            while (reply := self._next(talk, silence_seconds)) is not None:
                yield reply
                if reply.get("ended"):
                    return
            raise LostError(f"the agent stopped talking: {plain(talk.stderr_tail()) or 'it said nothing'}")

    def put(self, file: Path, blob: str, offset: int) -> Iterator[Reply]:
        """Write ``file`` from byte ``offset`` on to that blob there; what `agent.receive` says. Can be lost."""
        with self._agent({"do": "receive", "blob": blob, "offset": offset, "size": file.stat().st_size}) as talk:
            with file.open("rb") as source:
                source.seek(offset)
                while block := source.read(BYTES_AT_ONCE):
                    self._write(talk, block)
                    yield self._reply(talk, _ANSWER_SECONDS)
            yield self._reply(talk, _DIGEST_SECONDS)

    def farewell(self, do: str, **fields: Any) -> None:
        """Ask once, and be content if no answer comes."""
        with contextlib.suppress(DeviceError, InputError, LostError):
            self._answer({"do": do, **fields}, _FAREWELL_SECONDS)

    def refused(self, told: Reply) -> DeviceError:
        """The error that the agent tells of."""
        return DeviceError(
            f"The device {self.name!r}: {plain(told['what'])}", where=self._address, expected=told["expected"]
        )

    @property
    def _address(self) -> str:
        return f"{self.device.user}@{self.device.host}, port {self.device.port}"

    @contextmanager
    def _command(self, command: str) -> Iterator[PipedProcess]:
        """A command there, over a connection of its own."""
        known_hosts = Path(self._scratch.name) / "known_hosts"
        known_hosts.write_text(f"{_ALIAS} {self.device.host_key}\n", encoding="utf-8")
        seconds = math.ceil(_CONNECT_SECONDS)
        options = {**_OPTIONS, "ConnectTimeout": str(seconds), "UserKnownHostsFile": f'"{known_hosts}"'}
        given = [f"-o{name}={value}" for name, value in options.items()]
        way = ["-i", str(self._key), "-p", str(self.device.port), "-l", self.device.user, self.device.host]
        talk = PipedProcess(["ssh", "-F", "none", "-T", "-e", "none", *given, *way, command], apart=True)
        try:
            yield talk
        finally:
            talk.kill()

    @contextmanager
    def _agent(self, message: Reply) -> Iterator[PipedProcess]:
        """The agent on its way to an answer."""
        with self._command(shlex.join([self.device.python, "-I", "-c", _BOOT])) as talk:
            agent = _AGENT.read_bytes()
            order = json.dumps({"cache": self.device.cache, "agent_bytes": len(agent), **message})
            self._write(talk, order.encode() + b"\n" + agent)
            yield talk

    def _answer(self, message: Reply, timeout: float) -> Reply:
        with self._agent(message) as talk:
            return self._reply(talk, timeout)

    def _write(self, talk: PipedProcess, content: bytes) -> None:
        try:
            talk.write(content, _ANSWER_SECONDS)
        except TimeoutError:
            raise LostError(f"nothing was taken within {_ANSWER_SECONDS:.3g} s") from None

    def _next(self, talk: PipedProcess, seconds: float) -> Reply | None:
        """The agent's next line, or None where it has ended; a login script may have written others."""
        try:
            while (line := talk.line(seconds)) is not None:
                with contextlib.suppress(ValueError):
                    reply = json.loads(line)
                    if isinstance(reply, dict):
                        self._heard = time.monotonic()
                        if "refusal" in reply:
                            raise self.refused(reply["refusal"])
                        return reply
        except TimeoutError:
            raise LostError(f"no answer within {seconds:.3g} s") from None
        return None

    def _reply(self, talk: PipedProcess, seconds: float) -> Reply:
        """The same, where it must not have ended."""
        reply = self._next(talk, seconds)
        if reply is not None:
            return reply
        code, said = talk.process.wait(), plain(talk.stderr_tail())
        if code == _SSH_FAILED:
            raise self._unreached(said)
        if code in _NOT_FOUND or _PYTHON_TOO_OLD in said:
            raise DeviceError(
                f"The device {self.name!r} has no Python that can be used: {said}",
                where=f"{self._address}, {self.device.python}",
                expected="Python 3.11 or newer",
                hint="install one there, and name it in the inventory: `python: python3.11`",
            )
        raise DeviceError(
            f"The agent on {self.name!r} failed with exit code {code}: {said or 'it said nothing'}",
            where=self._address,
        )

    def _unreached(self, said: str) -> LostError | CompressError:
        """Why ssh itself failed, of which it ``said`` so much."""
        port, host, key = self.device.port, self.device.host, self.device.key
        if "Permission denied" in said:
            return DeviceError(
                f"The device {self.name!r} does not let {self.device.user!r} in: {_last_line(said)}",
                where=self._address,
                expected=f"the public half of {key} in ~/.ssh/authorized_keys there",
                hint=f"ssh-copy-id -i {shlex.quote(key)} -p {port} {shlex.quote(f'{self.device.user}@{host}')}",
            )
        if any(words in said for words in _STRANGER):
            kind, pinned = self.device.host_key.split()[:2]
            digest = base64.b64encode(hashlib.sha256(base64.b64decode(pinned)).digest()).decode().rstrip("=")
            seen = _FINGERPRINT.search(said)
            return InputError(
                f"The device {self.name!r} answers with another host key than the inventory has; nothing was sent to "
                "it.",
                where=self._address,
                expected=f"{kind} SHA256:{digest}; it showed {f'{kind} {seen[0]}' if seen else 'none of that kind'}",
                hint=f"if it is the right machine, `ssh-keyscan -p {port} {host}` shows its keys; compare with "
                "`ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` at the machine itself, then put the key under "
                "host_key",
            )
        return LostError(_last_line(said) or "the connection was closed before an answer came")

    def _check_key(self) -> None:
        """Raises `InputError` for a private key that can't be used."""
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
        read = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if read.returncode:
            raise InputError(
                f"The private key cannot be used: {_last_line(read.stderr)}",
                where=str(key),
                expected="a private key without a passphrase, made for this",
                hint=f"ssh-keygen -t ed25519 -N '' -f {key}-device",
            )


def _last_line(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1].strip() if lines else ""


def plain(text: str) -> str:
    """What a device said, without what would do something to a terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
