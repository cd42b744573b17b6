"""Tests of the files that a hosting service reads: workflows and citation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

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
