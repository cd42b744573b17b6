"""The documentation that comes from the code is up to date, and what it promises exists."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

from compress.cli import app
from compress.recipe_source import read_recipe, recipe_schema

ROOT = Path(__file__).parent.parent


def test_generated_pages_are_current() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "generate.py"))["commands"]()
    assert (ROOT / "docs" / "commands.md").read_text() == written, "run `make docs`"
    assert json.loads((ROOT / "docs" / "recipe.schema.json").read_text()) == recipe_schema(), "run `make docs`"


def test_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    commands = [command.callback.__name__.replace("_", "-") for command in app.registered_commands if command.callback]
    groups = [group.name for group in app.registered_groups]
    assert len(commands) + len(groups) == 18
    assert not [name for name in (*commands, *groups) if f"compress {name}" not in text]


def test_recipe_in_the_readme_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    assert read_recipe(path).labels() == ("finetune", "distill", "export", "quantize")


def test_recipe_in_the_guide_to_language_models_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "language_models.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    assert read_recipe(path).labels() == ("gptq", "tune_scales", "export")


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_nothing_left_to_fill_in() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "recipes").rglob("*.yaml"))):
        assert "@@" not in page.read_text(), page.name
