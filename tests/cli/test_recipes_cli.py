"""Tests of `compress recipes` and `compress check`: starter recipes, the schema, listings and plans."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from command_line import output_of

from compress.recipe.json_schema import starter, starters
from compress.recipe.loading import read_recipe
from compress.recipe.recipe import Recipe
from compress.tasks.registry import TASK_NAMES
from compress.utils.errors import InputError


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def data_files(folder: Path) -> None:
    for split in ("train", "validation", "test"):
        (folder / f"{split}.csv").write_text(
            f"text,label\ngood film of {split},positive\nbad film of {split},negative\n"
        )


def test_every_task_has_a_starter() -> None:
    assert starters() == list(TASK_NAMES)


def test_new_writes_a_valid_recipe(tmp_path: Path) -> None:
    assert output_of("recipes", "new", "--output", "mine.yaml").strip() == "mine.yaml"
    recipe = read_recipe(tmp_path / "mine.yaml")
    assert recipe.labels() == ("finetune", "prune", "distill", "trim_vocabulary", "onnx", "onnx_int8")
    assert recipe.data.splits["train"] == "train.csv"


def test_starter_mentions_every_field_of_the_recipe_and_of_its_stages() -> None:
    text = starter("text-classification")
    recipe = Recipe.model_validate(yaml.safe_load(text))
    for model in (recipe, recipe.data, recipe.benchmark, recipe.limits[0], *recipe.stages):
        for name in type(model).model_fields.keys() - {"kind"}:
            assert f"{name}:" in text, name


def test_check_names_missing_data_files_of_starter(tmp_path: Path) -> None:
    output_of("recipes", "new", "--output", "mine.yaml")
    with pytest.raises(InputError) as caught:
        output_of("check", "mine.yaml")
    for split in ("train", "validation", "test"):
        assert f"{split}.csv does not exist" in str(caught.value)


def test_new_does_not_overwrite_file_without_force(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        output_of("recipes", "new", "--output", str(path))
    assert path.read_text() == "mine"
    output_of("recipes", "new", "--output", str(path), "--force")
    assert read_recipe(path).name == "my-classifier"


def test_new_writes_to_standard_output_and_json() -> None:
    text = output_of("recipes", "new")
    assert text == starter("text-classification")
    assert json.loads(output_of("recipes", "new", "--json"))["recipe"] == text


def test_new_suggests_nearest_task_name() -> None:
    with pytest.raises(InputError, match="Did you mean 'text-classification'"):
        output_of("recipes", "new", "--task", "text-clasification")


def test_schema_accepts_the_starter_and_refuses_a_misspelling() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(output_of("recipes", "schema")))
    text = starter("text-classification")
    assert validator.is_valid(yaml.safe_load(text))
    assert not validator.is_valid(yaml.safe_load(text.replace("teacher:", "teachr:")))


def test_list_shows_valid_and_broken_recipes_of_subfolders(tmp_path: Path) -> None:
    (tmp_path / "recipes" / "more").mkdir(parents=True)
    (tmp_path / "recipes" / "good.yaml").write_text(starter("text-classification"))
    (tmp_path / "recipes" / "more" / "bad.yaml").write_text("name: bad\n")
    rows = json.loads(output_of("recipes", "list", "recipes", "--json"))
    assert [row["path"] for row in rows] == ["recipes/good.yaml", "recipes/more/bad.yaml"]
    assert rows[0]["stages"][0] == "finetune"
    assert len(rows[1]["problems"]) == 4  # task, model, data, stages
    text = " ".join(output_of("recipes", "list", "recipes").split())
    assert "my-classifier text-classification" in text
    assert "4 problems: compress check recipes/more/bad.yaml" in text


def test_list_of_missing_folder_is_rejected() -> None:
    with pytest.raises(InputError, match="no such folder"):
        output_of("recipes", "list", "nowhere")


def test_check_as_json_with_an_override(tmp_path: Path) -> None:
    data_files(tmp_path)
    output_of("recipes", "new", "--output", "mine.yaml")
    # Two test rows are too few for the starter's limits.
    overrides = ("--set", "stages.4=onnx", "--set", "name=other", "--set", "limits=[]")
    plan = json.loads(output_of("check", "mine.yaml", "--json", *overrides))
    assert plan["recipe"] == "other"
    assert [stage["label"] for stage in plan["stages"]][-2:] == ["onnx", "onnx_int8"]
    assert plan["artifacts"] == "artifacts"
    assert not (tmp_path / "artifacts").exists()
