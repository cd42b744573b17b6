"""Tests of the cache hits predicted by `compress check`: compared with the hits of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from compress.pipeline.keys import CachedStages
from compress.pipeline.planning import make_plan
from compress.pipeline.runner import StageRunner
from compress.utils.errors import DataError

LABELS = tiny_run.LABELS_OF_STAGES
# The export is left out: tracing takes seconds and emits warnings that would have to be silenced.
TORCH_LABELS = LABELS[:4]
STAGES = f"stages={json.dumps(list(tiny_run.STAGES[:4]))}"


@pytest.fixture(scope="module")
def recipe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a recipe whose four stages have been run, with their cache in `artifacts/`."""
    folder = tmp_path_factory.mktemp("place")
    tiny_run.write_all(folder)
    StageRunner(tiny_run.load(folder / "tiny.yaml", STAGES), folder, folder / "artifacts", tiny_run.Notes()).run_all()
    return folder


def predicted_cache_hits(recipe_folder: Path, *overrides: str) -> list[bool]:
    """Return for each stage whether it is predicted to be a cache hit."""
    recipe = tiny_run.load(recipe_folder / "tiny.yaml", STAGES, *overrides)
    cached = CachedStages(recipe, recipe_folder, recipe_folder / "artifacts")
    return [cached(label) for label in recipe.labels()]


def cache_hits_of_run(recipe_folder: Path, artifacts: Path, *overrides: str) -> list[bool]:
    """Run the stages on a copy of the cache and return for each whether it was a cache hit."""
    shutil.copytree(recipe_folder / "artifacts", artifacts)
    runner = StageRunner(
        tiny_run.load(recipe_folder / "tiny.yaml", STAGES, *overrides), recipe_folder, artifacts, tiny_run.Notes()
    )
    runner.run_all()
    return [finished.record.cached for finished in runner.results.values()]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("stages.1.distill.temperature=3",), [True, False, False, False]),
        (("benchmark.seconds=1", "name=other"), [True] * 4),
    ],
)
def test_predicted_cache_hits_equal_those_of_run(
    recipe_folder: Path, tmp_path: Path, overrides: tuple[str, ...], expected: list[bool]
) -> None:
    assert predicted_cache_hits(recipe_folder, *overrides) == expected
    assert cache_hits_of_run(recipe_folder, tmp_path / "artifacts", *overrides) == expected


@pytest.mark.parametrize("override", ["seed=3", "data.max_length=12", "train.csv", "model/config.json"])
def test_change_of_shared_input_invalidates_every_stage(recipe_folder: Path, tmp_path: Path, override: str) -> None:
    if "=" in override:
        assert predicted_cache_hits(recipe_folder, override) == [False] * 4
        return
    shutil.copytree(recipe_folder, tmp_path / "copy")
    path = tmp_path / "copy" / override
    content = path.read_text()
    if path.suffix == ".json":
        path.write_text(json.dumps({**json.loads(content), "hidden_dropout_prob": 0.0}))
    else:
        path.write_text("\n".join(content.splitlines()[:-1]) + "\n")
    assert predicted_cache_hits(tmp_path / "copy") == [False] * 4


def test_missing_cache_entry_invalidates_all_later_stages(recipe_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(recipe_folder, tmp_path / "copy")
    recipe = tiny_run.load(recipe_folder / "tiny.yaml", STAGES)
    runner = StageRunner(recipe, recipe_folder, recipe_folder / "artifacts", tiny_run.Notes())
    runner.run_all()
    shutil.rmtree(tmp_path / "copy" / "artifacts" / "cache" / runner.results["distill"].entry.key)
    assert predicted_cache_hits(tmp_path / "copy") == [True, False, False, False]


def test_no_hits_without_cache_and_no_cache_folder_is_created(recipe_folder: Path, tmp_path: Path) -> None:
    cached = CachedStages(tiny_run.load(recipe_folder / "tiny.yaml", STAGES), recipe_folder, tmp_path / "artifacts")
    assert not any(cached(label) for label in TORCH_LABELS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "override",
    [
        "model=no-such-owner/no-such-model",
        "model=sample:minilm",
        'data={"source": "sample:movie-reviews"}',
        'data={"source": "no-such-owner/no-such-data"}',
        'data.unlabeled=["sample:snippets"]',
    ],
)
def test_no_hits_for_source_not_downloaded_and_nothing_is_fetched(
    recipe_folder: Path, tmp_path: Path, monkeypatch: Any, override: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    assert predicted_cache_hits(recipe_folder, override) == [False] * 4
    assert not (tmp_path / "user-cache").exists()


def test_check_rejects_test_row_in_train_split(recipe_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(recipe_folder, tmp_path / "copy")
    row = (recipe_folder / "test.csv").read_text().splitlines()[1]
    with (tmp_path / "copy" / "train.csv").open("a") as file:
        file.write(row + "\n")
    recipe = tiny_run.load(tmp_path / "copy" / "tiny.yaml", STAGES)
    with pytest.raises(DataError):
        make_plan(recipe, tmp_path / "copy", CachedStages(recipe, tmp_path / "copy", tmp_path / "copy" / "artifacts"))
