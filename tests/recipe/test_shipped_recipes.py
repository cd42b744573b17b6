"""Tests of the recipes that are installed with the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compress.recipe.loading import read_recipe
from compress.recipe.shipped import SHIPPED, copy_recipe, find_recipe, header_field
from compress.utils.errors import InputError, RecipeError


def test_name_without_such_a_file_is_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("quickstart")) == SHIPPED / "quickstart.yaml"
    (tmp_path / "quickstart").write_text("name: mine")
    assert find_recipe(Path("quickstart")) == Path("quickstart")


@pytest.mark.parametrize(
    ("reference", "nearest"),
    [
        ("quickstrat", "quickstart"),
        ("quikstart.yaml", "quickstart"),
        ("recipes/quickstart", "quickstart"),
        ("recipes/nope", None),
        ("mine.yml", "mine.yaml"),
    ],
)
def test_unknown_recipe_gets_a_suggestion(
    reference: str, nearest: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine")
    with pytest.raises(RecipeError, match=r"no such file; expected a YAML recipe, or one of .* shipped") as caught:
        find_recipe(Path(reference))
    assert [problem.nearest for problem in caught.value.problems] == [nearest]


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_copied_recipe_can_be_read_without_the_original(path: Path, tmp_path: Path) -> None:
    copies = copy_recipe(path.stem, tmp_path)
    copied = read_recipe(tmp_path / path.name)
    assert copied == read_recipe(path)
    # Every file beside the original that the recipe loads is among the copies.
    names = [copied.model, *(copied.module or "").split(":")[:1]]
    names += [reference.name for stage in copied.stages for reference in stage.references().values()]
    beside = {tmp_path / name for name in names if name and (SHIPPED / name).exists()}
    assert beside <= set(copies)
    time = header_field(path, "time")
    assert re.match(r"(about )?(\d+ h )?\d+ (min|s)\b", time), "`compress recipes` shows how long a recipe takes"
    quality = re.split("[,;]", header_field(path, "expect"))[0]
    assert not re.search(r"\d [kM]B|\d ms|bits", quality), "`compress recipes` shows the first clause as the quality"


def test_existing_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    copy_recipe("tiny", tmp_path)
    (tmp_path / "tiny.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"tiny\.yaml exists already"):
        copy_recipe("tiny", tmp_path)
    assert (tmp_path / "tiny.yaml").read_text() == "mine"
    copy_recipe("tiny", tmp_path, replace=True)
    assert (tmp_path / "tiny.yaml").read_text() == (SHIPPED / "tiny.yaml").read_text()


def test_unknown_recipe_to_copy_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no shipped recipe 'quikstart'.*'quickstart'"):
        copy_recipe("quikstart", tmp_path)


def test_header_field_continues_on_indented_lines(tmp_path: Path) -> None:
    recipe = tmp_path / "a.yaml"
    recipe.write_text("# A.\n#\n#   time:     5 min, of\n#             which 2 train\n#   expect:   98%\nname: a\n")
    assert header_field(recipe, "time") == "5 min, of which 2 train"
    assert header_field(recipe, "expect") == "98%"
    assert header_field(recipe, "hardware") == ""
