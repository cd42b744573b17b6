"""Virtual environments of the compared tools, created once in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from compress.data.samples.fetch import cache_root

PINNED = (
    *("optimum-benchmark[onnxruntime]==0.6.0", "optimum==1.27.0"),
    *("transformers==4.53.3", "torch==2.8.0"),
)
"""The latest optimum-benchmark and the last packages that it supports: optimum 2 has no ONNX Runtime part, and optimum
1.27 imports names that later versions of torch's ONNX exporter lack. Torch only creates the input tensors."""
SHARED = ("onnxruntime", "numpy")
"""Installed in the versions of our environment, so that the same runtime is timed."""
_TAIL_LINES = 5
_READY = "ready.json"


@dataclass(frozen=True)
class Packages:
    """Requirements, options and environment variables of one call of pip."""

    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


class UnavailableError(Exception):
    """A tool or its environment is not available; the message has the command and its output."""


def optimum_python(note: Callable[[str], None]) -> Path:
    """Return the interpreter of optimum-benchmark's environment. Raises `UnavailableError`."""
    requirements = (*PINNED, *(f"{name}=={version(name).split('+')[0]}" for name in SHARED))
    return peer_python("optimum-benchmark", (Packages(requirements),), note)


def peer_python(name: str, steps: Sequence[Packages], note: Callable[[str], None]) -> Path:
    """Return the interpreter of an environment with these packages, created if needed. Raises `UnavailableError`."""
    requirements = [requirement for step in steps for requirement in step.requirements]
    digest = hashlib.sha256(json.dumps([sys.version, requirements]).encode()).hexdigest()
    home = cache_root().parent / "peers" / f"{name}-{digest[:12]}"
    python = home / "bin" / "python"
    if (home / _READY).exists():
        return python
    note(f"creating the environment of {name} (several GB): {', '.join(requirements)}")
    if home.exists():
        shutil.rmtree(home)
    home.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(home)])
    for step in steps:
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*command, *step.options, *step.requirements], **dict(step.variables))
    frozen = _run([str(python), "-m", "pip", "freeze", "--disable-pip-version-check"])
    (home / _READY).write_text(json.dumps({"requirements": requirements, "installed": frozen.split()}, indent=1))
    return python


def _run(command: list[str], **variables: str) -> str:
    # PYTHONPATH would add this environment's packages to the other one.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**inherited, **variables})
    if done.returncode != 0:
        tail = "\n".join(f"{done.stdout}\n{done.stderr}".strip().splitlines()[-_TAIL_LINES:])
        raise UnavailableError(f"`{' '.join(command[1:])}` ended with exit code {done.returncode}:\n{tail}")
    return done.stdout
