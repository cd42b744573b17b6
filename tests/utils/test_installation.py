"""Tests of installed packages, append-only logs and tables that fit a terminal."""

from __future__ import annotations

import errno
import os
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from narrow import shown
from packaging.requirements import Requirement

from compress.utils import environment
from compress.utils.environment import RequiredPackage
from compress.utils.errors import StorageError
from compress.utils.responsive_table import ResponsiveTable, TableColumn
from compress.utils.storage import AppendOnlyFile


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "pyproject.toml"
    file.write_text(
        """
[project]
dependencies = ["numpy>=2", "onnx<1", "no-such-package-at-all>=3", "pywin32; sys_platform == 'win32'"]
[project.optional-dependencies]
gpu = ["no-such-runtime>=1", "pywin32; sys_platform == 'win32'"]
all = ["compress-models[gpu]"]
dev = ["compress-models[all]", "pytest"]
"""
    )
    monkeypatch.setattr(environment, "_PYPROJECT", file)
    return file


def test_requirements_are_compared_with_installed_packages(project: Path) -> None:
    expected = [
        ("numpy", ">=2", version("numpy")), ("onnx", "<1", version("onnx")), ("no-such-package-at-all", ">=3", None),
        ("no-such-runtime", ">=1", None, "gpu"), ("pytest", "", version("pytest"), "dev"),
    ]  # fmt: skip
    assert environment.packages() == [RequiredPackage(*fields) for fields in expected]
    assert [package.is_satisfied for package in environment.packages()] == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("package", "extra"),
    [("No_Such.Runtime", "gpu"), ("pytest", "dev"), ("onnx", None), ("compress", None), ("nothing-we-know", None)],
)
def test_extra_that_installs_a_package_is_found(package: str, extra: str | None, project: Path) -> None:
    assert environment.extra_containing(package) == extra


def test_extra_all_contains_every_compatible_extra() -> None:
    extras = tomllib.loads(environment._PYPROJECT.read_text())["project"]["optional-dependencies"]
    (everything,) = (Requirement(text) for text in extras.pop("all"))
    assert everything.extras == set(extras) - {"dev", "gpu", "gptq", "remote"}


def test_local_version_satisfies_its_range() -> None:
    assert RequiredPackage("torch", "<2.14,>=2.13", "2.13.0+cpu").is_satisfied
    assert not RequiredPackage("torch", "<2.14,>=2.13", "2.14.0").is_satisfied


def test_an_installed_package_reads_its_own_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_PYPROJECT", tmp_path / "none.toml")
    monkeypatch.setattr(environment, "DISTRIBUTION", "rich")
    # From rich's own project file; its third requirement, ipywidgets, comes with the extra "jupyter".
    names = {package.name: package.extra for package in environment.packages()}
    assert names == {"markdown-it-py": None, "pygments": None, "ipywidgets": "jupyter"}
    assert environment.is_installed()
    monkeypatch.setattr(environment, "DISTRIBUTION", "no-such-package-at-all")
    assert not environment.is_installed()


def test_partial_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:3]))
    lines = AppendOnlyFile(tmp_path / "lines")
    lines.add(b"the first")
    lines.add(b"the second")
    assert lines.path.read_bytes() == b"the first\nthe second\n"


def test_partial_line_is_removed_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = AppendOnlyFile(tmp_path / "lines")
    lines.add(b"the first")
    write, room = os.write, [4]

    def filling(descriptor: int, content: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(descriptor, content[: room[0]])
        room[0] -= taken
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", filling)
        with pytest.raises(StorageError, match="full"):
            lines.add(b"the second")
    assert lines.path.read_bytes() == b"the first\n"


def test_bytes_after_the_last_line_break_are_ignored(tmp_path: Path) -> None:
    lines = AppendOnlyFile(tmp_path / "lines")
    lines.add(b"one")
    lines.add("zwei \u2028 lines for str.splitlines".encode())
    with lines.path.open("ab") as file:
        file.write(b"cut sho")
    whole_lines, incomplete = lines.read()
    assert (len(whole_lines), incomplete) == (2, b"cut sho")
    assert lines.read(4)[0] == whole_lines[1:]
    assert lines.repair() == 7
    assert lines.read() == (whole_lines, b"")


def table(*rows: tuple[str, ...]) -> ResponsiveTable:
    table_shown = ResponsiveTable(
        "",
        [TableColumn("name"), TableColumn("value", right=True), TableColumn("why", rank=2), TableColumn("n", rank=1)],
    )
    for row in rows:
        table_shown.add(*row)
    return table_shown


def lines(made: ResponsiveTable, width: int) -> list[str]:
    return [line.rstrip() for line in shown(made, width).splitlines()]


def test_indentation_stays_with_the_first_word() -> None:
    shown_lines = lines(table(("    indented_name", "1 ms", "", ""), ("  other name", "2 ms", "", "")), 20)
    assert shown_lines[2:5] == ["    indented_   1 ms", "name", "  other name    2 ms"]


def test_hidden_column_without_heading_is_not_mentioned() -> None:
    table_shown = ResponsiveTable("", [TableColumn("name"), TableColumn("", rank=2), TableColumn("n", rank=1)])
    table_shown.add("first", "too-wide-for-it", "7")
    assert lines(table_shown, 10)[2:] == ["first  7"]


def test_low_priority_columns_are_hidden_and_named() -> None:
    table_shown = table(("first_one", "1.25 ms", "because", "7"))
    assert lines(table_shown, 40)[0] == "name         value  why      n"
    assert lines(table_shown, 28)[0] == lines(table_shown, 22)[0] == "name         value  n"
    shown_lines = ["name         value  n", "\u2500" * 21, "first_one  1.25 ms  7", "why: hidden for lack", "of space"]
    assert lines(table_shown, 22) == shown_lines
