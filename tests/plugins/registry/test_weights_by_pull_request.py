"""The steps of docs/ci/weights.yml, as they stand there, on a bare repository: a pull request, a merge, a bad one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper
from registry import made_run
from typer.testing import CliRunner

from compress.cli import app
from compress.utils.errors import CompressError

ROOT = Path(__file__).parents[3]
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "ci" / "weights.yml").read_text())
STEPS: list[dict[str, Any]] = WORKFLOW["jobs"]["weights"]["steps"]
COMPRESS = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as asked, asked.makefile("rw") as lines:
    asked.connect({address!r})
    print(json.dumps([os.getcwd(), sys.argv[1:]]), file=lines, flush=True)
    code, out, err = json.loads(lines.readline())
sys.stdout.write(out), sys.stderr.write(err)
sys.exit(code)
"""


def weights(text: str) -> bytes:
    """An ONNX file whose one matrix is made of a text."""
    matrix = numpy_helper.from_array(np.frombuffer(text.ljust(8).encode(), np.uint8).astype(np.float32)[None], "matrix")
    given, outputs = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, width)) for name, width in (("x", 1), ("y", 8))
    )
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "matrix"], ["y"])], "made", [given], [outputs], [matrix]
    )
    content: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return content


def answer(place: Path, arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and error of a command; `run` leaves what a run leaves, at once."""
    with contextlib.chdir(place):
        if arguments[0] == "run":
            recipe = yaml.safe_load(Path(arguments[1]).read_text())
            runs = Path("artifacts/runs") / recipe["name"]
            made_run(runs / "latest", weights(recipe["weights"]), recipe["accuracy"])
            return 0, "", ""
        done = CliRunner().invoke(app, arguments)
    failed = done.exception if isinstance(done.exception, CompressError) else None
    return (failed.exit_code, done.stdout, str(failed)) if failed else (done.exit_code, done.stdout, done.stderr)


GH = '#!/bin/sh\n[ "$1 $2 $4" = "pr comment --body-file" ] && cp "$5" "$COMMENTS/$3.md"\n'


def git(folder: Path, *arguments: str) -> str:
    names = {f"GIT_{role}_{part}": "ada@example.org" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    environment = {**os.environ, **names, "GIT_CONFIG_GLOBAL": "/dev/null"}
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


class Ci:
    """A bare repository, and runners that check it out as GitHub's do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.origin, self.work, self.programs = (folder / name for name in ("origin.git", "work", "bin"))
        self.far, self.comments = folder / "far", folder / "comments"
        for folder_path in (self.programs, self.comments):
            folder_path.mkdir()
        self.socket = socket.socket(socket.AF_UNIX)
        address = str(folder / "socket")
        self.socket.bind(address)
        self.socket.listen()
        threading.Thread(target=self._answer, daemon=True).start()
        for name, text in (("compress", COMPRESS.format(python=sys.executable, address=address)), ("gh", GH)):
            (self.programs / name).write_text(text)
            (self.programs / name).chmod(0o755)
        git(folder, "init", "-q", "--bare", "-b", "main", "origin.git")
        git(folder, "clone", "-q", "origin.git", "work")
        git(self.work, "commit", "-q", "--allow-empty", "-m", "The beginning")
        git(self.work, "push", "-q", "origin", "HEAD:main")

    def _answer(self) -> None:
        """Do what the program `compress` of the runners is asked for, one after another."""
        while True:
            try:
                asked, _ = self.socket.accept()
            except OSError:
                return
            with asked, asked.makefile("rw") as lines:
                sent_path, arguments = json.loads(lines.readline())
                print(json.dumps(answer(Path(sent_path), arguments)), file=lines, flush=True)

    def change(self, branch: str, **recipe: Any) -> str:
        """Commit another recipe on a branch; the commit that it left."""
        git(self.work, "switch", "-q", "-C", branch, "origin/main")
        commit_before = git(self.work, "rev-parse", "HEAD")
        recipe_file = self.work / "recipes" / "reviews.yaml"
        recipe_file.parent.mkdir(exist_ok=True)
        recipe_file.write_text(yaml.safe_dump({"name": "reviews", **recipe}))
        git(self.work, "add", ".")
        git(self.work, "commit", "-q", "-m", f"Reviews: {recipe['weights']}")
        git(self.work, "push", "-q", "-f", "origin", branch)
        return commit_before

    def merge(self, branch: str) -> None:
        git(self.work, "push", "-q", "origin", f"{branch}:main")
        git(self.work, "fetch", "-q")

    def run(self, event: str, branch: str, base: str, number: int = 0) -> dict[str, int]:
        """Every step that is a command, in a fresh clone: name -> exit code of those that ran."""
        runner = self.folder / f"runner-{len(list(self.folder.glob('runner-*')))}"
        git(self.folder, "clone", "-q", "-b", branch, "origin.git", runner.name)
        variables = {"REGISTRY": f"file://{self.far}", "BASE": base, "PULL_REQUEST": str(number)}
        environment = {**os.environ, **variables, "COMMENTS": str(self.comments)}
        environment |= {"PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        codes: dict[str, int] = {}
        for step in STEPS:
            if "run" not in step or step["run"].startswith("pip install"):
                continue
            always, condition = "always()" in step.get("if", ""), step.get("if", event)
            if event not in condition or (any(codes.values()) and not always):
                continue
            done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=runner, env=environment, capture_output=True)
            codes[step["name"]] = done.returncode
            assert done.returncode in (0, 1), done.stderr.decode()
        return codes

    def champion(self) -> bytes:
        """The weights that everybody pulls."""
        from compress.plugins.registry.remote import Remote, pull_remote

        served_folder = self.folder / f"served-{len(list(self.folder.glob('served-*')))}"
        pull_remote(Remote(f"file://{self.far}"), "reviews@champion", served_folder)
        return (served_folder / "model" / "onnx" / "model.onnx").read_bytes()


@pytest.fixture
def ci(tmp_path: Path) -> Iterator[Ci]:
    pytest.importorskip("fsspec")
    service = Ci(tmp_path)
    yield service
    service.socket.close()


def test_a_change_is_compared_promoted_on_merge_and_a_bad_one_refused(ci: Ci) -> None:
    base = ci.change("first", weights="first", accuracy=0.8)
    assert set(ci.run("pull_request", "first", base, 1).values()) == {0}
    assert "Nothing of this name is in use yet." in (ci.comments / "1.md").read_text()
    assert not ci.far.exists()
    ci.merge("first")
    assert ci.run("push", "main", base)["promote what was merged"] == 0
    assert ci.champion() == weights("first")

    base = ci.change("worse", weights="worse", accuracy=0.5)
    codes = ci.run("pull_request", "worse", base, 2)
    assert (codes["compare with what is in use"], codes["say so on the pull request"]) == (1, 0)
    comment = (ci.comments / "2.md").read_text()
    assert "## recipes/reviews.yaml" in comment and "80.00%" in comment and "50.00%" in comment
    assert "matrix" in comment.split("```text")[1], "which weights moved"
    # Somebody merges it all the same.
    ci.merge("worse")
    assert ci.run("push", "main", base)["promote what was merged"] == 1
    assert ci.champion() == weights("first")


def test_the_workflow_runs_on_recipes_alone_and_one_at_a_time() -> None:
    events = WORKFLOW[True]  # YAML 1.1 reads `on` as a truth value
    assert set(events) == {"pull_request", "push"}
    assert all(event["paths"] == ["recipes/*.yaml"] for event in events.values())
    assert WORKFLOW["concurrency"] == {"group": "weights", "cancel-in-progress": False}
    assert WORKFLOW["permissions"] == {"contents": "read", "pull-requests": "write"}
