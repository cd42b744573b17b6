"""Tests of an external package with its own format, task and stage: train, export, inspect and bundle with it."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_run import write_all

Command = Callable[..., Any]
ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
SOURCE = Path(__file__).parent / "pt2"
PAGE = ROOT / "docs" / "extending.md"
STAGES = [{"finetune": {"epochs": 1, "batch_size": 8, "learning_rate": 2e-3}}, {"clip": {"quantile": 0.99}}]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package into a folder without dependencies and return the folder."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(SOURCE, folder / "source")
    target = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(folder / "source")], check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def compress(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Return a function that runs a command with the plugin installed and returns its JSON output."""
    output_folder = tmp_path_factory.mktemp("said")
    files = [output_folder / "stdout", output_folder / "stderr"]
    path = os.pathsep.join(map(str, (installed, ROOT, SUPPORT)))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(SUPPORT / "forking.py")], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def call(*arguments: object) -> Any:
            assert process.stdin is not None and process.stdout is not None
            request = [[*map(str, arguments), "--json"], *map(str, files)]
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "0\n", files[1].read_text()
            return json.loads(files[0].read_text())

        yield call


@pytest.fixture(scope="module")
def run(compress: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run that has the package's stage and measures its format and ONNX."""
    folder = tmp_path_factory.mktemp("run")
    recipe = write_all(folder, stages=STAGES, targets=["cpu", "pt2"])
    plan = compress("check", recipe)
    assert [stage["kind"] for stage in plan["stages"]] == ["finetune", "clip"]
    compress("run", recipe, "--artifacts", folder / "artifacts")
    return next((folder / "artifacts" / "runs").glob("*/latest")).resolve()


def test_plugin_format_has_the_accuracy_of_onnx(run: Path, compress: Command) -> None:
    report = compress("report", run)
    assert not report["skipped"]
    rows = {(row["model"], row["target"]): row for row in report["measurements"] if row["metric"] == "accuracy"}
    assert rows["final", "pt2"]["raw"] == rows["final", "cpu"]["raw"]
    remarks = [remark for stage in report["stages"] for remark in stage["remarks"]]
    assert any(re.fullmatch(r"clip: [\d,]+ weights", remark) for remark in remarks)


def test_inspect_lists_every_tensor_of_the_pt2_file(run: Path, compress: Command) -> None:
    (file,) = (run / "targets" / "pt2").rglob("*.pt2")
    program = torch.export.load(file)
    contents = compress("inspect", file)
    stored = {tensor["name"]: tensor for tensor in contents["tensors"]}
    for name, value in program.state_dict.items():
        assert stored[name.removeprefix("model.")]["shape"] == list(value.shape)
    assert sum(tensor["bytes"] for tensor in contents["tensors"]) == sum(
        value.numel() * value.element_size() for value in program.state_dict.values()
    )


def test_bundle_of_plugin_format_runs_with_torch_only(run: Path, compress: Command, tmp_path: Path) -> None:
    pytest.importorskip("compress.plugins.apps")
    bundle = tmp_path / "bundle"
    compress("bundle", run / "targets" / "pt2", "--target", "desktop", "-o", bundle)
    compress("verify", bundle)
    assert json.loads((bundle / "manifest.json").read_text())["format"] == "pt2"
    alone = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [sys.executable, str(bundle / "examples" / "run.py"), "--selftest"]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plugin_task_is_trained_and_evaluated(compress: Command, tmp_path: Path) -> None:
    recipe = write_all(tmp_path, task="text-pair-classification", stages=STAGES[:1], targets=["cpu"])
    for split in ("train", "validation", "test"):
        with (tmp_path / f"{split}.csv").open() as file:
            rows = list(csv.DictReader(file))
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ("text", "pair", "label"))
            writer.writeheader()
            writer.writerows({"text": row["text"], "pair": "the film", "label": row["label"]} for row in rows)
    compress("run", recipe, "--artifacts", tmp_path / "artifacts")
    report = compress("report", next((tmp_path / "artifacts" / "runs").glob("*/latest")))
    accuracy = {row["model"]: row["value"] for row in report["measurements"] if row["metric"] == "accuracy"}
    assert accuracy["final"] > 0.8


def test_recipe_without_the_package_names_the_missing_stage(run: Path, tmp_path: Path) -> None:
    recipe = write_all(tmp_path, stages=STAGES)
    done = tiny_run.compress("check", recipe)
    assert done.returncode == 2
    assert "clip" in done.stderr and "Traceback" not in done.stderr


def test_recipe_in_the_documentation_is_valid(installed: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    code = (
        "import pathlib, sys; from compress.recipe.loading import read_recipe; "
        "print(*read_recipe(pathlib.Path(sys.argv[1])).labels())"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (installed, ROOT)))}
    command = [sys.executable, "-c", code, str(tmp_path / "mine.yaml")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["finetune", "clip", "onnx"]


def test_documentation_shows_the_source_of_the_package() -> None:
    shown = dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', PAGE.read_text(), re.DOTALL))
    files = {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*") if path.suffix in (".py", ".toml")}
    assert {"pyproject.toml", "compress_pt2/__init__.py", "compress_pt2/clip.py", "compress_pt2/task.py"} <= set(shown)
    assert shown == {name: files[name].read_text() for name in shown}, "run `make docs`"
