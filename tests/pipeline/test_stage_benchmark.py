"""What is tried before a run: by a closed form, and against the whole of what it is tried of."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_run import ROWS, UNUSED, write_all
from transformers import AutoModelForSequenceClassification

import compress.pipeline.planning
import compress.pipeline.stage_benchmark
from compress.pipeline import stage_benchmark_process
from compress.pipeline.planning import make_plan
from compress.pipeline.recipe_sources import read_shape
from compress.pipeline.stage_benchmark import StageBenchmarks, StageTiming, benchmark_stages
from compress.pipeline.stage_benchmark_process import StageBenchmarker
from compress.recipe.loading import read_recipe
from compress.recipe.recipe import Recipe
from compress.stages.cost_model import Shape
from compress.stages.finetune import Finetune
from compress.stages.protocols import data_passes
from compress.stages.prune.stage import Prune
from compress.stages.sparsify.stages import Sparsify, SparsifyGradually
from compress.utils.errors import InputError
from compress.utils.progress import SilentProgress

STAGES: list[dict[str, Any]] = [
    {"finetune": {"epochs": 3, "batch_size": 8, "keep_best": True}},
    {"prune": {"feed_forward": 0.5, "importance_examples": 32}},
    {"trim_vocabulary": {}},
    {"distill": {"teacher": "finetune", "student": {"layers": [0]}, "epochs": 2, "batch_size": 8}},
    {"onnx": {}},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trial")
    write_all(folder, stages=STAGES)
    return folder


@pytest.fixture(scope="module")
def recipe(place: Path) -> Recipe:
    return read_recipe(place / "tiny.yaml")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is tried with one thread, which would stay so for other tests."""
    monkeypatch.setattr(stage_benchmark_process, "_share_waited", lambda: 0.0)


def test_every_training_stage_is_tried_with_what_it_will_get(place: Path, recipe: Recipe, tmp_path: Path) -> None:
    trials = list(StageBenchmarker(recipe, place, tmp_path).run_all())
    assert [list(tried.stages) for tried in trials] == [
        [],
        ["finetune"],
        ["finetune", "prune"],
        ["finetune", "prune", "trim_vocabulary"],
        ["finetune", "prune", "trim_vocabulary", "distill"],
    ]
    trial, start = trials[-1], read_shape(place / "model")
    shapes = {label: stage.shape for label, stage in trial.stages.items()}
    # A head of two classes, 64 wide, and the pooler before it, are not in the files of a bare encoder.
    assert trial.start.parameters == start.parameters + 2 * 65
    assert shapes["finetune"] == trial.start
    assert shapes["prune"].intermediate == 64
    # All rows are read: the six words that none of them has are gone, and 16 positions beyond data.max_length.
    assert shapes["prune"].embeddings - shapes["trim_vocabulary"].embeddings == 64 * (len(UNUSED) + 16)
    assert shapes["distill"].layers == 1
    assert shapes["distill"].embeddings == shapes["trim_vocabulary"].embeddings
    assert all(stage.peak_rss_bytes >= 1e8 and stage.seconds >= 0 for stage in trial.stages.values())
    assert trial.stages["finetune"].step_seconds > 0 == trial.stages["prune"].step_seconds


def test_uses_are_the_multiplications_of_a_pass(place: Path, recipe: Recipe, tmp_path: Path) -> None:
    """Each matrix multiplies every token, padding too, but the head only the first; attention a little more."""
    rehearsal = StageBenchmarker(recipe, place, tmp_path)
    trial = next(rehearsal.run_all())
    module = AutoModelForSequenceClassification.from_pretrained(place / "model")
    layers = [weight.numel() for name, weight in module.named_parameters() if ".layer." in name and weight.ndim > 1]
    head = 64 * 64 + 64 * 2
    longest = 16  # data.max_length; no row is shorter than 4 tokens
    low, high = ((sum(layers) * length + head) / trial.start.working for length in (4, longest))
    attention = 2 * 2 * longest * longest * 64 / trial.start.working
    assert low <= trial.uses <= high + attention


SHAPE = Shape(embeddings=100, attention=2000, feed_forward=7000, other=1000, layers=2, tensors=40)
TRIAL = StageBenchmarks(
    start=SHAPE,
    uses=5.0,
    answer_seconds=0.01,
    encode_seconds=0.001,
    example_bytes=1000.0,
    ready_seconds=3.0,
    ready_bytes=500_000_000,
    stages={
        "finetune": StageTiming(seconds=2.0, example_seconds=0.1, step_seconds=0.5, peak_rss_bytes=10**9, shape=SHAPE)
    },
)


def planned(
    recipe: Recipe, place: Path, artifacts: Path, monkeypatch: pytest.MonkeyPatch, trial: StageBenchmarks | None = TRIAL
) -> compress.pipeline.planning.Plan:
    monkeypatch.setattr(compress.pipeline.planning, "benchmark_stages", lambda *given: trial)
    monkeypatch.setattr(compress.pipeline.planning, "machine_flops_per_second", lambda: 1e9)
    return make_plan(recipe, place, None, artifacts)


