"""gptqmodel in an environment of its own that sees ours: it needs another numpy, and its torchao warns at import."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from filelock import FileLock

VERSION = "7.5.0"
NUMPY = "2.2.6"
BUILD = ("setuptools>=77.0.1,<83", "wheel")
"""What it is built with, since its build has to see torch."""


def gptqmodel_python() -> Path:
    """Its interpreter; the environment is made once for this user, over the packages that are installed here."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    home = cache / "compress" / "tests" / f"gptqmodel-{VERSION}"
    python, ready = home / "bin" / "python", home / "ready"
    ours = sysconfig.get_path("purelib")
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{home}.lock"):
        if not ready.exists() or ready.read_text() != ours:
            venv.create(home, clear=True, with_pip=True)
            (site,) = home.glob("lib/python*/site-packages")
            (site / "ours.pth").write_text(ours + "\n")
            environment = os.environ | {"BUILD_CUDA_EXT": "0"}
            flags = ["--quiet", "--disable-pip-version-check", "--no-build-isolation"]
            for wanted in (BUILD, (f"gptqmodel=={VERSION}", f"numpy=={NUMPY}", "requests")):
                command = [str(python), "-m", "pip", "install", *flags, *wanted]
                subprocess.run(command, check=True, timeout=900, env=environment)
            ready.write_text(ours)
    return python


def run_there(script: Path, *arguments: str) -> str:
    """What a script printed that ran with gptqmodel to be imported."""
    environment = os.environ | {"PYTHONPATH": str(script.parent), "CUDA_VISIBLE_DEVICES": ""}
    command = [str(gptqmodel_python()), "-W", "ignore", str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:] or sys.executable
    return done.stdout
