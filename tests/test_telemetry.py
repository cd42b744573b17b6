"""Tests of telemetry: importing compress disables it in libraries that send usage data by default."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

IDENTITY = "CAgSADo3ChAKAXgSAXkiCElkZW50aXR5EgFnWg8KAXgSCgoICAESBAoCCAFiDwoBeRIKCggIARIECgIIAUIECgAQDQ=="
"""A graph of one node, as base64."""
SESSION = f"import base64, onnxruntime; onnxruntime.InferenceSession(base64.b64decode('{IDENTITY}'))"
USES = {
    "onnxruntime": SESSION,
    "openvino": "import openvino; openvino.Core()",
    "nncf": "import nncf; from nncf.telemetry import telemetry; telemetry.send_event('nncf', 'test', 'test')",
    "mlflow": "from mlflow.telemetry.utils import is_telemetry_disabled; assert is_telemetry_disabled()",
    "ray": "import ray; from ray._common.usage.usage_lib import usage_stats_enabled; assert not usage_stats_enabled()",
    "huggingface_hub": "from huggingface_hub import constants; assert constants.HF_HUB_DISABLE_TELEMETRY",
}
SWITCHES = (
    "ORT_DISABLE_TELEMETRY",
    "MLFLOW_DISABLE_TELEMETRY",
    "RAY_USAGE_STATS_ENABLED",
    "HF_HUB_DISABLE_TELEMETRY",
    "DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
    "NNCF_CI",
    "CI",
)
"""What the process that tests has set, or whoever started it."""


def written_by(home: Path, *command: str) -> list[str]:
    """Return the files that a process writes below an empty home folder."""
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in SWITCHES and not name.startswith("XDG_")}
    done = subprocess.run(command, env=kept | {"HOME": str(home)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "library", [pytest.param(name, marks=pytest.mark.slow if name in ("nncf", "mlflow") else ()) for name in USES]
)
def test_libraries_store_no_telemetry_after_importing_compress(library: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    code = f"import compress; import sys; {USES[library]}; assert {library!r} in sys.modules"
    assert written_by(tmp_path / "home", sys.executable, "-c", code) == []
