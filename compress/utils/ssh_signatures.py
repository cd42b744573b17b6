"""Signatures in OpenSSH's format, with keys that people have. `ssh-keygen` creates and checks them.

OpenSSH's PROTOCOL.sshsig describes the format. A signature is base64, in a file of its own between two lines of armour.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from compress.utils.errors import InputError, UntrustedError

_HEAD, _TAIL = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
_KEY_TYPE = re.compile(r"^(ssh|ecdsa|sk-ssh|sk-ecdsa)-[\w.@-]+$")
_KRL_MAGIC = b"SSHKRL\n\0"
_SECONDS = 60
"""Time for ssh-keygen, which may wait for an agent that asks its user."""


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


@dataclass(frozen=True)
class Signers:
    """Keys that may sign.

    Attributes:
        file: Public keys, or OpenSSH's `allowed_signers`.
        revoked: Keys whose signatures no longer count: public keys, or OpenSSH's key revocation list.
    """

    file: Path
    revoked: Path | None = None


@dataclass(frozen=True)
class SignedContent:
    """Content with its signature.

    Attributes:
        content: The content.
        signature: The signature, as base64.
        namespace: Namespace of the signature.
        title: Name of the content in messages, with its article.
        where: Place of the signature.
    """

    content: bytes
    signature: bytes
    namespace: str
    title: str
    where: str


def sign(content: bytes, key: Path, namespace: str) -> bytes:
    """Return a signature of some content as base64. Raises `InputError` if the key or ssh-keygen cannot be used."""
    key = key.expanduser()
    if not key.is_file():
        raise InputError("There is no such key.", where=str(key), expected="a private key that `ssh-keygen` made")
    process = _ssh_keygen(["-q", "-Y", "sign", "-f", str(key.resolve()), "-n", namespace], Path(), content)
    signature = b"".join(process.stdout.splitlines()[1:-1])
    if process.returncode == 0 and signature:
        return signature
    if b"passphrase" in process.stderr:
        raise InputError(
            "The key has a passphrase, and ssh-agent does not hold it.",
            where=str(key),
            expected="a private key without a passphrase, or one that ssh-agent holds",
            hint=f"ssh-add {key}, then give the same command again",
        )
    raise InputError(
        f"ssh-keygen does not sign: {_last_line(process)}",
        where=str(key),
        expected="a private key without a passphrase, or its public key while ssh-agent holds it",
    )


def check_signature(signed: SignedContent, signers: Signers | None) -> str:
    """Check a signature, and that one of the signers made it unless they are None.

    Returns:
        The fingerprint of the key that signed.

    Raises:
        UntrustedError: The signature does not fit, or is by another or a revoked key.
        InputError: The file of the signers cannot be used.
    """
    public_key = signing_key(signed.signature)
    # ssh-keygen tolerates other encodings of the same signature, so that a byte could change unseen.
    if public_key is None or base64.b64encode(base64.b64decode(signed.signature)) != signed.signature:
        raise UntrustedError("The signature was changed after it was written.", where=signed.where)
    fingerprint = _fingerprint(public_key)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "signature").write_bytes(armoured(signed.signature))
        options = ["-n", signed.namespace, "-s", "signature"]
        failure = None if signers is None else _failure(signed, signers, options, folder)
        if signers is not None and failure is None:
            return fingerprint
        # This step proves that the content has this signature, by whatever key.
        process = _ssh_keygen(["-Y", "check-novalidate", *options], folder, signed.content)
        if process.returncode:
            raise UntrustedError(
                f"The signature does not fit {signed.title}: {_last_line(process)}", where=signed.where
            )
        if signers is None:
            return fingerprint
        expected = f"a signature by a key in {signers.file}, for {signed.namespace}"
        # ssh-keygen gives the same reason for unknown and for revoked keys.
        if signers.revoked is not None and _failure(signed, Signers(signers.file), options, folder) is None:
            raise UntrustedError(
                f"A revoked key signed {signed.title}, {fingerprint}.",
                where=signed.where,
                expected=f"{expected}, that is not in {signers.revoked}",
                hint="ask the signer for a signature by another key",
            )
        raise UntrustedError(
            f"Another key signed {signed.title}, {fingerprint}: {failure}",
            where=signed.where,
            expected=expected,
            hint="ask whoever you trust for the signer's public key, and compare its fingerprint "
            "(`ssh-keygen -l -f KEY.pub`); do not take the key from where these files came from",
        )


def _failure(signed: SignedContent, signers: Signers, options: list[str], folder: Path) -> str | None:
    """Return why no signer's key made the signature, or None if one did.

    Args:
        signed: The content.
        signers: The signers.
        options: Options of ssh-keygen for namespace and signature.
        folder: Folder for files of the check.
    """
    allowed = folder / "allowed_signers"
    allowed.write_text(allowed_signers(signers.file, signed.namespace), encoding="utf-8")
    options = ["-f", allowed.name, *options]
    process = _ssh_keygen(["-Y", "find-principals", *options], folder, signed.content)
    identity = process.stdout.decode(errors="replace").partition("\n")[0]
    if identity:
        revoked = [] if signers.revoked is None else ["-r", str(signers.revoked.resolve())]
        process = _ssh_keygen(["-Y", "verify", "-I", identity, *options, *revoked], folder, signed.content)
    return _last_line(process) if process.returncode else None


def allowed_signers(file: Path, namespace: str) -> str:
    """Return a file of public keys as OpenSSH's `allowed_signers`, or such a file as it is.

    Raises `InputError` for another file.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The public key cannot be read: {error}", where=str(file)) from None
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    # A key is a type followed by base64. Lines of `allowed_signers` have principals before that.
    if not any(_KEY_TYPE.match(field) for fields in lines for field in fields[:-1]):
        raise InputError("This is no public key.", where=str(file), expected="the .pub file of the signer's key")
    # ssh-keygen verifies against a file of allowed signers only, so a public key is wrapped into one.
    if all(_KEY_TYPE.match(fields[0]) for fields in lines):
        return "".join(f'signer namespaces="{namespace}" {" ".join(fields[:2])}\n' for fields in lines)
    return text


