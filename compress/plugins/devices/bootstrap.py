"""The process of a session on a device, by its own Python: waits for its order, makes ready, becomes the harness.

It lives apart from the connection that began it, so that a dropped one does no harm. The lock that it was given stays
with it to the end, also when it has become the harness.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from json import dumps, loads
from pathlib import Path
from typing import Any

from compress.plugins.devices import agent

FILES = "files"
_HARNESS = (
    "import sys; sys.path.insert(0, sys.argv[1]); from compress.plugins.devices.harness import main; main(sys.argv[2])"
)
_TRIAL = (
    "import sys; sys.path.insert(0, sys.argv[1]); import importlib; list(map(importlib.import_module, sys.argv[2:]))"
)


def main(cache: str, name: str) -> None:
    """The session ``name`` of the cache; see `agent` for its files."""
    place = Path(cache)
    folder = place / agent.SESSIONS / name
    while not (folder / agent.ORDER).is_file():
        if is_alone(folder):
            shutil.rmtree(folder)
            return
        time.sleep(agent.POLL_SECONDS)
    order = loads((folder / agent.ORDER).read_text(encoding="utf-8"))
    try:
        code = unpack(place, agent.checked_digest(order["code"]))
        for path, blob in order["files"].items():
            _arrange(inside(folder / FILES, path), place / agent.BLOBS / agent.checked_digest(blob))
        python = _environment(place, folder, order["requirements"], order["imports"], code)
    except agent.RefusedError as refusal:
        agent.write(folder / agent.RESULT, {"refusal": refusal.told})
        return
    except (OSError, zipfile.BadZipFile) as error:
        agent.write(
            folder / agent.RESULT, {"refusal": {"what": f"the session cannot be made ready: {error}", "expected": None}}
        )
        return
    os.execv(python, [python, "-P", "-c", _HARNESS, str(code), str(folder)])


def is_alone(folder: Path) -> bool:
    """Whether the near end hasn't been heard of for too long."""
    return time.time() - (folder / agent.ALIVE).stat().st_mtime > agent.WAIT_SECONDS


def tell(folder: Path, line: dict[str, Any]) -> None:
    """Add a line to the progress that the near end follows."""
    with (folder / agent.PROGRESS).open("a", encoding="utf-8") as file:
        file.write(dumps(line) + "\n")


def unpack(cache: Path, digest: str) -> Path:
    """The folder of the package's modules, from the archive that was sent."""
    place = cache / agent.CODE / digest
    if place.is_dir():
        os.utime(place)
        return place
    made = cache / agent.CODE / f"new-{os.getpid()}"
    shutil.rmtree(made, ignore_errors=True)
    with zipfile.ZipFile(cache / agent.BLOBS / digest) as archive:
        for entry in archive.namelist():
            inside(made, entry)
        archive.extractall(made)
    made.rename(place)
    return place


def inside(folder: Path, path: str) -> Path:
    """The path below a folder. Raises `RefusedError` for one that leads out of it."""
    parts = Path(path).parts
    if not parts or Path(path).is_absolute() or ".." in parts:
        raise agent.RefusedError(f"the path {path!r} leads out of the session's folder")
    return folder.joinpath(*parts)


def _arrange(place: Path, blob: Path) -> None:
    """Give a blob its name in the session's folder, without writing its bytes again where that can be."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(blob, place)
    except OSError:
        shutil.copyfile(blob, place)


def _environment(cache: Path, folder: Path, requirements: list[str], imports: list[str], code: Path) -> str:
    """The interpreter of the environment with these requirements, which is made if it isn't there."""
    place = cache / agent.VENVS / agent.environment_key(requirements)
    if place.is_dir():
        os.utime(place)
        return str(place / "bin" / "python")
    tell(folder, {"note": f"making an environment there with {', '.join(requirements)}"})
    made = cache / agent.VENVS / f"new-{folder.name}"
    python = str(made / "bin" / "python")
    listed = folder / "requirements.txt"
    listed.write_text("".join(f"{each}\n" for each in requirements), encoding="utf-8")
    pip = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--quiet"]
    # Most of SciPy is never imported; what is, the trial compiles.
    pip.append("--no-compile")
    try:
        _command(
            folder,
            [sys.executable, "-m", "venv", str(made)],
            "no virtual environment can be made",
            "Python's venv module, which Debian has in the package python3-venv",
        )
        _command(
            folder,
            [*pip, "--only-binary", ":all:", "-r", str(listed)],
            "the packages of the harness cannot be installed",
            "a package index that the device's own pip reaches, with wheels for its processor and its Python",
        )
        _command(
            folder,
            [python, "-P", "-c", _TRIAL, str(code), *imports],
            "the harness does not start",
            "a processor and a system that the packages were built for",
        )
        # Only its interpreter is used, never its scripts, so that it may move.
        made.rename(place)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return str(place / "bin" / "python")


def _command(folder: Path, command: Sequence[str], failure: str, expected: str) -> None:
    with (folder / agent.LOG).open("ab") as log:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
    if done.returncode:
        tail = (folder / agent.LOG).read_text(encoding="utf-8", errors="replace")[-agent.TAIL_CHARACTERS :].strip()
        raise agent.RefusedError(f"{failure}: {tail or 'nothing was said'}", expected)
