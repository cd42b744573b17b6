"""Tests of the documentation: generated pages are current, recipes are valid and links exist."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from compress.cli import CORE_COMMANDS
from compress.plugins import find_commands
from compress.recipe.loading import read_recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
RECIPES = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    if page.name != "extending.md"  # its plugin is needed: tests/third_party
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL))
    if re.search(r"^name:", block, re.MULTILINE) and re.search(r"^stages:", block, re.MULTILINE)
]


def test_generated_pages_are_current() -> None:
    generated = runpy.run_path(str(DOCS / "generate.py"))
    for name, page in generated["PAGES"].items():
        assert (DOCS / name).read_text() == page(), f"{name}: run `make docs`"
    for name, schema in generated["SCHEMAS"].items():
        assert json.loads((DOCS / name).read_text()) == schema(), f"{name}: run `make docs`"


def test_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    commands = {*CORE_COMMANDS, *find_commands(reserved=CORE_COMMANDS)}
    assert {"run", "check", "compare"} <= commands
    assert not [name for name in commands if f"compress {name}" not in text]


@pytest.mark.parametrize("block", RECIPES)
def test_recipes_in_the_documentation_are_valid(block: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    assert {"onnx", "onnx_int8"} & set(read_recipe(path).labels())


def test_documentation_has_recipes_to_check() -> None:
    assert {parameter.id.split(":")[0] for parameter in RECIPES} >= {"README.md", "docs/tutorials/classifier.md"}


def test_links_between_pages_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_readme_and_architecture_page_are_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120, "README: a stranger with one minute"
    assert len((DOCS / "architecture.md").read_text().split()) <= 1300, "architecture: 1,300 words"


def test_no_placeholders_are_left() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "recipes").rglob("*.yaml"))):
        assert "@@" not in page.read_text(), page.name
