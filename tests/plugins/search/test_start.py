"""Tests of starting a search: initial stages and choices, checks before any work, and refits."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_places
import tiny_run
import tiny_sounds
from mergeable import save_mergeable_llama

from compress.plugins.ray.jobs import JobContext
from compress.plugins.search.cli_options import SearchOptions, build_document, initial_stages
from compress.plugins.search.dry_run import SpaceSummary, prepare_dry_run
from compress.plugins.search.final_evaluation import Refit, check_refit
from compress.plugins.search.outcome import Goal
from compress.plugins.search.size_estimator import SizeEstimator
from compress.plugins.search.space import SearchSpace
from compress.plugins.search.trial import TrialRunner
from compress.recipe.document import read_document
from compress.stages.cost_model import Shape
from compress.stages.protocols import search_values
from compress.stages.registry import STAGES
from compress.tasks.registry import TASKS
from compress.tasks.task import Task
from compress.utils.errors import CompressError, InputError
from compress.utils.progress import SilentProgress

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")


TRANSFORMER = Shape(2e6, 4e6, 8e6, 1e5, layers=6, hidden=384, intermediate=1536, heads=12)
CONVOLUTIONS = Shape(0, 0, 0, 5e6, layers=0)
KINDS = [(name, kind) for name, task in TASKS.items() if task.starter for kind in task.variants()]


def anything(kind: str, fields: object) -> bool:
    return True


def written(stage: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    ((kind, fields),) = stage.items()
    return kind, fields


def initial(task: str, shape: Shape | None = TRANSFORMER, possible: Any = anything) -> list[tuple[str, dict[str, Any]]]:
    """Return the (kind, fields) of the initial stages for a task and a model shape."""
    return list(map(written, initial_stages(TASKS[task], TASKS[task].starter["stages"], shape, possible)))


@pytest.mark.parametrize(("name", "kind"), KINDS, ids=[f"{name}-{type(kind).__name__}" for name, kind in KINDS])
def test_every_task_has_initial_stages_with_choices(name: str, kind: Task) -> None:
    stages = initial_stages(kind, TASKS[name].starter["stages"], TRANSFORMER, anything)
    recipes = 1
    for initial_stage in stages:
        label, fields = written(initial_stage)
        stage = STAGES[label].model_validate({"kind": label, **fields})
        assert stage.supports(kind.capabilities), f"{label} is not for {name}"
        recipes *= math.prod(len(set(map(str, tried))) for tried in search_values(stage, TRANSFORMER).values())
    assert recipes >= 4, stages
    assert not any("model" in (fields.get("student") or {}) for _, fields in map(written, stages))


def test_initial_stages_prune_and_distill_by_architecture() -> None:
    stages = initial("image-classification")
    assert [kind for kind, _ in stages] == ["finetune", "prune", "distill", "onnx", "onnx_int8"]
    assert stages[1][1] == {"feed_forward": 0.25}
    assert stages[2][1]["teacher"] == "finetune"
    assert initial("image-classification", CONVOLUTIONS)[1][1] == {"flops": 0.3}
    prune = STAGES["prune"].model_validate({"kind": "prune", "flops": 0.3})
    assert set(search_values(prune, CONVOLUTIONS)) == {"flops"}
    assert set(search_values(STAGES["prune"].model_validate({"kind": "prune", "heads": 0.5}), TRANSFORMER)) == {
        "heads", "feed_forward",
    }  # fmt: skip


def test_impossible_pruning_is_left_out() -> None:
    starter = list(map(written, TASKS["audio-classification"].starter["stages"]))
    narrowed = initial("audio-classification", possible=lambda _, fields: "feed_forward" not in fields)
    assert narrowed[1] == ("prune", {"heads": 0.25})
    assert initial("audio-classification", possible=lambda *_: False) == starter


@pytest.mark.parametrize(("layers", "kept"), [(12, [1, 3, 5, 7, 9, 11]), (4, [1, 3]), (3, [2]), (1, None)])
def test_student_has_half_of_the_layers(layers: int, kept: list[int] | None) -> None:
    """The layers in the task's starter recipe belong to the starter's model and are not used."""
    fields = dict(initial("text-classification", replace(TRANSFORMER, layers=layers)))
    assert fields["distill"].get("student") == (None if kept is None else {"layers": kept})
    whole = dict(initial("text-classification", possible=lambda *_: False))
    assert "student" not in whole["distill"] and whole["distill"]["teacher"] == "finetune"


def test_quantization_choices_depend_on_embeddings_and_timing() -> None:
    validate = STAGES["onnx_int8"].model_validate
    quantize, encoder = validate({"kind": "onnx_int8"}), validate({"kind": "onnx_int8", "part": "encoder"})
    assert set(search_values(quantize, TRANSFORMER)) == {"embedding_bits", "embedding_block_size"}
    assert search_values(quantize, CONVOLUTIONS) == {}
    assert search_values(quantize, CONVOLUTIONS, timed=True) == {"method": ("dynamic", "static")}
    assert "method" not in search_values(encoder, TRANSFORMER, timed=True)


PRUNE = {"prune": {"feed_forward": 0.5, "importance_examples": 8}}


def of_recipe(folder: Path, stages: list[Any], choices: dict[str, list[Any]], **block: Any) -> SpaceSummary:
    """Return the dry-run summary of a recipe with long training and a model of two layers with two heads each."""
    every = [{"finetune": {"epochs": 20}}, *stages, {"onnx": {}}, {"onnx_int8": {}}]
    choices = {**choices, f"stages.{len(every) - 1}.onnx_int8.embedding_bits": [8, 4]}
    search = {"choices": choices, "select": {"rows": 20}, **block}
    path = tiny_run.write_all(folder, stages=every, search=search)
    with prepare_dry_run(read_document(path), folder, folder / "artifacts") as prepared:
        return prepared.summary("here")


def of_limits(folder: Path, task: str, *sets: str) -> SpaceSummary:
    """Return the dry-run summary of a search that is given only a model and data."""
    asked = SearchOptions(model=str(folder / "model"), data=str(folder), task=task, keep=0.3)
    document, home, origin = build_document(None, asked, sets)
    with prepare_dry_run(document, home, folder / "artifacts") as prepared:
        return prepared.summary(origin)


def test_impossible_values_are_left_out_with_the_reason(tmp_path: Path) -> None:
    # The second field is named by the stage's label.
    choices = {"stages.1.prune.heads": [0.25, 0.5, 0.75], "distill.student.layers": [[0], [0, 1, 2]]}
    opening = of_recipe(tmp_path, [PRUNE, {"distill": {"student": {"layers": [0, 1]}}}], choices)
    others = {choice.name: choice.others for choice in opening.choices}
    assert others["stages.1.prune.heads"] == ("0.25", "0.5")
    assert others["stages.2.distill.student.layers"] == ("[0]",)
    assert set(opening.refused) == {"stages.1.prune.heads=0.75", "stages.2.distill.student.layers=[0, 1, 2]"}
    assert "leaves none" in opening.refused["stages.1.prune.heads=0.75"]
    assert sum("left out" in line for line in opening.lines()) == 2
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([{"distill": {"student": {"layers": [0, 2, 4]}}}], r"Layers \[0, 2, 4\] cannot be kept in a model with 2"),
        ([{"prune": {"heads": 0.2}}], "heads 0.2 would remove nothing"),
        ([{"prune": {"layers": 1}}, {"distill": {"student": {"layers": [0, 1]}}}], r"Layers \[0, 1\] cannot be kept"),
    ],
)
def test_impossible_recipe_is_refused_before_any_work(tmp_path: Path, stages: list[Any], says: str) -> None:
    """In the last case each stage is possible alone, but not both together."""
    with pytest.raises(CompressError, match=says):
        of_recipe(tmp_path, stages, {})
    assert not (tmp_path / "artifacts").exists()


def test_budget_shorter_than_the_first_trial_gives_a_warning(tmp_path: Path) -> None:
    choices = {"stages.1.prune.feed_forward": [0.25]}
    short, long = (of_recipe(tmp_path / budget, [PRUNE], choices, budget=budget) for budget in ("1s", "10h"))
    assert short.first_seconds > 1
    assert any("longer than the budget of 1s" in line for line in short.lines())
    assert not any("longer than the budget" in line for line in long.lines())


def test_pruned_share_removes_at_least_one_of_few_heads(tmp_path: Path) -> None:
    tiny_sounds.write_splits(tmp_path, {"train": 24, "test": 8})
    tiny_sounds.write_model(
        tmp_path / "model", lambda: tiny_sounds.waves("Wav2Vec2", masked=False, ending="CTC"), letters=True
    )
    opening = of_limits(tmp_path, "automatic-speech-recognition")
    assert "prune" in opening.stages, "by a half of two heads, since a quarter is none"
    assert "would remove nothing" in opening.refused["stages.1.prune.heads=0.25"]


def test_error_for_unnamed_mask_classes_suggests_labels(tmp_path: Path) -> None:
    tiny_places.write_all(tmp_path, "segformer", [])
    with pytest.raises(CompressError, match="the label '0', which the model lacks") as caught:
        of_limits(tmp_path, "image-segmentation")
    assert f"data.labels: [{', '.join(tiny_places.LABELS)}]" in str(caught.value)
    opening = of_limits(tmp_path, "image-segmentation", f"data.labels=[{', '.join(tiny_places.LABELS)}]")
    assert "prune" in opening.stages


def test_search_for_llama_cpp_varies_the_gguf_type(tmp_path: Path) -> None:
    words = ("the", "river", "runs", "over", "under", "hill", "red", "stone")
    rows = [json.dumps({"text": " ".join(random.Random(seed).choices(words, k=60))}) for seed in range(800)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    save_mergeable_llama(tmp_path / "model", max_position_embeddings=1024)
    asked = SearchOptions(
        model=str(tmp_path / "model"), data=str(tmp_path / "rows.jsonl"), keep=0.9, target="llama-cpp"
    )
    document, home, origin = build_document(None, asked)
    assert document.values["stages"] == [{"imatrix": {}}, {"gguf": {"type": "Q4_K_M"}}]
    assert document.values["data"]["max_length"] == 512, "as the task's starter has it"
    with prepare_dry_run(document, home, tmp_path / "artifacts") as prepared:
        (choice,) = prepared.summary(origin).choices
    assert (choice.name, len(choice.others)) == ("stages.1.gguf.type", 15)
    document, _, _ = build_document(None, replace(asked, target="cpu"))
    assert [next(iter(stage)) for stage in document.values["stages"]] == ["equalize", "gptq", "onnx"]


REFIT_STAGES = (
    {"finetune": {"epochs": 1}},
    {"distill": {"teacher": "finetune", "epochs": 1}},
    {"onnx": {}},
    {"onnx_int8": {}},
)
REFIT_CHOICES = {"stages.1.distill.epochs": [1, 2]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models_folder = tmp_path_factory.mktemp("refit")
    tiny_run.write_all(models_folder)
    return models_folder


def refit_space(
    folder: Path, rows: int = 20, stages: Any = REFIT_STAGES, hold_out: Any = None, **block: Any
) -> SearchSpace:
    search = {"choices": REFIT_CHOICES, "select": {"rows": rows}, **block}
    path = tiny_run.write_recipe(folder, "refit", stages=list(stages), search=search)
    document = read_document(path)
    if hold_out is not None:
        document.values["data"]["hold_out"] = hold_out
    return SearchSpace(document, folder)


def trials(made: SearchSpace) -> TrialRunner:
    context = JobContext(made.folder, made.folder / "artifacts", SilentProgress())
    return TrialRunner.in_process(Goal.from_recipe(made.base), context)


def is_refit(made: SearchSpace) -> bool:
    own_trials = trials(made)
    return Refit(made, own_trials, SizeEstimator(made, lambda: own_trials.context.runner(made.base))).enabled


def test_refit_trains_on_the_selection_rows_too(folder: Path) -> None:
    spare = {"rows": 10, "split": "spare"}
    search_space = refit_space(folder, hold_out=[spare, {"rows": 20}])
    context = trials(search_space).context
    searched, whole = (
        context.runner(search_space.recipe(search_space.origin, refit=refit)).inputs.data for refit in (False, True)
    )
    assert len(whole.split("train")) == len(searched.split("train")) + len(searched.split("select"))
    for split in ("test", "validation", "spare"):
        assert whole.split(split).equals(searched.split(split))
    assert "select" not in whole.splits


def test_refit_needs_enough_selection_rows(folder: Path) -> None:
    count = tiny_run.ROWS["train"]
    few, enough = int(0.04 * count), int(0.06 * count)
    assert not is_refit(refit_space(folder, few))
    assert is_refit(refit_space(folder, enough))
    assert is_refit(refit_space(folder, few, refit=True))
    assert not is_refit(refit_space(folder, enough, refit=False))


def test_search_without_training_has_no_refit(folder: Path) -> None:
    search_space = refit_space(
        folder, stages=[REFIT_STAGES[0], *REFIT_STAGES[2:]], choices={"stages.2.onnx_int8.embedding_bits": [8, 4]}
    )
    assert not is_refit(search_space)


@pytest.mark.parametrize(
    ("hold_out", "says"),
    [
        ([{"rows": 20}, {"rows": 10, "split": "spare"}], "spare is drawn from what they leave"),
        ([{"rows": 10, "from": "test"}], "they are rows of test"),
        ([{"rows": 10, "split": "spare"}], "a split of their own"),
    ],
)
def test_requested_refit_with_unusable_rows_is_refused(folder: Path, hold_out: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_refit(refit_space(folder, hold_out=hold_out, refit=True))
    search_space = refit_space(folder, hold_out=hold_out)
    check_refit(search_space)
    assert not is_refit(search_space)
