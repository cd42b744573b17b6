#!/usr/bin/env python3
"""Run tests with a second version of transformers or of ONNX Runtime, a different package each day.

Usage: `version_rotation.py [PACKAGE==VERSION]`. Exit code 1: a test failed. The version is installed into a temporary
folder that precedes the virtual environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECOND_VERSIONS = ("transformers==5.25.0", "onnxruntime==1.31.1")
"""Versions beside those of constraints.txt: the newest, or the oldest that pyproject.toml permits."""
TESTS = ("tests/pipeline/test_run.py", "tests/models", "tests/evaluation", "tests/formats/onnx")


def main(requirement: str) -> int:
    """Install the requirement and run the tests. Return the exit code."""
    name, _, version = requirement.partition("==")
    with tempfile.TemporaryDirectory() as folder:
        install = ["-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", folder, requirement]
        subprocess.run([sys.executable, *install], check=True)
        variables = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        code = f"from importlib.metadata import version; assert version({name!r}) == {version!r}"
        subprocess.run([sys.executable, "-P", "-c", code], env=variables, check=True)
        tests = ["-m", "pytest", "-q", "-m", "not slow and not browser and not alone", *TESTS]
        return subprocess.run([sys.executable, "-P", *tests], cwd=ROOT, env=variables, check=False).returncode


if __name__ == "__main__":
    today = SECOND_VERSIONS[datetime.now(UTC).toordinal() % len(SECOND_VERSIONS)]
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else today))
