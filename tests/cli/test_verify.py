"""Tests of `compress verify`, which tells by what lies at a path how to verify it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


@pytest.fixture
def folder(tiny_ran: Path, tmp_path: Path) -> Path:
    """Return a copy of a folder in which a recipe was run."""
    return shutil.copytree(tiny_ran, tmp_path / "place", symlinks=True)


@pytest.mark.parametrize("command", ["verify", "papers-verify", "bundle-verify"])
@pytest.mark.parametrize("path", ["tiny", "artifacts/runs/tiny", "artifacts/runs/tiny/latest"])
def test_run_is_verified_by_name_or_folder(folder: Path, here: Call, command: str, path: str) -> None:
    done = here(command, path, "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    statement = json.loads((folder / "artifacts/runs/tiny/latest/provenance.json").read_text())
    assert json.loads(done.stdout) == {"files": len(statement["subject"]), "signer": None, "recipe": "tiny"}


def test_changed_byte_of_a_run_is_found(folder: Path, here: Call) -> None:
    config = folder / "artifacts/runs/tiny/latest/model/config.json"
    config.write_bytes(config.read_bytes() + b" ")
    done = here("verify", "tiny", folder=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert "model/config.json was changed" in done.stderr


def test_registry_is_verified_and_a_fault_gives_exit_code_1(folder: Path, here: Call) -> None:
    assert here("registry", "register", "tiny", "--name", "reviews", folder=folder).returncode == 0
    assert here("verify", "artifacts/registry", folder=folder).returncode == 0
    (damaged, *_) = sorted(path for path in (folder / "artifacts/registry/objects").rglob("*") if path.is_file())
    damaged.chmod(0o644)
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(content + b"x")
    done = here("verify", "artifacts/registry", "--json", folder=folder)
    faults = json.loads(done.stdout)["faults"]
    assert done.returncode == 1 and [fault["fault"] for fault in faults] == ["damaged"]


def test_zip_file_is_taken_for_a_bundle(tmp_path: Path, here: Call) -> None:
    (tmp_path / "app.zip").write_bytes(b"nothing")
    done = here("verify", "app.zip", folder=tmp_path)
    assert done.returncode == 1 and "app.zip" in done.stderr and "can be verified" not in done.stderr


@pytest.mark.parametrize(("path", "message"), [("nothing", "no such file, folder or run"), (".", "nothing here")])
def test_other_paths_are_refused_with_what_can_be_verified(path: str, message: str, tmp_path: Path, here: Call) -> None:
    done = here("verify", path, folder=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    for subject in ("bundle", "provenance.json", "registry"):
        assert subject in done.stderr
