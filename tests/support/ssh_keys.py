"""SSH keys for signatures."""

from __future__ import annotations

import subprocess
from pathlib import Path


def new_key(folder: Path, passphrase: str = "") -> Path:
    """Create an SSH key pair in a folder, and return the path of the private key."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", "", "-f", str(path)], check=True)
    return path
