"""Keys whose signatures of a registry's log count, and the newest log that a remote was seen to have.

A line of the log may end with a signature, which covers the line and, through its check, all lines before it. Both are
written at once, so that a killed writer leaves no entry without its signature.

The folder `trust` of a registry names the keys. It belongs to this copy of the registry: `push` does not send it.
"""

from __future__ import annotations

import re
from pathlib import Path

from filelock import FileLock

from compress.plugins.registry.log import LOCK, LogHead, LogSigner, head_of
from compress.report.run_folder import write_atomically
from compress.utils.errors import InputError, UntrustedError
from compress.utils.ssh_signatures import (
    SignedContent,
    Signers,
    allowed_signers,
    check_signature,
    fingerprints,
    revocation_list,
    sign,
    signing_key,
)
from compress.utils.storage import storage_errors

TRUST = "trust"
NAMESPACE = "compress-registry"
_TRIAL = b"compress registry, trial of a key\n"


class Trust:
    """Folder `trust` of the registry in the folder ``root``. Without it, signatures of any key count."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._signers, self._revoked, self._seen = (root / TRUST / name for name in ("signers", "revoked", "seen"))

    @property
    def signers(self) -> Signers | None:
        """Return the keys that may sign, or None if none were named."""
        if not self._signers.is_file():
            # The other files tell that the keys were removed, which must not make everything trusted.
            if self._signers.parent.exists():
                raise InputError(
                    "The keys that may sign this registry are gone.",
                    where=str(self._signers),
                    hint="name them again: compress registry trust KEY.pub",
                )
            return None
        return Signers(self._signers, self._revoked if self._revoked.exists() else None)

    def name(self, signers: Path, revoked: Path | None) -> None:
        """Let only the keys of a file sign from now on. An earlier list of revoked keys stays unless one is given.

        Raises `InputError` if a file has no keys.
        """
        text = allowed_signers(signers, NAMESPACE)
        fingerprints(text)  # raises an error for a damaged key, which could never count
        revoked_keys = None if revoked is None else revocation_list(revoked)
        with storage_errors(self._root):
            self._signers.parent.mkdir(parents=True, exist_ok=True)
            # The revoked keys come first: no moment allows more than before or after.
            if revoked_keys is not None:
                write_atomically(self._revoked, revoked_keys, "list of revoked keys")
            write_atomically(self._signers, text, "list of signers")

    def fingerprints(self) -> list[str]:
        """Return the fingerprint of each key that may sign."""
        return fingerprints(self._signers.read_text(encoding="utf-8"))

    def signer(self, head: LogHead, where: str, signer: Path | None = None) -> str | None:
        """Return the fingerprint of the key that signed a log up to its last line, or None for a log without signature.

        Args:
            head: Last line of the log.
            where: Place of the log.
            signer: Public key or `allowed_signers`, in place of the keys of the folder.

        Raises:
            UntrustedError: There are keys that must have signed, and none of them did; or the signature does not fit.
        """
        signers = self.signers
        if signer is not None:
            signers = Signers(signer, None if signers is None else signers.revoked)
        if head.signature:
            content = SignedContent(
                head.signed_text, head.signature, NAMESPACE, f"line {head.number} of the log", where
            )
            return check_signature(content, signers)
        if signers is None:
            return None
        raise UntrustedError(
            f"Line {head.number} of the log, its last, is not signed." if head.number else "The log has no line.",
            where=where,
            expected=f"a log whose last line is signed by a key in {signers.file}",
            hint="whoever keeps the registry looks at its history and signs it: compress registry sign KEY",
        )

    def check(self, head: LogHead, where: str) -> None:
        """Raise `UntrustedError` unless the keys that were named signed a log. Everything passes if there are none."""
        if self.signers is not None:
            self.signer(head, where)

    def check_remote(self, lines: list[bytes], where: str) -> None:
        """Raise `UntrustedError` unless the log of a remote is signed as it must be and follows the log seen before.

        Remembers the log as seen. Everything passes if no keys were named.
        """
        if self.signers is None:
            return
        self.signer(head_of(lines), where)
        number, check = self._last_seen()
        if len(lines) < number:
            raise UntrustedError(
                f"The log of this remote has {len(lines)} lines, although {number} were seen there before.",
                where=where,
                expected=f"a log that begins with these {number} lines; an older one hides what was decided since",
                hint="if the remote was restored from a backup, or is a copy that lags behind, push to it from a "
                "registry that has all lines; otherwise somebody has rolled it back",
            )
        if number and lines[number - 1][:64] != check:
            raise UntrustedError(
                f"The first {number} lines of the log are not those that were seen at this registry's remote before.",
                where=where,
                expected="the log of the same registry, to which lines are only added",
                hint="is this the address of another registry, which needs a folder of its own (--registry)? "
                "Otherwise somebody has rewritten its history",
            )
        self.remember(lines)

    def remember(self, lines: list[bytes]) -> None:
        """Remember a log that a remote has, unless a longer one was seen or no keys were named."""
        if self.signers is None or not lines:
            return
        with storage_errors(self._root), FileLock(self._root / LOCK):
            # Another process may have seen a longer log meanwhile.
            if self._last_seen()[0] < len(lines):
                write_atomically(self._seen, f"{len(lines)} {lines[-1][:64].decode()}\n", "record of the remote")

    def _last_seen(self) -> tuple[int, bytes]:
        """Return the number of lines of the longest log that was seen, and the check of the last one."""
        if not self._seen.exists():
            return 0, b""
        match = re.fullmatch(rb"([1-9][0-9]{0,11}) ([0-9a-f]{64})\n", self._seen.read_bytes())
        if match is None:
            raise InputError(
                "The record of what the remote had is damaged.",
                where=str(self._seen),
                expected="the number of lines of its log, and the check of the last one",
                hint="compare the history of the remote with what you know, and then remove this file",
            )
        return int(match[1]), match[2]


def log_signer(head: LogHead, trust: Trust, key: Path | None, where: str, endorse: bool = False) -> LogSigner | None:
    """Return the function that signs the next lines of a log, or None for a registry without signatures.

    Args:
        head: Present last line of the log.
        trust: Keys that may sign.
        key: Key of the writer.
        where: Place of the log.
        endorse: The writer has looked at the present lines, so that their signature does not matter.

    Raises:
        InputError: The key is missing or cannot be used, or the present lines have no signature.
        UntrustedError: The key, or the one that signed the present lines, does not count.
    """
    signers = trust.signers
    if key is None:
        if not head.signature and signers is None:
            return None
        raise InputError(
            "The log of this registry is signed, and a new entry would not be.",
            where=where,
            expected="a key that may sign it",
            hint="name it: --sign KEY, or set COMPRESS_REGISTRY_KEY",
        )
    # Use the key before anything is changed, so that a key that does not work leaves nothing behind.
    trial = SignedContent(_TRIAL, sign(_TRIAL, key, NAMESPACE), NAMESPACE, "a trial of your key", str(key))
    if signers is not None:
        check_signature(trial, signers)
    if head.number and not endorse:
        _check_present(head, trust, trial.signature, where)
    return lambda text: sign(text, key, NAMESPACE)


def _check_present(head: LogHead, trust: Trust, own_signature: bytes, where: str) -> None:
    """Raise an error unless the present lines are signed, since a signature of the next line would cover them.

    Without named keys, only the writer's own key counts.
    """
    hint = "look at `compress registry history`; if all of it is right, sign it: compress registry sign KEY"
    try:
        fingerprint = trust.signer(head, where)
    except UntrustedError as error:
        error.hint = hint
        raise
    if fingerprint is None:
        raise InputError(
            f"The {head.number} lines of the log are not signed, and a signature of the next one would cover them.",
            where=where,
            hint=hint,
        )
    if trust.signers is None and signing_key(head.signature) != signing_key(own_signature):
        raise UntrustedError(
            f"Another key signed the last line of the log, {fingerprint}.",
            where=where,
            expected="a line that your key signed, unless other keys are named",
            hint="name all keys that may sign: compress registry trust ALLOWED_SIGNERS",
        )
