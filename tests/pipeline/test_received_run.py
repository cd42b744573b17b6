"""A run folder from somebody else runs no code: neither its recipe nor its config permits any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from compress.pipeline.artifact import find_artifact
from compress.utils.errors import ModelError

RECIPE = """
name: received
task: image-classification
model: model
module: {module}
trust_remote_code: true
data: {{splits: {{train: train.csv, test: test.csv}}, columns: {{image: image, label: label}}}}
stages: [onnx]
"""


def received_run(folder: Path, module: str, arguments: dict[str, Any]) -> Path:
    """Write a run whose recipe and config both name a function to call, and return its folder."""
    run = folder / "received"
    (run / "model").mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE.format(module=module))
    config = {
        "model_type": "resnet",
        "id2label": {"0": "a", "1": "b"},
        "compress_module": {"module": module, "arguments": arguments, "code": ""},
    }
    (run / "model/config.json").write_text(json.dumps(config))
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 4, "width": 4}}
    (run / "model/preprocessor_config.json").write_text(json.dumps(processor))
    save_file({"weight": np.zeros(1, np.float32)}, run / "model/model.safetensors")
    return run


@pytest.mark.parametrize("beside", [False, True], ids=["standard library", "file beside the recipe"])
def test_received_run_runs_no_code(tmp_path: Path, beside: bool) -> None:
    trace = tmp_path / "trace"
    command = {"args": f"touch '{trace}'", "shell": True}
    module, arguments = ("net.py:build", {}) if beside else ("subprocess:check_output", command)
    run = received_run(tmp_path, module, arguments)
    (run / "net.py").write_text(f"open({str(trace)!r}, 'w').close()")
    artifact = find_artifact(run, None)
    assert not artifact.recipe.trust_remote_code and artifact.recipe.module is None
    with pytest.raises(ModelError, match="which no recipe that you named gives"):
        artifact.open("torch")
    assert not trace.exists()
    # Whoever names the recipe has read it. Even then only what builds a module is called.
    with pytest.raises(ModelError, match=r"arguments of the code|cannot be imported"):
        find_artifact(run, run / "recipe.yaml").open("torch")
    assert trace.exists() == beside
