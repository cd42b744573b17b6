"""What may vary: knobs from a recipe's block, points that mean the same, and what is refused before anything runs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from compress.plugins.search.space import SearchSpace, shorten_training
from compress.recipe.document import read_document
from compress.utils.errors import InputError, RecipeError

STAGES = (
    {"finetune": {"epochs": 2}},
    {"prune": {"heads": 0.5, "feed_forward": 0.5}},
    {"trim_vocabulary": {}},
    {"distill": {"teacher": "finetune", "student": {"layers": [0, 1]}, "epochs": 3}},
    {"onnx": {}},
    {"onnx_int8": {}},
)
CHOICES = {
    "stages.1.prune.feed_forward": [0.25, 0.5],
    "stages.1.heads": [0, 0.5],
    "stages.3.distill.student.layers": [[0], [0, 1]],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models_folder = tmp_path_factory.mktemp("space")
    tiny_run.write_all(models_folder)
    return models_folder


def space(folder: Path, stages: Any = STAGES, **block: Any) -> SearchSpace:
    search = {"choices": CHOICES, "select": {"rows": 20}, **block}
    return SearchSpace(
        read_document(tiny_run.write_recipe(folder, "space", stages=list(stages), search=search)), folder
    )


def test_each_knob_has_the_recipe_s_own_value_first_and_each_once(folder: Path) -> None:
    search_space = space(folder, optional=["trim_vocabulary"])
    assert [(parameter.name, parameter.values) for parameter in search_space.parameters] == [
        ("trim_vocabulary", ("kept", "left out")),
        ("stages.1.prune.feed_forward", (0.5, 0.25)),
        ("stages.1.heads", (0.5, 0)),
        ("stages.3.distill.student.layers", ([0, 1], [0])),
    ]
    assert search_space.size == 16
    assert search_space.origin == (0, 0, 0, 0)
    assert search_space.describe(search_space.origin) == "the recipe as it stands"


def test_a_point_s_stages_are_those_of_its_whole_recipe(folder: Path) -> None:
    search_space = space(folder, optional=["trim_vocabulary"])
    for point in search_space.points(0):
        assert search_space.recipe(point).stages == search_space.stages(point)
    point = (1, 1, 0, 1)
    assert search_space.describe(point) == "no trim_vocabulary, prune.feed_forward 0.25, distill.student.layers [0]"
    assert search_space.recipe(point).labels() == ("finetune", "prune", "distill", "onnx", "onnx_int8")


def test_fields_of_a_stage_that_is_left_out_do_not_count(folder: Path) -> None:
    search_space = space(folder, optional=["prune"])
    points = list(search_space.points(0))
    # With prune: 2 x 2 x 2; without it only the layers vary.
    assert len(points) == 8 + 2
    every = itertools.product(*(range(len(parameter.values)) for parameter in search_space.parameters))
    assert {search_space.identity(point) for point in every} == {search_space.identity(point) for point in points}
    assert len({search_space.identity(point) for point in points}) == len(points)


def test_only_what_lies_behind_the_baseline_is_trained_for_a_share_of_its_time(folder: Path) -> None:
    search_space = space(folder)
    recipe = search_space.recipe(search_space.origin, share=1 / 3)
    assert [stage.epochs for stage in recipe.stages if stage.kind in ("finetune", "distill")] == [2, pytest.approx(1)]
    assert recipe.stages[1] == search_space.base.stages[1], "pruning at once trains nothing, so that rungs share it"
    assert shorten_training(recipe, 1.0) == recipe.stages


def test_rows_that_choose_are_held_out_of_every_recipe(folder: Path) -> None:
    search_space = space(folder)
    (held,) = search_space.base.data.hold_out or ()
    assert (held.rows, held.source, held.split) == (20, "train", "select")
    assert search_space.recipe((0, 1, 1)).data == search_space.base.data


def test_a_value_that_fits_no_recipe_is_named_and_left_out(folder: Path) -> None:
    search_space = space(folder, choices={**CHOICES, "stages.1.prune.heads": [0.25, 2]})
    assert [parameter.values for parameter in search_space.parameters if parameter.name == "stages.1.prune.heads"] == [
        (0.5, 0.25)
    ]
    assert list(search_space.rejected) == ["stages.1.prune.heads=2"]


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"choices": {"stages.9.prune.heads": [0]}}, "from stages.0 to stages.5"),
        ({"choices": {"seed": [1, 2]}}, "cannot vary"),
        ({"choices": {"stages.0.finetune.epochs": [1]}}, "would change 'finetune'"),
        ({"choices": {"stages.1.prune.heads": [7, 9]}}, "No value of stages.1.prune.heads can be tried"),
        ({"choices": {"stages.1.prune.heads": [0.5]}}, "nothing to search"),
        ({"optional": ["prun"]}, "Did you mean 'prune'"),
    ],
)
def test_what_cannot_be_searched_is_refused(folder: Path, block: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        space(folder, **block)
    assert says in str(caught.value)


def test_a_recipe_without_a_block_says_how_to_write_one(folder: Path) -> None:
    with pytest.raises(InputError, match="search:"):
        SearchSpace(read_document(tiny_run.write_recipe(folder, "none")), folder)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [("budget", "soon", "90s, 60m or 1h30m"), ("rungs", [0.5, 0.2], "rising shares"), ("confidence", 0.4, "0.5")],
)
def test_mistakes_in_the_block_are_mistakes_of_the_recipe(folder: Path, field: str, value: Any, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        space(folder, **{field: value})
    assert f"search.{field}" in str(caught.value)
    assert expected in str(caught.value)
