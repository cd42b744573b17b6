"""Getting into a device: its one host key, the user's one key, and nothing else that might let anybody in."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import stat
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from compress.devices.inventory import Device
from compress.errors import DeviceError, InputError, MissingExtraError

try:
    import asyncssh as asyncssh
except ImportError:
    raise MissingExtraError("asyncssh", "ssh", "A device") from None

Answer = TypeVar("Answer")
_CONNECT_SECONDS = 20.0
_KEEPALIVE_SECONDS = 15


class LostError(Exception):
    """The connection is gone, or as good as gone."""


_STRANGER = (asyncssh.HostKeyNotVerifiable, asyncssh.KeyExchangeFailed)
_NOT_LET_IN = (asyncssh.PermissionDenied, asyncssh.IllegalUserName)
_REFUSED = (*_STRANGER, *_NOT_LET_IN)
_SFTP_GONE = (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection)


async def within(seconds: float, act: Awaitable[Answer]) -> Answer:
    """Await ``act``; whatever means that the other end is not there is a `LostError`."""
    try:
        async with asyncio.timeout(seconds):
            return await act
    except TimeoutError:
        raise LostError(f"no answer within {seconds:.3g} s") from None
    except (asyncssh.Error, OSError, asyncio.IncompleteReadError) as error:
        if isinstance(error, _REFUSED) or (isinstance(error, asyncssh.SFTPError) and not isinstance(error, _SFTP_GONE)):
            raise
        raise LostError(str(error) or type(error).__name__) from None


@dataclass(frozen=True)
class Login:
    """How one device is entered; ``key`` is the path of the private key."""

    name: str
    device: Device
    key: Path

    def address(self) -> str:
        """For messages."""
        return f"{self.device.user}@{self.device.host}, port {self.device.port}"

    async def connect(self) -> asyncssh.SSHClientConnection:
        """Raises `LostError`, `InputError` for keys that don't fit, `DeviceError` for a user who isn't let in."""
        pinned = self._pinned()
        seen: list[asyncssh.SSHKey] = []

        class Client(asyncssh.SSHClient):
            def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
                """Asked for a key other than the pinned one, which is never accepted."""
                seen.append(key)
                return False

        try:
            return await within(
                2 * _CONNECT_SECONDS,
                asyncssh.connect(
                    self.device.host,
                    self.device.port,
                    username=self.device.user,
                    client_factory=Client,
                    client_keys=[self._identity()],
                    known_hosts=([pinned], [], []),
                    # Nothing of the user's own SSH settings, and no other way in.
                    config=[],
                    agent_path=None,
                    agent_forwarding=False,
                    preferred_auth="publickey",
                    connect_timeout=_CONNECT_SECONDS,
                    login_timeout=_CONNECT_SECONDS,
                    keepalive_interval=_KEEPALIVE_SECONDS,
                    keepalive_count_max=3,
                    compression_algs=None,
                ),
            )
        except _STRANGER as error:
            raise self._stranger(pinned, seen[0] if seen else None, str(error)) from None
        except _NOT_LET_IN as error:
            raise DeviceError(
                f"The device {self.name!r} does not let {self.device.user!r} in: {error}",
                where=self.address(),
                expected=f"the public half of {self.device.key} in ~/.ssh/authorized_keys there",
                mend=f"ssh-copy-id -i {shlex.quote(self.device.key)} -p {self.device.port} "
                f"{shlex.quote(f'{self.device.user}@{self.device.host}')}",
            ) from None

    def _pinned(self) -> asyncssh.SSHKey:
        try:
            return asyncssh.import_public_key(self.device.host_key)
        except asyncssh.KeyImportError as error:
            raise InputError(
                f"The host key of the device {self.name!r} cannot be read: {error}",
                expected=f"a public key as `ssh-keyscan -p {self.device.port} {self.device.host}` writes it",
            ) from None

    def _identity(self) -> asyncssh.SSHKey:
        try:
            if stat.S_IMODE(self.key.stat().st_mode) & 0o077:
                raise InputError(
                    "The private key may be read by others.", where=str(self.key), mend=f"chmod 600 {self.key}"
                )
            return asyncssh.read_private_key(self.key)
        except OSError as error:
            raise InputError(f"The private key cannot be read: {error.strerror}", where=str(self.key)) from None
        except asyncssh.KeyImportError as error:
            raise InputError(
                f"The private key cannot be used: {error}",
                where=str(self.key),
                expected="a private key without a passphrase, made for this",
                mend=f"ssh-keygen -t ed25519 -N '' -f {self.key}-device",
            ) from None

    def _stranger(self, pinned: asyncssh.SSHKey, seen: asyncssh.SSHKey | None, why: str) -> InputError:
        shown = f"{seen.get_algorithm()} {seen.get_fingerprint()}" if seen else f"none of that kind ({why})"
        return InputError(
            f"The device {self.name!r} answers with another host key than the inventory has; nothing was sent to it.",
            where=self.address(),
            expected=f"{pinned.get_algorithm()} {pinned.get_fingerprint()}; it showed {shown}",
            mend=f"if it is the right machine, `ssh-keyscan -p {self.device.port} {self.device.host}` shows its keys; "
            "compare with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` at the machine itself, then put the key "
            "under host_key",
        )

    async def why_not(self, lost: LostError) -> DeviceError | InputError:
        """What keeps this machine from the device: a server that lacks a key of the pinned kind ends without a word."""
        pinned = self._pinned()
        with contextlib.suppress(LostError, asyncssh.Error):
            asked = asyncssh.get_server_host_key(self.device.host, self.device.port, config=[])
            shown = await within(_CONNECT_SECONDS, asked)
            if shown is not None and shown != pinned:
                return self._stranger(pinned, shown, str(lost))
        return DeviceError(
            f"The device {self.name!r} cannot be reached: {lost}.",
            where=self.address(),
            expected="a running SSH server at that address and port",
        )
