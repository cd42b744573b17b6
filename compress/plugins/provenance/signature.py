"""Detached signature of a file that lists all others by digest, in OpenSSH's format, with keys that people have.

OpenSSH's PROTOCOL.sshsig describes the format. `ssh-keygen` creates and checks it.
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
_KEY_TYPE = re.compile(r"^(ssh|ecdsa|sk-ssh|sk-ecdsa)-[\w.@-]+$")


@dataclass(frozen=True)
class SignedFile:
    """Kind of file that is signed.

    Attributes:
        file: Name of the file.
        namespace: Namespace of its signatures, which prevents that a signature is used for another kind of file.
        title: Name of the file in messages.
    """

    file: str
    namespace: str
    title: str

    @property
    def signature(self) -> str:
        """Return the name of the signature's file."""
        return f"{self.file}.sig"


def sign(folder: Path, key: Path, signed: SignedFile) -> None:
    """Write the signature beside the file. Raises `InputError` if the key or ssh-keygen cannot be used."""
    if not key.is_file():
        raise InputError("There is no such key.", where=str(key), expected="a private key that `ssh-keygen` made")
    # ssh-keygen would ask before it overwrites a signature.
    (folder / signed.signature).unlink(missing_ok=True)
    arguments = ["-q", "-Y", "sign", "-f", str(key.resolve()), "-n", signed.namespace, signed.file]
    process = _ssh_keygen(arguments, folder, b"")
    if process.returncode or not (folder / signed.signature).is_file():
        raise InputError(
            f"ssh-keygen does not sign: {_last_line(process)}",
            where=str(key),
            expected="a private key without a passphrase, or its public key while ssh-agent holds it",
        )


def check_signature(folder: Path, signer: Path | None, signed: SignedFile) -> str | None:
    """Check the signature of a file.

    Args:
        folder: Folder of the file.
        signer: Public key, or OpenSSH's `allowed_signers`, one of whose keys must have signed; None for any key.
        signed: Kind of file.

    Returns:
        The fingerprint of the key that signed, or None if the file is not signed and no signer is required.

    Raises:
        BundleError: The signature is missing, does not fit, or is by another key.
    """
    path = folder / signed.signature
    if not path.is_file():
        if signer is None:
            return None
        expected = f"a {signed.signature} by {signer}"
        raise BundleError(f"The {signed.title} is not signed.", where=str(folder), expected=expected)
    # ssh-keygen tolerates other encodings of the same signature, so check the encoding first.
    _check_armour(path)
    content = (folder / signed.file).read_bytes()
    arguments = ["-Y", "check-novalidate", "-n", signed.namespace, "-s", signed.signature]
    # This step proves that the content has this signature, by whatever key. The next one checks the key.
    process = _ssh_keygen(arguments, folder, content)
    if process.returncode:
        raise BundleError(f"The signature does not fit the {signed.file}: {_last_line(process)}", where=str(path))
    match = re.search(r"SHA256:\S+", process.stdout.decode(errors="replace"))
    fingerprint = match[0] if match else "unknown"
    if signer is not None:
        _check_signer(folder, signer, signed, content, fingerprint)
    return fingerprint


def _check_signer(folder: Path, signer: Path, signed: SignedFile, content: bytes, fingerprint: str) -> None:
    """Raise `BundleError` if none of the signer's keys made the signature.

    Args:
        folder: Folder of the file.
        signer: Public key or `allowed_signers`.
        signed: Kind of file.
        content: Content of the file.
        fingerprint: Fingerprint of the key that signed, for the message.
    """
    with tempfile.TemporaryDirectory() as scratch:
        allowed, identity = signer.resolve(), None
        try:
            text = signer.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The public key cannot be read: {error}", where=str(signer)) from None
        lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        # A key is a type followed by base64. Lines of `allowed_signers` have principals before that.
        if not any(_KEY_TYPE.match(field) for fields in lines for field in fields[:-1]):
            raise InputError("This is no public key.", where=str(signer), expected="the .pub file of the signer's key")
        # ssh-keygen verifies against a file of allowed signers only, so a public key is wrapped into one.
        if all(_KEY_TYPE.match(fields[0]) for fields in lines):
            allowed, identity = Path(scratch) / "allowed_signers", "signer"
            start = f'{identity} namespaces="{signed.namespace}"'
            allowed.write_text("".join(f"{start} {' '.join(fields[:2])}\n" for fields in lines))
        options = ["-f", str(allowed), "-n", signed.namespace, "-s", signed.signature]
        if identity is None:
            process = _ssh_keygen(["-Y", "find-principals", *options], folder, content)
            identity = process.stdout.decode(errors="replace").partition("\n")[0]
        if identity:
            process = _ssh_keygen(["-Y", "verify", "-I", identity, *options], folder, content)
    if process.returncode:
        raise BundleError(
            f"Another key signed the {signed.title}, {fingerprint}: {_last_line(process)}",
            where=str(folder),
            expected=f"a signature by a key in {signer}, for {signed.namespace}",
            hint="ask whoever you trust for the signer's public key, and compare its fingerprint "
            "(`ssh-keygen -l -f KEY.pub`); do not take the key from where these files came from",
        )


def _check_armour(path: Path) -> None:
    """Raise `BundleError` unless the signature has its canonical encoding, so that no byte of it can change unseen."""
    content = path.read_bytes()
    try:
        body = base64.b64decode("".join(content.decode("ascii").splitlines()[1:-1]), validate=True)
    except (ValueError, binascii.Error):
        body = b""
    text = base64.b64encode(body).decode()
    lines = [text[start : start + 70] for start in range(0, len(text), 70)]
    if content != ("\n".join([_HEAD, *lines, _TAIL]) + "\n").encode():
        raise BundleError("The signature was changed after it was written.", where=str(path))


def _ssh_keygen(arguments: list[str], folder: Path, content: bytes) -> subprocess.CompletedProcess[bytes]:
    """Run ssh-keygen in a folder, with bytes as standard input. Raises `InputError` if it is missing or hangs."""
    program = shutil.which("ssh-keygen")
    if program is None:
        raise InputError(
            "Signatures need ssh-keygen, which is not on PATH.",
            hint="install OpenSSH's client (Debian: apt-get install openssh-client)",
        )
    command = [program, *arguments]
    try:
        return subprocess.run(command, cwd=folder, input=content, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError("ssh-keygen does not answer.", where=" ".join(command)) from error


def _last_line(process: subprocess.CompletedProcess[bytes]) -> str:
    """Return the last line of output, or the exit code if there is none."""
    lines = (process.stderr + process.stdout).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {process.returncode}"
