"""Python restricted to AVX2 kernels on an x86 processor with more features, at full speed.

See `benchmarks/as_avx2.c`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

_SOURCE = Path(__file__).parents[2] / "benchmarks" / "as_avx2.c"
_SECONDS = 300
_FEATURES = "from compress.utils.environment import features; print(*features())"


def hold(folder: Path) -> dict[str, str]:
    """Return the environment variables that restrict a process to AVX2; skip the test where that is impossible."""
    compiler = shutil.which("cc")
    if compiler is None or platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("no C compiler, or no Linux on x86-64")
    library = folder / "as_avx2.so"
    command = [compiler, "-O2", "-shared", "-fPIC", str(_SOURCE), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
    held = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = run_held(["-c", _FEATURES], held)
    if "nothing is held" in done.stderr:
        pytest.skip("CPUID does not fault here")
    assert "avx2" in done.stdout.split() and "avx512_vnni" not in done.stdout.split(), done.stdout
    return held


def run_held(arguments: Sequence[str], held: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments under the restriction; fail the test if Python fails."""
    done = subprocess.run(
        [sys.executable, *arguments], env=held, capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    return done
