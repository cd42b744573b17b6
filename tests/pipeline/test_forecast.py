"""What `compress check` says of the cache is what a run then finds."""

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
# Not among them: export, whose tracing takes seconds and whose warnings would have to be silenced.
TORCH_LABELS = LABELS[:4]
STAGES = f"stages={json.dumps(list(tiny_run.STAGES[:4]))}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of four stages that was run; its artifacts are beside it."""
    folder = tmp_path_factory.mktemp("place")
    tiny_run.write_all(folder)
    StageRunner(tiny_run.load(folder / "tiny.yaml", STAGES), folder, folder / "artifacts", tiny_run.Notes()).run_all()
    return folder


def forecast(place: Path, *overrides: str) -> list[bool]:
    """For each stage whether it is said to be cached."""
    recipe = tiny_run.load(place / "tiny.yaml", STAGES, *overrides)
    cached = CachedStages(recipe, place, place / "artifacts")
    return [cached(label) for label in recipe.labels()]


def travelled(place: Path, artifacts: Path, *overrides: str) -> list[bool]:
    """For each stage whether a run takes it from (a copy of) the cache."""
    shutil.copytree(place / "artifacts", artifacts)
    runner = StageRunner(tiny_run.load(place / "tiny.yaml", STAGES, *overrides), place, artifacts, tiny_run.Notes())
    runner.run_all()
    return [finished.record.cached for finished in runner.results.values()]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("stages.1.distill.temperature=3",), [True, False, False, False]),
        (("benchmark.seconds=1", "name=other"), [True] * 4),
    ],
)
def test_the_forecast_is_what_a_run_finds(
    place: Path, tmp_path: Path, overrides: tuple[str, ...], expected: list[bool]
) -> None:
    assert forecast(place, *overrides) == expected
    assert travelled(place, tmp_path / "artifacts", *overrides) == expected


@pytest.mark.parametrize("override", ["seed=3", "data.max_length=12", "train.csv", "model/config.json"])
def test_what_every_stage_depends_on_runs_all_again(place: Path, tmp_path: Path, override: str) -> None:
    if "=" in override:
        assert forecast(place, override) == [False] * 4
        return
    shutil.copytree(place, tmp_path / "copy")
    path = tmp_path / "copy" / override
    content = path.read_text()
    if path.suffix == ".json":
        path.write_text(json.dumps({**json.loads(content), "hidden_dropout_prob": 0.0}))
    else:
        path.write_text("\n".join(content.splitlines()[:-1]) + "\n")
    assert forecast(tmp_path / "copy") == [False] * 4


def test_a_stage_removed_from_the_cache_takes_those_after_it_along(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "copy")
    recipe = tiny_run.load(place / "tiny.yaml", STAGES)
    runner = StageRunner(recipe, place, place / "artifacts", tiny_run.Notes())
    runner.run_all()
    shutil.rmtree(tmp_path / "copy" / "artifacts" / "cache" / runner.results["distill"].entry.key)
    assert forecast(tmp_path / "copy") == [True, False, False, False]


def test_nothing_is_cached_without_a_cache_and_none_is_made(place: Path, tmp_path: Path) -> None:
    cached = CachedStages(tiny_run.load(place / "tiny.yaml", STAGES), place, tmp_path / "artifacts")
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
def test_nothing_is_cached_while_a_source_is_not_here_and_nothing_is_fetched(
    place: Path, tmp_path: Path, monkeypatch: Any, override: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    assert forecast(place, override) == [False] * 4
    assert not (tmp_path / "user-cache").exists()


def test_data_that_a_run_would_refuse_is_refused_by_check(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "copy")
    row = (place / "test.csv").read_text().splitlines()[1]
    with (tmp_path / "copy" / "train.csv").open("a") as file:
        file.write(row + "\n")
    recipe = tiny_run.load(tmp_path / "copy" / "tiny.yaml", STAGES)
    with pytest.raises(DataError):
        make_plan(recipe, tmp_path / "copy", CachedStages(recipe, tmp_path / "copy", tmp_path / "copy" / "artifacts"))
