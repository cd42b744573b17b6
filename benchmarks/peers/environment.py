"""The virtual environment of optimum-benchmark, made once in the user's cache: it needs older packages than ours."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from compress.samples.fetch import cache_root

PINNED = (
    *("optimum-benchmark[onnxruntime]==0.6.0", "optimum==1.27.0"),
    *("transformers==4.53.3", "torch==2.8.0"),
)
"""Its latest release and the last packages that it works with: optimum 2 has no ONNX Runtime part, and optimum 1.27
imports names that later versions of torch's ONNX exporter lack. Torch makes the tensors and runs nothing."""
SHARED = ("onnxruntime", "numpy")
"""Taken in the versions that are installed beside compress, so that the same runtime is timed."""
_TAIL_LINES = 5
_READY = "ready.json"


class UnavailableError(Exception):
    """The environment cannot be made; the message says what was tried and what pip answered."""


def optimum_python(note: Callable[[str], None]) -> Path:
    """The interpreter of the environment, made if it isn't there whole. Raises `UnavailableError`."""
    requirements = [*PINNED, *(f"{name}=={version(name).split('+')[0]}" for name in SHARED)]
    digest = hashlib.sha256(json.dumps([sys.version, requirements]).encode()).hexdigest()
    home = cache_root().parent / "peers" / f"optimum-benchmark-{digest[:12]}"
    python = home / "bin" / "python"
    if (home / _READY).exists():
        return python
    note(f"making the environment of optimum-benchmark (several GB): {', '.join(requirements)}")
    if home.exists():
        shutil.rmtree(home)
    home.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(home)])
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements])
    frozen = _run([str(python), "-m", "pip", "freeze", "--disable-pip-version-check"])
    (home / _READY).write_text(json.dumps({"requirements": requirements, "installed": frozen.split()}, indent=1))
    return python


def _run(command: list[str]) -> str:
    # PYTHONPATH would let this environment's packages into the other.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode != 0:
        words = "\n".join(f"{done.stdout}\n{done.stderr}".strip().splitlines()[-_TAIL_LINES:])
        raise UnavailableError(f"`{' '.join(command[1:])}` ended with exit code {done.returncode}:\n{words}")
    return done.stdout
