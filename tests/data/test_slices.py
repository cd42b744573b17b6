"""Tests of slices in recipes: accepted forms, and the error messages of invalid ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny_run
import yaml

from compress.data.slices import Slice, extra_columns
from compress.recipe.loading import dump_recipe, read_recipe, recipe_schema
from compress.utils.errors import RecipeError

GOOD: list[dict[str, Any]] = [
    {"column": "label"},
    {"column": "source", "max_values": 3, "min_rows": 5},
    {"length": "quartiles"},
    {"length": [16, 32], "unit": "tokens"},
    {"name": "negated", "column": "text", "matches": r"\b(not|never)\b"},
    {"name": "quoted", "column": "text", "contains": '"'},
    {"name": "five stars", "column": "stars", "equals": 5},
    {"name": "some stars", "column": "stars", "at_least": 2, "at_most": 4.5},
]


def recipe(tmp_path: Path, slices: Any) -> Path:
    return tiny_run.write_recipe(tmp_path, slices=slices)


def problems(tmp_path: Path, slices: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_recipe(recipe(tmp_path, slices))
    return [f"{problem.field}: {problem.found}; {problem.expected}" for problem in caught.value.problems]


def test_every_form_survives_a_round_trip(tmp_path: Path) -> None:
    read = read_recipe(recipe(tmp_path, GOOD))
    assert read.slices is not None
    assert [part.name for part in read.slices][4:] == ["negated", "quoted", "five stars", "some stars"]
    assert read.slices[3].length == (16, 32)
    assert read.slices[6].equals == "5"
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(read))
    assert read_recipe(again) == read


def test_examples_in_documentation_are_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "evaluation.md").read_text()
    block, drawn, judged = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.S))
    read = read_recipe(recipe(tmp_path, block["slices"])).slices
    assert read is not None
    assert len(read) == 7
    path = tmp_path / "judged.yaml"
    rest = {"name": "judged", "task": "text-generation", "model": "x", "stages": ["onnx"]}
    path.write_text(yaml.safe_dump(rest | judged))
    assert read_recipe(path).data.also == {"code": "python", "verses": "text"}
    path.write_text(yaml.safe_dump(rest | {"task": "text-to-image", "data": {"source": "y"}} | drawn))
    assert read_recipe(path).evaluation.pictures == 8


def test_empty_slices_differ_from_default_slices(tmp_path: Path) -> None:
    assert read_recipe(recipe(tmp_path, [])).slices == ()
    path = tiny_run.write_recipe(tmp_path, "other")
    assert read_recipe(path).slices is None
    assert "slices" not in yaml.safe_load(dump_recipe(read_recipe(path)))


def test_schema_accepts_every_form(tmp_path: Path) -> None:
    values = yaml.safe_load(recipe(tmp_path, GOOD).read_text())
    jsonschema.validate(values, recipe_schema())
    values["slices"] = [{"column": "label", "lenght": "quartiles"}]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, json.loads(json.dumps(recipe_schema())))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of `column` and `length`"),
        ({"column": "a", "length": "quartiles"}, "exactly one of `column` and `length`"),
        ({"length": "thirds"}, "`quartiles`, or lengths"),
        ({"length": []}, "`quartiles`, or lengths"),
        ({"length": [16, 16]}, "rising"),
        ({"length": [0, 16]}, "rising from at least 1"),
        ({"length": [1.5]}, "`quartiles`, or lengths"),
        ({"length": "quartiles", "name": "x"}, "`length` with `unit` alone"),
        ({"length": "quartiles", "contains": "x"}, "`length` with `unit` alone"),
        ({"length": "quartiles", "min_rows": 3}, "no `min_rows`"),
        ({"column": "a", "unit": "tokens"}, "no `unit`"),
        ({"column": "a", "contains": "x"}, "a `name` together with a predicate"),
        ({"column": "a", "name": "x"}, "a `name` together with a predicate"),
        ({"column": "a", "name": "x", "contains": "b", "max_values": 3}, "no `max_values`"),
        ({"column": "a", "name": "x", "contains": "b", "at_least": 3}, "one predicate"),
        ({"column": "a", "name": "x", "at_least": 3, "at_most": 2}, "`at_least` no larger than `at_most`"),
        ({"column": "a", "name": "x", "matches": "("}, "a regular expression"),
        ({"column": "a", "name": "a[b]", "contains": "x"}, "text of the form"),
    ],
)
def test_invalid_slice_is_reported_as_one_problem(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    messages = problems(tmp_path, [given])
    assert len(messages) == 1, messages
    assert messages[0].startswith("slices.0")
    assert message in messages[0]


def test_duplicate_names_are_rejected(tmp_path: Path) -> None:
    negated = {"name": "negated", "column": "text", "contains": "not"}
    assert "each name once" in problems(tmp_path, [negated, {**negated, "contains": "never"}])[0]
    assert "every slice once" in problems(tmp_path, [{"column": "label"}, {"column": "label"}])[0]


def test_extra_columns_are_those_outside_the_task() -> None:
    slices = [Slice(column="text", name="a", contains="b"), Slice(column="source"), Slice(length="quartiles")]
    slices.append(Slice(column="source", name="c", equals="d"))
    assert extra_columns(slices, ("text", "label")) == ("source",)
