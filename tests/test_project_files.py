"""Tests of the files that a hosting service reads: workflows and citation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from compress import __version__

ROOT = Path(__file__).parent.parent
WORKFLOWS = [*sorted((ROOT / ".github" / "workflows").glob("*.yml")), ROOT / "docs" / "ci" / "weights.yml"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_pin_actions_by_digest_and_name_the_version(workflow: Path) -> None:
    actions = re.findall(r"uses: (.*)", workflow.read_text())
    assert actions
    assert not [action for action in actions if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_only_read_the_repository_by_default(workflow: Path) -> None:
    permissions = yaml.safe_load(workflow.read_text())["permissions"]
    assert permissions["contents"] == "read"
    assert "id-token" not in permissions


def test_publishing_is_disabled_and_waits_for_the_build() -> None:
    publish: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]["publish"]
    assert publish["if"] is False
    assert publish["needs"] == "build"


def test_pull_requests_test_every_supported_version_of_python() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/pull-request.yml").read_text())["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]


def test_citation_has_the_version_of_the_package() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def _pinned(*files: Path) -> dict[str, str]:
    """Return name -> version of requirements, by the names that PyPI normalizes."""
    lines = "".join(file.read_text() for file in files).splitlines()
    pins = (re.fullmatch(r"([\w.-]+)==([^\s+]+)(?:\+cpu)?(?: \\)?", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", pin[1]).lower(): pin[2] for pin in pins if pin}


def test_requirements_with_hashes_are_those_of_the_constraints() -> None:
    folder = ROOT / ".ci" / "requirements"
    parts = [folder / f"{name}.txt" for name in ("build", "torch-cpu", "core", "apart", "rest")]
    constraints, requirements = _pinned(ROOT / "constraints.txt"), _pinned(*parts)
    assert len(constraints) > 200
    # These build the packages that have no wheel; nothing that is installed needs them.
    only_to_build = ("setuptools", "setuptools-scm", "six", "vcs-versioning")
    assert requirements == constraints | {name: requirements[name] for name in only_to_build}
    for part in (*parts, folder / "torch-cuda.txt"):
        for requirement in re.split(r"\n(?=\w)", part.read_text()):
            assert requirement.startswith("#") or "--hash=sha256:" in requirement, requirement


def test_bill_of_materials_of_the_tool_is_valid_and_complete(tmp_path: Path) -> None:
    output = tmp_path / "bom.cdx.json"
    subprocess.run([sys.executable, "-P", ROOT / ".ci" / "sbom.py", output], check=True)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(output.read_text()) is None
    bom = json.loads(output.read_text())
    versions = {component["name"]: component["version"].removesuffix("+cpu") for component in bom["components"]}
    assert _pinned(ROOT / "constraints.txt").items() <= versions.items()
    core = {component["name"] for component in bom["components"] if component["scope"] == "required"}
    assert {"torch", "transformers", "onnxruntime", "typer"} <= core and "pytest" not in core
