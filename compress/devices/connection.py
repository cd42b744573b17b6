"""A connection to one device: requests to the agent there, and files; comes back by itself when it was dropped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from compress.devices.inventory import Device
from compress.devices.login import Login, LostError, asyncssh, within
from compress.errors import DeviceError, InputError

Answer = TypeVar("Answer")
Reply = dict[str, Any]

_PYTHON_TOO_OLD = "compress needs Python 3.11, and this is"
_BOOT = (
    f"import sys; sys.version_info >= (3, 11) or sys.exit('{_PYTHON_TOO_OLD} %s' % sys.version.split()[0]); "
    "import json; message = json.loads(sys.stdin.readline()); place = {'__name__': 'compress_agent'}; "
    "exec(compile(sys.stdin.read(), 'agent.py', 'exec'), place); place['answer'](message)"
)
_AGENT = Path(__file__).with_name("agent.py")
_NOT_FOUND = (126, 127)
_FAREWELL_SECONDS = 20.0
_ANSWER_SECONDS = 120.0
_CHUNK_BYTES = 1 << 20
_CLOSE_SECONDS = 5.0
_LAST_WORDS = 600


class Connection:
    """A context manager. ``folder`` is that of the inventory, which a relative key path counts from.

    A request whose connection is lost is made again, until the device has not been heard of for ``patience_seconds``;
    everything that the agent does may be asked twice.
    """

    def __init__(self, name: str, device: Device, folder: Path, patience_seconds: float = 120.0) -> None:
        self.name, self.device = name, device
        self._login = Login(name, device, folder / Path(device.key).expanduser())
        self._patience = patience_seconds
        self._runner = asyncio.Runner()
        self._heard = time.monotonic()
        self._open: asyncssh.SSHClientConnection | None = None
        self._sftp: asyncssh.SFTPClient | None = None

    def __enter__(self) -> Self:
        """Connect. Raises `DeviceError` or `InputError` at once where that fails."""
        try:
            self._connected()
        except LostError as lost:
            reason = self._runner.run(self._login.why_not(lost))
            self._runner.close()
            raise reason from None
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._drop()
        self._runner.close()

    def ask(self, do: str, timeout: float = _ANSWER_SECONDS, **fields: Any) -> Reply:
        """The agent's answer; see `agent` for what it can do. Raises `DeviceError` for what it refuses.

        Where the connection is lost, connect anew and ask again. Raises `DeviceError` in the end.
        """
        self._heard, pause = time.monotonic(), 0.5
        while True:
            try:
                return self._checked(self._answer({"do": do, **fields}, timeout))
            except LostError as lost:
                self._drop()
                if time.monotonic() + pause - self._heard > self._patience:
                    raise DeviceError(
                        f"The device {self.name!r} went away: {lost}.",
                        where=self._login.address(),
                        mend=f"it was tried for {self._patience:.0f} s; the same command goes on from what has arrived",
                    ) from None
                time.sleep(pause)
                pause = min(2 * pause, 15.0)

    def follow(self, silence_seconds: float = 60.0, **fields: Any) -> Iterator[Reply]:
        """What `agent.follow` prints, the answer last; raises `LostError` after so long without a word."""
        process = self._start({"do": "follow", **fields}, silence_seconds)
        try:
            while line := self._await(silence_seconds, process.stdout.readline()):
                reply = _parsed(line)
                if reply is not None:
                    self._heard = time.monotonic()
                    yield self._checked(reply)
                    if reply.get("ended"):
                        return
            try:
                said = self._await(_CLOSE_SECONDS, process.stderr.read())
            except LostError:
                said = b""
            raise LostError(f"the agent stopped talking: {_end_of(said)}")
        finally:
            process.close()

    def put(self, file: Path, place: str, offset: int) -> Iterator[int]:
        """Write ``file`` from byte ``offset`` on to ``place`` there, yielding how many bytes lie there; can be lost."""
        target: asyncssh.SFTPClientFile | None = None
        try:
            if self._sftp is None:
                self._sftp = self._await(_ANSWER_SECONDS, self._connected().start_sftp_client())
            # Without cutting off what is there.
            flags = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT
            target = self._await(_ANSWER_SECONDS, self._sftp.open(place, flags, encoding=None))
            with file.open("rb") as source:
                source.seek(offset)
                while block := source.read(_CHUNK_BYTES):
                    self._await(_ANSWER_SECONDS, target.write(block, offset))
                    self._heard = time.monotonic()
                    offset += len(block)
                    yield offset
        except asyncssh.SFTPError as error:
            raise DeviceError(
                f"The device {self.name!r} cannot write what is sent to it: {error.reason}.",
                where=f"{self._login.address()}, {place}",
                expected="a folder that may be written to, on a disk that is not full",
            ) from None
        finally:
            if target is not None:
                with contextlib.suppress(LostError, asyncssh.SFTPError):
                    self._await(_CLOSE_SECONDS, target.close())

    def farewell(self, do: str, **fields: Any) -> None:
        """Ask once, and be content if no answer comes."""
        with contextlib.suppress(DeviceError, InputError, LostError):
            self._answer({"do": do, **fields}, _FAREWELL_SECONDS)

    def recover(self, do: str, **fields: Any) -> Reply:
        """Come back from a lost connection, and ask."""
        self._drop()
        return self.ask(do, **fields)

    def refused(self, told: Reply) -> DeviceError:
        """The error that the agent tells of."""
        return DeviceError(
            f"The device {self.name!r}: {plain(told['what'])}", where=self._login.address(), expected=told["expected"]
        )

    def _start(self, message: Reply, timeout: float) -> asyncssh.SSHClientProcess[bytes]:
        """The agent on its way to an answer."""
        command = shlex.join([self.device.python, "-I", "-c", _BOOT])
        process = self._await(timeout, self._connected().create_process(command, encoding=None))
        order = json.dumps({"cache": self.device.cache, **message})
        process.stdin.write(order.encode() + b"\n" + _AGENT.read_bytes())
        process.stdin.write_eof()
        return process

    def _answer(self, message: Reply, timeout: float) -> Reply:
        process = self._start(message, timeout)
        try:
            output, errors = self._await(timeout, process.communicate())
        finally:
            process.close()
        lines = [found for line in (output or b"").splitlines() if (found := _parsed(line)) is not None]
        if lines:
            return lines[-1]
        code, said = process.exit_status, _end_of(errors or b"")
        if code is None:
            raise LostError("the connection was closed before an answer came")
        if code in _NOT_FOUND or _PYTHON_TOO_OLD in said:
            raise DeviceError(
                f"The device {self.name!r} has no Python that can be used: {said}",
                where=f"{self._login.address()}, {self.device.python}",
                expected="Python 3.11 or newer",
                mend="install one there, and name it in the inventory: `python: python3.11`",
            )
        raise DeviceError(
            f"The agent on {self.name!r} failed with exit code {code}: {said}", where=self._login.address()
        )

    def _checked(self, reply: Reply) -> Reply:
        if "refusal" in reply:
            raise self.refused(reply["refusal"])
        return reply

    def _connected(self) -> asyncssh.SSHClientConnection:
        if self._open is None:
            self._open = self._runner.run(self._login.connect())
        return self._open

    def _await(self, seconds: float, act: Awaitable[Answer]) -> Answer:
        return self._runner.run(within(seconds, act))

    def _drop(self) -> None:
        if self._open is not None:
            self._open.abort()
            self._runner.run(self._open.wait_closed())
        self._open = self._sftp = None


def _end_of(said: bytes) -> str:
    return plain(said.decode(errors="replace")[-_LAST_WORDS:].strip()) or "it said nothing"


def plain(text: str) -> str:
    """What a device said, without what would do something to a terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def _parsed(line: bytes) -> Reply | None:
    """A line of the agent's; None for what a login script may have written."""
    try:
        reply = json.loads(line)
    except ValueError:
        return None
    return reply if isinstance(reply, dict) else None
