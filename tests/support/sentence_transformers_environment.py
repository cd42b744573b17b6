"""sentence-transformers with its ONNX backend, in an environment of its own that sees ours: it needs transformers 4."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

WANTED = ("sentence-transformers==5.2.3", "optimum-onnx==0.1.0", "transformers==4.57.6", "datasets==4.4.2")


def sentence_transformers_python() -> Path:
    """Its interpreter; the environment is made once for this user, over the packages that are installed here."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    home = cache / "compress" / "tests" / WANTED[0].replace("==", "-")
    python, ready = home / "bin" / "python", home / "ready"
    ours = sysconfig.get_path("purelib")
    if not ready.exists() or ready.read_text() != ours:
        venv.create(home, clear=True, with_pip=True)
        (site,) = home.glob("lib/python*/site-packages")
        (site / "ours.pth").write_text(ours + "\n")
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *WANTED]
        subprocess.run(command, check=True, timeout=900)
        ready.write_text(ours)
    return python


def run_there(script: Path, *arguments: str) -> str:
    """What a script printed that ran with sentence-transformers to be imported."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [str(sentence_transformers_python()), "-W", "ignore", str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:] or sys.executable
    return done.stdout
