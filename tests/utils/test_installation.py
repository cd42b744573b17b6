from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from compress.utils import installation as subject
from compress.utils.installation import RequiredPackage


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "pyproject.toml"
    file.write_text(
        """
[project]
dependencies = ["numpy>=2", "onnx<1", "no-such-package-at-all>=3", "pywin32; sys_platform == 'win32'"]
[project.optional-dependencies]
gpu = ["no-such-runtime>=1", "pywin32; sys_platform == 'win32'"]
all = ["compress[gpu]"]
dev = ["compress[all]", "pytest"]
"""
    )
    monkeypatch.setattr(subject, "_PYPROJECT", file)
    return file


def test_requirements_are_held_against_what_is_installed(project: Path) -> None:
    assert subject.packages() == [
        RequiredPackage("numpy", ">=2", version("numpy")),
        RequiredPackage("onnx", "<1", version("onnx")),
        RequiredPackage("no-such-package-at-all", ">=3", None),
        RequiredPackage("no-such-runtime", ">=1", None, "gpu"),
        RequiredPackage("pytest", "", version("pytest"), "dev"),
    ]
    assert [package.is_satisfied for package in subject.packages()] == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("package", "extra"),
    [("No_Such.Runtime", "gpu"), ("pytest", "dev"), ("onnx", None), ("compress", None), ("nothing-we-know", None)],
)
def test_the_extra_that_installs_a_package(package: str, extra: str | None, project: Path) -> None:
    assert subject.extra_containing(package) == extra


def test_all_has_every_extra_but_those_that_replace_a_package_are_built_or_need_older_ones() -> None:
    extras = tomllib.loads(subject._PYPROJECT.read_text())["project"]["optional-dependencies"]
    (everything,) = (Requirement(text) for text in extras.pop("all"))
    assert everything.extras == set(extras) - {"dev", "gpu", "gptq", "remote"}


def test_a_local_version_fits_its_range() -> None:
    assert RequiredPackage("torch", "<2.14,>=2.13", "2.13.0+cpu").is_satisfied
    assert not RequiredPackage("torch", "<2.14,>=2.13", "2.14.0").is_satisfied


def test_an_installed_package_reads_its_own_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_PYPROJECT", tmp_path / "none.toml")
    monkeypatch.setattr(subject, "NAME", "rich")
    # From rich's own project file; its third requirement, ipywidgets, comes with the extra "jupyter".
    names = {package.name: package.extra for package in subject.packages()}
    assert names == {"markdown-it-py": None, "pygments": None, "ipywidgets": "jupyter"}
    assert subject.is_installed()
    monkeypatch.setattr(subject, "NAME", "no-such-package-at-all")
    assert not subject.is_installed()
