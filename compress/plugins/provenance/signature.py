"""A detached signature of one file that names all others by digest, in OpenSSH's format, by keys that people have.

OpenSSH's PROTOCOL.sshsig describes the format; `ssh-keygen` makes and checks it.
"""

from __future__ import annotations

import base64
import binascii
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from compress.utils.errors import BundleError, InputError

_HEAD, _TAIL = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
_COLUMNS = 70
_SECONDS = 60
_SIGNER = "signer"
_KEY_TYPE = re.compile(r"^(ssh|ecdsa|sk-ssh|sk-ecdsa)-[\w.@-]+$")


@dataclass(frozen=True)
class Signed:
    """A kind of thing that is signed: its ``file``, the ``namespace`` that keeps kinds apart, and what it is called."""

    file: str
    namespace: str
    what: str

    @property
    def signature(self) -> str:
        """The signature's file, beside the other."""
        return f"{self.file}.sig"


def sign(folder: Path, key: Path, signed: Signed) -> None:
    """Write the signature beside the file. Raises `InputError` where the key or ssh-keygen can't be used."""
    if not key.is_file():
        raise InputError("There is no such key.", where=str(key), expected="a private key that `ssh-keygen` made")
    (folder / signed.signature).unlink(missing_ok=True)  # ssh-keygen asks before it writes over one
    arguments = ["-q", "-Y", "sign", "-f", str(key.resolve()), "-n", signed.namespace, signed.file]
    done = _ssh_keygen(arguments, folder, b"")
    if done.returncode or not (folder / signed.signature).is_file():
        raise InputError(
            f"ssh-keygen does not sign: {_last_line(done)}",
            where=str(key),
            expected="a private key without a passphrase, or its public key while ssh-agent holds it",
        )


def check_signature(folder: Path, signer: Path | None, signed: Signed) -> str | None:
    """The signing key's fingerprint, or None for what isn't signed.

    With ``signer``, a public key's file or OpenSSH's `allowed_signers`, the signature must be there and by a key in it.
    Raises `BundleError`.
    """
    path = folder / signed.signature
    if not path.is_file():
        if signer is None:
            return None
        expected = f"a {signed.signature} by {signer}"
        raise BundleError(f"The {signed.what} is not signed.", where=str(folder), expected=expected)
    _check_armour(path)
    content = (folder / signed.file).read_bytes()
    arguments = ["-Y", "check-novalidate", "-n", signed.namespace, "-s", signed.signature]
    done = _ssh_keygen(arguments, folder, content)
    if done.returncode:
        raise BundleError(f"The signature does not fit the {signed.file}: {_last_line(done)}", where=str(path))
    found = re.search(r"SHA256:\S+", done.stdout.decode(errors="replace"))
    fingerprint = found[0] if found else "unknown"
    if signer is not None:
        _check_signer(folder, signer, signed, content, fingerprint)
    return fingerprint


def _check_signer(folder: Path, signer: Path, signed: Signed, content: bytes, fingerprint: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        allowed, who = signer.resolve(), None
        if (keys := _public_keys(signer)) is not None:
            allowed, who = Path(scratch) / "allowed_signers", _SIGNER
            allowed.write_text("".join(f'{who} namespaces="{signed.namespace}" {key}\n' for key in keys))
        rest = ["-f", str(allowed), "-n", signed.namespace, "-s", signed.signature]
        if who is None:
            done = _ssh_keygen(["-Y", "find-principals", *rest], folder, content)
            who = done.stdout.decode(errors="replace").partition("\n")[0]
        if who:
            done = _ssh_keygen(["-Y", "verify", "-I", who, *rest], folder, content)
    if done.returncode:
        raise BundleError(
            f"Another key signed the {signed.what}, {fingerprint}: {_last_line(done)}",
            where=str(folder),
            expected=f"a signature by a key in {signer}, for {signed.namespace}",
            hint="ask whoever you trust for the signer's public key, and compare its fingerprint "
            "(`ssh-keygen -l -f KEY.pub`); do not take the key from where these files came from",
        )


def _public_keys(signer: Path) -> list[str] | None:
    """Those of a public key's file; None for `allowed_signers`, whose conditions `ssh-keygen` knows.

    Raises `InputError` for a file with no key.
    """
    try:
        text = signer.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The public key cannot be read: {error}", where=str(signer)) from None
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not any(_KEY_TYPE.match(field) for fields in lines for field in fields[:-1]):
        raise InputError("This is no public key.", where=str(signer), expected="the .pub file of the signer's key")
    return [" ".join(fields[:2]) for fields in lines] if all(_KEY_TYPE.match(fields[0]) for fields in lines) else None


def _check_armour(path: Path) -> None:
    """Only one way to write a signature down is taken, so that no byte of it can change unseen."""
    content = path.read_bytes()
    try:
        body = base64.b64decode("".join(content.decode("ascii").splitlines()[1:-1]), validate=True)
    except (ValueError, binascii.Error):
        body = b""
    text = base64.b64encode(body).decode()
    lines = [text[at : at + _COLUMNS] for at in range(0, len(text), _COLUMNS)]
    if content != ("\n".join([_HEAD, *lines, _TAIL]) + "\n").encode():
        raise BundleError("The signature was changed after it was written.", where=str(path))


def _ssh_keygen(arguments: list[str], folder: Path, given: bytes) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise InputError(
            "Signatures are made and checked with ssh-keygen, which is not on PATH.",
            hint="install OpenSSH's client (Debian: apt-get install openssh-client)",
        )
    command = [program, *arguments]
    try:
        return subprocess.run(command, cwd=folder, input=given, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError("ssh-keygen does not answer.", where=" ".join(command)) from error


def _last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
