"""llama.cpp's official release with a library for each kind of processor.

It is in the npm package of node-llama-cpp for this platform; the build of the Python package only has AVX2. No install
scripts are run.
"""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

from peers.environment import UnavailableError

from compress.data.samples.fetch import cache_root

PACKAGE, VERSION = "@node-llama-cpp/linux-x64", "3.21.1"
SHA256 = "4b5b65a8b2611d8af94349b02d815c0f424a30a0a19aef2be5db25ecfef6730f"
_BINARIES = "package/bins/linux-x64"


def llama_cpp_library() -> Path:
    """Return the path of libllama.so, downloaded with npm at the first call. Raises `UnavailableError`."""
    home = cache_root().parent / "peers" / f"llama-cpp-{VERSION}"
    if not home.is_dir():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
            _fetch(Path(scratch))
            (Path(scratch) / _BINARIES).rename(home)
    (library,) = home.glob("libllama.v*.so")
    return library


def _fetch(folder: Path) -> None:
    command = ["npm", "pack", "--ignore-scripts", "--silent", f"{PACKAGE}@{VERSION}"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UnavailableError("npm is not installed") from error
    if done.returncode != 0:
        raise UnavailableError(f"`{' '.join(command)}` failed: {done.stderr.strip().splitlines()[-1:]}")
    (archive,) = folder.glob("*.tgz")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise UnavailableError(f"{PACKAGE} {VERSION} has the digest {digest}, not {SHA256}")
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