def test_a_stage_costs_what_it_did_on_a_few_examples_times_their_number(
    place: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = planned(recipe, place, tmp_path, monkeypatch).stages[0]
    rows, judged = ROWS["train"], ROWS["validation"]
    # Two seconds in any case; each row is read once and learned from three times, as often as others are judged.
    assert stage.seconds.value == pytest.approx(2 + rows * 0.1 + 3 * rows * 0.5 + 3 * judged * 0.01)
    assert stage.peak_memory_bytes.value == pytest.approx(1.2 * (10**9 + rows * 1000))


def test_rows_that_importance_does_not_see_become_inputs_all_the_same(
    place: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = TRIAL.model_copy(update={"stages": {"prune": TRIAL.stages["finetune"]}})
    stages = planned(recipe, place, tmp_path, monkeypatch, trial).stages
    assert stages[1].seconds.value == pytest.approx(2 + 32 * 0.1 + (ROWS["train"] - 32) * 0.001)


def test_measuring_is_evaluation_and_launches(
    place: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models are judged and timed in twice as many launches as the recipe asks for at least."""
    changes = {"stages": STAGES[:1] + STAGES[4:], "benchmark": {"every_stage": False, "seconds": 2, "batch_size": 4}}
    changed_recipe = Recipe.model_validate({**recipe.model_dump(exclude_unset=True), **changes})
    plan = planned(changed_recipe, place, tmp_path, monkeypatch)
    weights = read_shape(place / "model")
    answer = 0.7 * 0.01 * weights.working / SHAPE.working
    handled = 0.5 + 4 * weights.parameters / 2e8
    writing = handled + 4 + 0.065 * weights.tensors  # `finetune`, the baseline, is exported to be measured
    evaluation = 2 * ROWS["test"] * (answer + 0.001)
    launches = 2 * 2 * 2 + 12 * 2 * 0.35 + 12 * 12 * 2 * answer * (1 + 4)
    assert plan.measuring.value == pytest.approx(6 + writing + evaluation + launches)


def test_a_trial_is_made_once_and_only_where_training_takes_long(
    place: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial_folders: list[Path] = []

    def make(_recipe: Recipe, _folder: Path, file: Path) -> None:
        trial_folders.append(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(TRIAL.model_dump_json())

    def of(**fields: Any) -> Recipe:
        stages = [{"finetune": {"batch_size": 8, **fields}}, {"onnx": {}}]
        return Recipe.model_validate({**recipe.model_dump(exclude={"stages", "baseline"}), "stages": stages})

    monkeypatch.setattr(compress.pipeline.stage_benchmark, "_run_benchmark", make)
    make_plan(of(epochs=3), place, None, tmp_path, looks_into_model=True)  # 45 steps
    assert trial_folders == []
    make_plan(of(epochs=7), place, None, tmp_path)  # 105 steps, but nobody asked for a look
    assert trial_folders == []
    plan = make_plan(of(epochs=7), place, None, tmp_path, looks_into_model=True)
    assert len(trial_folders) == 1 and "benchmarked here" in plan.stages[0].seconds.note
    # What is in the cache, or runs the recipe's own code, is not tried.
    make_plan(of(epochs=7, batch_size=6), place, lambda label: True, tmp_path, looks_into_model=True)
    trusting = of(epochs=7, batch_size=6).model_copy(update={"trust_remote_code": True})
    make_plan(trusting, place, None, tmp_path, looks_into_model=True)
    assert len(trial_folders) == 1
    # Epochs change how much there is to do, and not what a batch costs; another size of batches does.
    assert benchmark_stages(of(epochs=9), place, tmp_path, True, SilentProgress()) == TRIAL and len(trial_folders) == 1
    assert benchmark_stages(of(epochs=9, precision="fp32"), place, tmp_path, False, SilentProgress()) is None
    benchmark_stages(of(epochs=9, batch_size=4), place, tmp_path, True, SilentProgress())
    assert len(trial_folders) == 2 and trial_folders[0] != trial_folders[1]


def test_a_process_of_its_own_leaves_what_it_found(
    place: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Recipe.model_validate({**recipe.model_dump(), "stages": [STAGES[1]], "baseline": "start"})
    benchmarks = benchmark_stages(short, place, tmp_path, True, SilentProgress())
    assert benchmarks is not None and list(benchmarks.stages) == ["prune"]
    assert [path.suffix for path in (tmp_path / "trials").iterdir()] == [".json"]
    # One that has no time leaves nothing, and no check fails for it.
    monkeypatch.setattr(compress.pipeline.stage_benchmark, "_TIMEOUT_SECONDS", 0.01)
    assert benchmark_stages(short, place, tmp_path / "late", True, SilentProgress()) is None


def test_passes_over_the_examples() -> None:
    assert data_passes(Finetune(epochs=2.5), 100) == (100, 250)
    assert data_passes(Prune(heads=0.5, importance_examples=32), 100) == (32, 0)
    assert data_passes(Prune(heads=0.5, importance_examples=512), 100) == (100, 0)
    assert data_passes(Sparsify(sparsity=0.5), 100) == (0, 0)
    assert data_passes(SparsifyGradually(sparsity=0.5, epochs=2), 100) == (100, 200)


def test_what_a_trial_finds_wrong_with_the_data_is_a_problem_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"finetune": {"epochs": 9, "batch_size": 4}}, {"onnx": {}}]
    write_all(tmp_path, stages=stages)
    shutil.copy(tmp_path / "train.csv", tmp_path / "test.csv")

    def here(_command: list[str], *, input: str, **_: Any) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(input))
        stage_benchmark_process.main()

    monkeypatch.setattr(compress.pipeline.stage_benchmark.subprocess, "run", here)
    artifacts = tmp_path / "artifacts"
    with pytest.raises(InputError, match="also stand in the test split") as error:
        make_plan(read_recipe(tmp_path / "tiny.yaml"), tmp_path, None, artifacts, looks_into_model=True)
    assert "train.csv" in str(error.value.where) and not list((artifacts / "trials").iterdir())
