"""Process of a session on a device, run by the device's own Python: waits for its order, prepares, runs the harness.

It is detached from the connection that began it, so that a dropped connection does no harm. It keeps the lock that it
inherited until it ends, also after it has replaced itself with the harness.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
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
    """Run the session ``name`` of the cache; `agent` documents its files."""
    cache_folder = Path(cache)
    folder = cache_folder / agent.SESSIONS / name
    while not (folder / agent.ORDER).is_file():
        if is_abandoned(folder):
            shutil.rmtree(folder)
            return
        time.sleep(agent.POLL_SECONDS)
    order = loads((folder / agent.ORDER).read_text(encoding="utf-8"))
    try:
        code = unpack(cache_folder, agent.checked_digest(order["code"]))
        for path, digest in order["files"].items():
            file, blob = path_inside(folder / FILES, path), cache_folder / agent.BLOBS / agent.checked_digest(digest)
            file.parent.mkdir(parents=True, exist_ok=True)
            # A hard link takes no space. Some file systems have none.
            try:
                os.link(blob, file)
            except OSError:
                shutil.copyfile(blob, file)
        python = _environment(cache_folder, folder, order["requirements"], order["imports"], code)
    except (agent.RefusedError, OSError, zipfile.BadZipFile) as error:
        told = {"what": f"the session cannot be made ready: {error}", "expected": None}
        refusal = error.told if isinstance(error, agent.RefusedError) else told
        agent.write_json(folder / agent.RESULT, {"refusal": refusal})
        return
    os.execv(python, [python, "-P", "-c", _HARNESS, str(code), str(folder)])


def is_abandoned(folder: Path) -> bool:
    """Return True if the requesting machine has been silent for too long."""
    return time.time() - (folder / agent.ALIVE).stat().st_mtime > agent.WAIT_SECONDS


def append_progress(folder: Path, line: dict[str, Any]) -> None:
    """Append a line to the progress that the requesting machine follows."""
    with (folder / agent.PROGRESS).open("a", encoding="utf-8") as file:
        file.write(dumps(line) + "\n")


def unpack(cache: Path, digest: str) -> Path:
    """Return the folder of the package's modules, unpacked from the archive that was sent."""
    folder = cache / agent.CODE / digest
    if folder.is_dir():
        os.utime(folder)
        return folder
    unfinished = cache / agent.CODE / f"new-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    with zipfile.ZipFile(cache / agent.BLOBS / digest) as archive:
        for entry in archive.namelist():
            path_inside(unfinished, entry)
        archive.extractall(unfinished)
    unfinished.rename(folder)
    return folder


def path_inside(folder: Path, path: str) -> Path:
    """Return the path below a folder. Raises `RefusedError` for a path that leads out of it."""
    parts = Path(path).parts
    if not parts or Path(path).is_absolute() or ".." in parts:
        raise agent.RefusedError(f"the path {path!r} leads out of the session's folder")
    return folder.joinpath(*parts)


def _environment(cache: Path, folder: Path, requirements: list[str], imports: list[str], code: Path) -> str:
    """Return the interpreter of the environment with these requirements, and create the environment if necessary.

    Args:
        cache: Cache on the device.
        folder: Folder of the session.
        requirements: Requirements for pip.
        imports: Modules that the harness imports; they are imported once as a trial.
        code: Folder of the package's modules.

    Returns:
        Path of the interpreter.

    Raises:
        RefusedError: The environment cannot be created, or a module cannot be imported in it.
    """
    environment = cache / agent.VENVS / agent.environment_key(requirements)
    if environment.is_dir():
        os.utime(environment)
        return str(environment / "bin" / "python")
    append_progress(folder, {"note": f"making an environment there with {', '.join(requirements)}"})
    unfinished = cache / agent.VENVS / f"new-{folder.name}"
    python = str(unfinished / "bin" / "python")
    requirements_file = folder / "requirements.txt"
    requirements_file.write_text("".join(f"{requirement}\n" for requirement in requirements), encoding="utf-8")
    # Most of SciPy is never imported. The trial compiles the imported modules.
    pip = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--quiet",
           "--no-compile", "--only-binary", ":all:", "-r", str(requirements_file)]  # fmt: skip
    # Each command has the message of its failure, and the expectation.
    steps = (
        ([sys.executable, "-m", "venv", str(unfinished)], "no virtual environment can be made",
         "Python's venv module, which Debian has in the package python3-venv"),
        (pip, "the packages of the harness cannot be installed",
         "a package index that the device's own pip reaches, with wheels for its processor and its Python"),
        ([python, "-P", "-c", _TRIAL, str(code), *imports], "the harness does not start",
         "a processor and a system that the packages were built for"),
    )  # fmt: skip
    try:
        for command, failure, expected in steps:
            with (folder / agent.LOG).open("ab") as log:
                done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
            if done.returncode:
                text = (folder / agent.LOG).read_text(encoding="utf-8", errors="replace")
                tail = text[-agent.TAIL_CHARACTERS :].strip()
                raise agent.RefusedError(f"{failure}: {tail or 'nothing was said'}", expected)
        # Only its interpreter is used, never its scripts, so that it may move.
        unfinished.rename(environment)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(environment / "bin" / "python")