def fingerprints(signers: str) -> list[str]:
    """Return the fingerprint of each key of `allowed_signers`. Raises `InputError` for one that is no key."""
    lines = [line.split() for line in signers.splitlines() if not line.startswith("#")]
    pairs = [pair for fields in lines for pair in itertools.pairwise(fields) if _KEY_TYPE.match(pair[0])]
    for kind, key in pairs:
        try:
            base64.b64decode(key, validate=True)
        except binascii.Error:
            raise InputError(
                f"This is no public key: {kind} {key}", expected="keys as `ssh-keygen` writes them"
            ) from None
    return [_fingerprint(base64.b64decode(key)) for _, key in pairs]


def _fingerprint(public_key: bytes) -> str:
    """Return the fingerprint of a key, as `ssh-keygen -l` shows it."""
    return f"SHA256:{base64.b64encode(hashlib.sha256(public_key).digest()).decode().rstrip('=')}"


def revocation_list(file: Path) -> bytes:
    """Return a file of public keys, or of fingerprints as `hash: SHA256:...`, as OpenSSH's key revocation list.

    Raises `InputError` for a file that is neither that nor such a list.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"The list of revoked keys cannot be read: {error}", where=str(file)) from None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "given").write_bytes(content)
        is_list = content.startswith(_KRL_MAGIC)
        arguments = ["-Q", "-l", "-f", "given"] if is_list else ["-q", "-k", "-f", "list", "given"]
        process = _ssh_keygen(arguments, folder, b"")
        if process.returncode:
            raise InputError(
                f"The list of revoked keys cannot be used: {_last_line(process)}",
                where=str(file),
                expected="public keys, fingerprints as `hash: SHA256:...`, or a list that `ssh-keygen -k` wrote",
            )
        return content if is_list else (folder / "list").read_bytes()


def sign_file(folder: Path, key: Path, signed: SignedFile) -> None:
    """Write the signature beside the file. Raises `InputError` if the key or ssh-keygen cannot be used."""
    path = folder / signed.signature
    # A signature of an older file must not remain if there will be no new one.
    path.unlink(missing_ok=True)
    path.write_bytes(armoured(sign((folder / signed.file).read_bytes(), key, signed.namespace)))


def check_file(folder: Path, signer: Path | None, signed: SignedFile) -> str | None:
    """Check the signature of a file.

    Args:
        folder: Folder of the file.
        signer: Public key, or OpenSSH's `allowed_signers`, one of whose keys must have signed; None for any key.
        signed: Kind of file.

    Returns:
        The fingerprint of the key that signed, or None if the file is not signed and no signer is required.

    Raises:
        UntrustedError: The signature is missing, does not fit, or is by another key.
    """
    path = folder / signed.signature
    if not path.is_file():
        if signer is None:
            return None
        expected = f"a {signed.signature} by {signer}"
        raise UntrustedError(f"The {signed.title} is not signed.", where=str(folder), expected=expected)
    content = path.read_bytes()
    signature = b"".join(content.splitlines()[1:-1])
    if content != armoured(signature):
        raise UntrustedError("The signature was changed after it was written.", where=str(path))
    parts = ((folder / signed.file).read_bytes(), signature, signed.namespace, f"the {signed.title}", str(path))
    return check_signature(SignedContent(*parts), None if signer is None else Signers(signer))


def armoured(signature: bytes) -> bytes:
    """Return a signature as the file that OpenSSH's tools read."""
    text = signature.decode("ascii", "replace")
    lines = [text[start : start + 70] for start in range(0, len(text), 70)]
    return ("\n".join([_HEAD, *lines, _TAIL]) + "\n").encode()


def signing_key(signature: bytes) -> bytes | None:
    """Return the public key that a signature states, or None if it is no signature."""
    try:
        blob = base64.b64decode(signature, validate=True)
    except (ValueError, binascii.Error):
        return None
    # PROTOCOL.sshsig: the magic, a version of 4 bytes, and the key after 4 bytes with its length.
    length = int.from_bytes(blob[10:14])
    key = blob[14 : 14 + length]
    return key if blob.startswith(b"SSHSIG\0\0\0\1") and key and len(key) == length else None


def _ssh_keygen(arguments: list[str], folder: Path, content: bytes) -> subprocess.CompletedProcess[bytes]:
    """Run ssh-keygen in a folder, with bytes as standard input. Raises `InputError` if it is missing or hangs."""
    program = shutil.which("ssh-keygen")
    if program is None:
        raise InputError(
            "Signatures need ssh-keygen, which is not on PATH.",
            hint="install OpenSSH's client (Debian: apt-get install openssh-client)",
        )
    command = [program, *arguments]
    # Without a terminal, and without a program that asks, a key with a passphrase is an error instead of a question.
    environment = {**os.environ, "SSH_ASKPASS_REQUIRE": "never"}
    try:
        return subprocess.run(
            command,
            cwd=folder,
            env=environment,
            input=content,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"ssh-keygen does not answer within {_SECONDS} seconds.",
            where=" ".join(command),
            hint="does ssh-agent, or a hardware key, wait for you?",
        ) from error


def _last_line(process: subprocess.CompletedProcess[bytes]) -> str:
    """Return the last line of output, or the exit code if there is none."""
    lines = (process.stderr + process.stdout).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {process.returncode}"
