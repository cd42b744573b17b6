"""The recipes that searches are measured with."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.plugins.search.goal import Goal
from compress.plugins.search.space import SearchSpace
from compress.recipe.document import read_document

RECIPES = sorted((Path(__file__).parents[3] / "benchmarks" / "searching").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_has_choices_and_rows_enough_for_its_limits(path: Path) -> None:
    space = SearchSpace(read_document(path), path.parent)
    assert space.size > 8
    Goal.from_recipe(space.base, space.search).check_resolution(space.search.select.rows)
