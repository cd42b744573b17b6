"""Download a Debian package file with apt-get, from the sources that its user set up; nothing is installed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

from compress.errors import SampleError
from compress.progress import Progress
from compress.samples.client import cause_of, run_client
from compress.samples.sample import Package

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
        raise _failure(sample, package, done.output)
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
                mend=f"`compress samples fetch {sample}` on a Debian machine or in a Debian container, then copy the "
                "folder that it names, with the one around it, to the same place here",
            )


def _failure(sample: str, package: Package, output: str) -> SampleError:
    """What went wrong, by what apt wrote."""
    errors = [line.strip().removeprefix("E: ") for line in output.splitlines() if line.strip().startswith("E:")]
    cause = cause_of(output, errors, "apt-get said nothing")
    return SampleError(
        f"Sample {sample!r} cannot be fetched: {cause}.".replace("..", "."),
        where=f"apt-get download {package.requirement}",
        expected=f"a network connection, and sources of a Debian release that has {package.filename}",
        mend="`apt-get update`, then try again; another release has another version of the package, "
        "so use the one that has this",
    )
