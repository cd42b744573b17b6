"""Whether the winner learns from the rows that chose it too, and which rows those recipes have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run

from compress.plugins.search.goal import Goal
from compress.plugins.search.refit import Refit, check_refit
from compress.plugins.search.size_estimator import SizeEstimator
from compress.plugins.search.space import SearchSpace
from compress.plugins.search.trial import TrialRunner
from compress.recipe.document import read_document
from compress.utils.errors import InputError
from compress.utils.progress import SilentProgress

STAGES = (
    {"finetune": {"epochs": 1}},
    {"distill": {"teacher": "finetune", "epochs": 1}},
    {"onnx": {}},
    {"onnx_int8": {}},
)
CHOICES = {"stages.1.distill.epochs": [1, 2]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models_folder = tmp_path_factory.mktemp("refit")
    tiny_run.write_all(models_folder)
    return models_folder


def space(folder: Path, rows: int = 20, stages: Any = STAGES, hold_out: Any = None, **block: Any) -> SearchSpace:
    search = {"choices": CHOICES, "select": {"rows": rows}, **block}
    path = tiny_run.write_recipe(folder, "refit", stages=list(stages), search=search)
    document = read_document(path)
    if hold_out is not None:
        document.values["data"]["hold_out"] = hold_out
    return SearchSpace(document, folder)


def trials(made: SearchSpace) -> TrialRunner:
    return TrialRunner.in_process(
        Goal.from_recipe(made.base, made.search), made.folder, made.folder / "artifacts", SilentProgress()
    )


def is_refit(made: SearchSpace) -> bool:
    own_trials = trials(made)
    return Refit(made, own_trials, SizeEstimator(made, lambda: own_trials.context.runner(made.base))).enabled


def test_all_rows_are_those_that_train_had_before_any_were_held_out(folder: Path) -> None:
    spare = {"rows": 10, "split": "spare"}
    search_space = space(folder, hold_out=[spare, {"rows": 20}])
    context = trials(search_space).context
    searched, whole = (
        context.runner(search_space.recipe(search_space.origin, refit=refit)).inputs.data for refit in (False, True)
    )
    assert len(whole.split("train")) == len(searched.split("train")) + len(searched.split("select"))
    for split in ("test", "validation", "spare"):
        assert whole.split(split).equals(searched.split(split))
    assert "select" not in whole.splits


def test_few_rows_are_not_worth_another_training(folder: Path) -> None:
    count = tiny_run.ROWS["train"]
    few, enough = int(0.04 * count), int(0.06 * count)
    assert not is_refit(space(folder, few))
    assert is_refit(space(folder, enough))
    assert is_refit(space(folder, few, refit=True))
    assert not is_refit(space(folder, enough, refit=False))


def test_nothing_is_learned_where_nothing_is_trained(folder: Path) -> None:
    search_space = space(folder, stages=[STAGES[0], *STAGES[2:]], choices={"stages.2.onnx_int8.embedding_bits": [8, 4]})
    assert not is_refit(search_space)


@pytest.mark.parametrize(
    ("hold_out", "says"),
    [
        ([{"rows": 20}, {"rows": 10, "split": "spare"}], "spare is drawn from what they leave"),
        ([{"rows": 10, "from": "test"}], "they are rows of test"),
        ([{"rows": 10, "split": "spare"}], "a split of their own"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_refused_only_where_that_was_asked_for(
    folder: Path, hold_out: Any, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        check_refit(space(folder, hold_out=hold_out, refit=True))
    search_space = space(folder, hold_out=hold_out)
    check_refit(search_space)
    assert not is_refit(search_space)
