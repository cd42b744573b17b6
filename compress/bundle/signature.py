"""A detached signature of `manifest.json`, in OpenSSH's format, by the keys that people have already.

The manifest has every other file's SHA-256, so that one signature covers the bundle. OpenSSH's PROTOCOL.sshsig
describes the format; `ssh-keygen` makes and checks it.
"""

from __future__ import annotations

import base64
import binascii
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from compress.bundle.manifest import MANIFEST, SIGNATURE
from compress.errors import BundleError, InputError

NAMESPACE = "compress-bundle"
_HEAD, _TAIL = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
_COLUMNS = 70
_SECONDS = 60
_SIGNER = "signer"


def sign(folder: Path, key: Path) -> None:
    """Write the signature beside the manifest. Raises `InputError` where the key or ssh-keygen can't be used."""
    if not key.is_file():
        raise InputError("There is no such key.", where=str(key), expected="a private key that `ssh-keygen` made")
    done = _ssh_keygen(["-q", "-Y", "sign", "-f", str(key.resolve()), "-n", NAMESPACE, MANIFEST], folder, b"")
    if done.returncode or not (folder / SIGNATURE).is_file():
        raise InputError(
            f"ssh-keygen does not sign: {_last_line(done)}",
            where=str(key),
            expected="a private key without a passphrase, or its public key while ssh-agent holds it",
        )


def check_signature(folder: Path, signer: Path | None) -> str | None:
    """The signing key's fingerprint, or None for a bundle that isn't signed.

    With ``signer``, a public key's file, the signature must be there and that key's. Raises `BundleError`.
    """
    path = folder / SIGNATURE
    if not path.is_file():
        if signer is None:
            return None
        raise BundleError("The bundle is not signed.", where=str(folder), expected=f"a {SIGNATURE} by {signer}")
    _check_armour(path)
    manifest = (folder / MANIFEST).read_bytes()
    done = _ssh_keygen(["-Y", "check-novalidate", "-n", NAMESPACE, "-s", SIGNATURE], folder, manifest)
    if done.returncode:
        raise BundleError(f"The signature does not fit the {MANIFEST}: {_last_line(done)}", where=str(path))
    found = re.search(r"SHA256:\S+", done.stdout.decode(errors="replace"))
    if signer is not None:
        _check_signer(folder, signer, manifest)
    return found[0] if found else "unknown"


def _check_signer(folder: Path, signer: Path, manifest: bytes) -> None:
    try:
        fields = signer.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The public key cannot be read: {error}", where=str(signer)) from None
    if len(fields) < 2 or "PRIVATE" in " ".join(fields[:5]):
        raise InputError("This is no public key.", where=str(signer), expected="the .pub file of the signer's key")
    with tempfile.TemporaryDirectory() as scratch:
        allowed = Path(scratch) / "allowed_signers"
        allowed.write_text(f'{_SIGNER} namespaces="{NAMESPACE}" {fields[0]} {fields[1]}\n')
        command = ["-Y", "verify", "-f", str(allowed), "-I", _SIGNER, "-n", NAMESPACE, "-s", SIGNATURE]
        done = _ssh_keygen(command, folder, manifest)
    if done.returncode:
        raise BundleError(f"Another key signed the bundle: {_last_line(done)}", where=str(folder), expected=str(signer))


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
            mend="install OpenSSH's client (Debian: apt-get install openssh-client)",
        )
    command = [program, *arguments]
    try:
        return subprocess.run(command, cwd=folder, input=given, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError("ssh-keygen does not answer.", where=" ".join(command)) from error


def _last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
