"""Tests of `compress inspect`: its JSON, its errors and its imports."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import output_of
from imported import packages_imported_by
from safetensors.numpy import save_file

from compress.utils.errors import ModelError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    weights = {"embed.weight": np.zeros((8, 2), np.float32), "head.weight": np.ones((2, 2), np.float16)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_json_has_parameters_bytes_and_layers(model: Path) -> None:
    budget = json.loads(output_of("inspect", model, "--json", "--weights"))
    assert budget["model"] == str(model)
    assert budget["parameters"] == 20
    assert budget["tensor_bytes"] == 8 * 2 * 4 + 2 * 2 * 2
    assert [layer["name"] for layer in budget["layers"]] == ["embed", "head"]
    assert budget["statistics"]["embed.weight"]["sparsity"] == 1
    assert {tensor["file"] for tensor in budget["tensors"]} == {"model.safetensors"}


@pytest.mark.parametrize("name", ["none.safetensors", "notes.txt", "weights.bin"])
def test_bad_input_error_names_the_file(model: Path, name: str) -> None:
    if name != "none.safetensors":
        (model / name).write_bytes(b"x")
    with pytest.raises(ModelError) as caught:
        output_of("inspect", model / name)
    assert str(model / name) in str(caught.value)


def test_inspect_imports_neither_torch_nor_transformers(model: Path) -> None:
    code = "from compress.cli.inspect import inspect\ninspect(sys.argv[1], depth=2, weights=True, top=3, json_=True)"
    assert packages_imported_by(code, model).isdisjoint({"torch", "transformers", "onnxruntime"})


@pytest.mark.parametrize("name", ["tiny", "artifacts/runs/tiny", "artifacts/runs/tiny/latest"])
def test_run_is_named_like_everywhere_and_only_its_model_counts(
    name: str, tiny_ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_ran)
    model = tiny_ran / "artifacts" / "runs" / "tiny" / "latest" / "model"
    budget = json.loads(output_of("inspect", name, "--json"))
    assert budget["total_bytes"] == sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
