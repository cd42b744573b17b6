"""Tests of complete runs of a tiny recipe: files of a run, cache hits of later runs, limits and failures."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_run
import torch
from command_line import invoke
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from compress.pipeline.cache import Cache
from compress.pipeline.run import Run, run, with_absolute_paths
from compress.pipeline.runner import StageRunner
from compress.recipe.recipe import Recipe
from compress.utils.errors import InputError, IntegrityError, ModelError, StageError
from compress.utils.storage import digest_directory, size_bytes

LABELS = tiny_run.LABELS_OF_STAGES
BOTH = 'targets=["cpu", "gpu"]'

# The exporter's tracing emits these warnings; the command line silences them in `quiet_libraries`.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")


@dataclass
class Done:
    """A finished run, the notes it printed, and its artifacts folder."""

    run: Run
    said: list[str]
    artifacts: Path

    @property
    def cached(self) -> dict[str, bool]:
        return {stage.name: stage.cached for stage in self.run.report.stages}

    @property
    def digests(self) -> dict[str, str]:
        digests: dict[str, str] = json.loads((self.run.folder / "lock.json").read_text())["stages"]
        return digests


class StageResults(NamedTuple):
    """For each stage label, whether it was a cache hit, and the digest of its output."""

    cached: dict[str, bool]
    digests: dict[str, str]


def go(recipe: Path, artifacts: Path, *overrides: str) -> Done:
    notes = tiny_run.Notes()
    return Done(run(tiny_run.load(recipe, *overrides), recipe.parent, artifacts, notes), notes.said, artifacts)


def run_stages(recipe: Path, artifacts: Path, *overrides: str) -> StageResults:
    """Run the stages without measuring any model."""
    runner = StageRunner(tiny_run.load(recipe, *overrides), recipe.parent, artifacts, tiny_run.Notes())
    runner.run_all()
    return StageResults(
        {label: finished.record.cached for label, finished in runner.results.items()},
        {label: finished.entry.digest for label, finished in runner.results.items()},
    )


@pytest.fixture(scope="module")
def recipe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with model, data and recipe, which no test changes."""
    folder = tmp_path_factory.mktemp("place")
    tiny_run.write_all(folder)
    return folder


@pytest.fixture(scope="module")
def first(recipe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Run the recipe, with every stage measured and one target that is not available."""
    return go(recipe_folder / "tiny.yaml", tmp_path_factory.mktemp("first") / "artifacts", BOTH)


@pytest.fixture(scope="module")
def again(recipe_folder: Path, first: Done) -> Done:
    """Run the recipe a second time with the same cache."""
    return go(recipe_folder / "tiny.yaml", first.artifacts, BOTH)


@pytest.fixture
def warm_artifacts(first: Done, tmp_path: Path) -> Path:
    """Return a copy of the first run's artifacts, with a filled cache."""
    shutil.copytree(first.artifacts, tmp_path / "artifacts", symlinks=True)
    return tmp_path / "artifacts"


@pytest.fixture
def copy(recipe_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the recipe's folder that the test may change."""
    shutil.copytree(recipe_folder, tmp_path / "place")
    return tmp_path / "place"


def test_run_writes_expected_files(first: Done) -> None:
    folder = first.run.folder
    assert folder.parent == first.artifacts / "runs" / "tiny"
    assert (folder.parent / "latest").resolve() == folder.resolve()
    of_plugins = {"README.md", "bom.cdx.json", "provenance.json"}
    assert {path.name for path in folder.iterdir()} - of_plugins == {
        "recipe.yaml",
        "lock.json",
        "model",
        "predictions.parquet",
        "report.json",
        "report.md",
        "report.html",
        "run.log",
    }
    assert (folder / "model" / "config.json").is_file()
    assert [path.name for path in folder.rglob("*.onnx")] == ["model_quantized.onnx"]
    assert Cache(first.artifacts / "cache").remove_partial() == 0


def test_report_lists_licences_of_sources(first: Done) -> None:
    folder, report = first.run.folder, first.run.report
    assert {licensed.of for licensed in report.licences} >= {"model", "data train.csv", "runtime onnxruntime"}
    assert any(note.startswith("no licence is stated for model, data train.csv") for note in report.notes)
    for page in ("report.md", "report.html"):
        assert "runtime onnxruntime" in (folder / page).read_text()


def test_final_model_is_output_of_last_stage(first: Done) -> None:
    entry = Cache(first.artifacts / "cache").find(first.run.report.stages[-1].key)
    assert entry is not None
    assert digest_directory(first.run.folder / "model") == digest_directory(entry.folder)
    row = first.run.report.find("final", "size_bytes", "cpu")
    assert row is not None and row.value == size_bytes(first.run.folder / "model")


def test_run_folder_holds_resolved_recipe(recipe_folder: Path, first: Done, monkeypatch: Any) -> None:
    written = tiny_run.load(first.run.folder / "recipe.yaml")
    given = tiny_run.load(recipe_folder / "tiny.yaml", BOTH)
    assert written == with_absolute_paths(given, recipe_folder)
    assert written.model == str(recipe_folder / "model")
    assert written.data.splits == {split: str(recipe_folder / f"{split}.csv") for split in tiny_run.ROWS}
    assert written.stages == given.stages


def test_recipe_in_run_folder_reuses_cache(first: Done) -> None:
    done = run_stages(first.run.folder / "recipe.yaml", first.artifacts)
    assert all(done.cached.values())


def test_lock_has_seed_versions_and_digests(recipe_folder: Path, first: Done) -> None:
    lock = json.loads((first.run.folder / "lock.json").read_text())
    assert lock["seed"] == 0
    assert lock["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert lock["start"] == digest_directory(recipe_folder / "model")
    assert tuple(lock["stages"]) == LABELS
    assert set(lock["data"]) == set(tiny_run.ROWS)


def test_every_model_has_measurements(first: Done) -> None:
    report = first.run.report
    assert report.models == ("baseline", *LABELS[1:], "final")
    for model in report.models:
        metrics = {row.metric for row in report.measurements if row.model == model}
        assert {"accuracy", "f1", "agreement", "size_bytes", "parameters", "latency_ms", "startup_ms"} <= metrics
        assert {"peak_memory_bytes"} <= metrics
        accuracy = report.find(model, "accuracy", "cpu")
        assert accuracy is not None
        assert accuracy.n == tiny_run.ROWS["test"]


def test_reported_accuracy_is_that_of_final_file(recipe_folder: Path, first: Done) -> None:
    """The expected accuracy is counted with onnxruntime and the tokenizer, one row at a time.

    Dynamic INT8 scales depend on the whole batch, so that one or two borderline rows may differ from the report.
    """
    import onnxruntime
    from transformers import AutoTokenizer

    model = first.run.folder / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    labels = json.loads((model / "config.json").read_text())["id2label"]
    session = onnxruntime.InferenceSession(model / "onnx" / "model_quantized.onnx")
    names = [entry.name for entry in session.get_inputs()]
    right = 0
    lines = (recipe_folder / "test.csv").read_text().splitlines()[1:]
    for line in lines:
        text, label = line.rsplit(",", 1)
        inputs = tokenizer([text], return_tensors="np", truncation=True, max_length=16)
        (logits,) = session.run(["logits"], {name: inputs[name].astype("int64") for name in names})
        right += labels[str(int(logits[0].argmax()))] == label
    row = first.run.report.find("final", "accuracy", "cpu")
    assert row is not None
    assert abs(row.value * len(lines) - right) <= 2
    assert row.value > 0.8, "the toy task is learnable"


def test_stages_report_time_memory_and_integrity_checks(first: Done) -> None:
    report = first.run.report
    assert [stage.name for stage in report.stages] == list(LABELS)
    assert not any(stage.cached for stage in report.stages)
    assert all(stage.seconds > 0 and (stage.peak_rss_bytes or 0) > 50_000_000 for stage in report.stages)
    assert all(stage.check_seconds > 0 for stage in report.stages)
    assert {(check.stage, check.check) for check in report.integrity} >= {
        (label, check) for label in LABELS for check in ("weights finite", "saved and loaded", "predictions", "size")
    }


def test_unavailable_target_is_skipped_with_reason(first: Done) -> None:
    (skipped,) = first.run.report.skipped
    assert skipped.target == "gpu"
    assert "CUDAExecutionProvider" in skipped.reason
    assert f"target gpu: skipped, {skipped.reason}" in first.said
    gpu_metrics = {row.metric for row in first.run.report.measurements if row.target == "gpu"}
    assert gpu_metrics == {"size_bytes", "parameters", "bits_per_parameter"}, (
        "what would run there is written all the same"
    )


def test_second_run_reads_everything_from_cache(first: Done, again: Done) -> None:
    assert again.run.folder != first.run.folder
    assert again.cached == dict.fromkeys(LABELS, True)
    assert again.digests == first.digests
    remarks = [[stage.remarks for stage in done.run.report.stages] for done in (first, again)]
    assert remarks[0] == remarks[1] and any("logits differ by at most" in line for line in sum(remarks[0], ()))
    assert not any("epoch" in line for line in again.said)
    assert any("epoch" in line for line in first.said)
    timings = [[row for row in done.run.report.measurements if row.metric == "latency_ms"] for done in (first, again)]
    assert timings[0] == timings[1]
    assert any("earlier run" in note for note in again.run.report.notes)
    assert (again.run.folder.parent / "latest").resolve() == again.run.folder.resolve()


def test_changed_parameter_reruns_its_stage_and_later_ones(
    recipe_folder: Path, first: Done, warm_artifacts: Path
) -> None:
    done = run_stages(recipe_folder / "tiny.yaml", warm_artifacts, "stages.2.prune.feed_forward=0.25")
    assert [done.cached[label] for label in LABELS] == [index < 2 for index in range(len(LABELS))]
    assert all((done.digests[label] == first.digests[label]) == done.cached[label] for label in LABELS)


def test_changed_test_rows_repeat_measurement_only(copy: Path, first: Done, warm_artifacts: Path) -> None:
    rows = (copy / "test.csv").read_text().splitlines()
    (copy / "test.csv").write_text("\n".join(rows[:-10]) + "\n")
    done = go(copy / "tiny.yaml", warm_artifacts, "benchmark.every_stage=false")
    assert all(done.cached.values())
    row = done.run.report.find("final", "accuracy", "cpu")
    assert row is not None
    assert row.n == tiny_run.ROWS["test"] - 10


def test_same_data_in_other_file_format_reuses_cache(copy: Path, warm_artifacts: Path) -> None:
    for split in tiny_run.ROWS:
        rows = [line.rsplit(",", 1) for line in (copy / f"{split}.csv").read_text().splitlines()[1:]]
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        (copy / f"{split}.jsonl").write_text("\n".join(lines))
    splits = json.dumps({split: f"{split}.jsonl" for split in tiny_run.ROWS})
    assert all(run_stages(copy / "tiny.yaml", warm_artifacts, f"data.splits={splits}").cached.values())


def test_two_runs_without_cache_have_equal_digests(recipe_folder: Path, first: Done, tmp_path: Path) -> None:
    other = run_stages(recipe_folder / "tiny.yaml", tmp_path / "artifacts")
    assert not any(other.cached.values())
    assert other.digests == first.digests


@pytest.mark.slow
def test_remeasure_repeats_timings_only(recipe_folder: Path, first: Done, warm_artifacts: Path) -> None:
    notes = tiny_run.Notes()
    recipe = tiny_run.load(recipe_folder / "tiny.yaml", BOTH)
    report = run(recipe, recipe_folder, warm_artifacts, notes, remeasure=True).report
    assert all(stage.cached for stage in report.stages)
    old = first.run.report.find("final", "latency_ms", "cpu")
    new = report.find("final", "latency_ms", "cpu")
    assert old is not None and new is not None
    assert old.raw != new.raw
    assert not any("earlier run" in note for note in report.notes)


@pytest.mark.parametrize(("at_least", "code"), [(0.0, 0), (3.0, 1)])
def test_missed_limit_exits_with_1_and_complete_report(
    recipe_folder: Path, warm_artifacts: Path, at_least: float, code: int
) -> None:
    limits = f'limits=[{{"metric": "accuracy", "at_least": {at_least}, "of": "baseline"}}]'
    result = invoke(
        "run", recipe_folder / "tiny.yaml", "--artifacts", warm_artifacts, "--set", limits, "--set", BOTH, "--json"
    )
    assert result.exit_code == code, result.output
    report = json.loads(result.stdout)
    assert report["limits"][0]["passed"] is (code == 0)
    assert report == tiny_run.read_report(warm_artifacts)


@pytest.fixture
def other_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change the current folder to one that does not hold the recipe, and return it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_relative_model_path_is_searched_beside_recipe_then_in_current_folder(
    copy: Path, warm_artifacts: Path, other_folder: Path
) -> None:
    assert all(run_stages(copy / "tiny.yaml", warm_artifacts).cached.values())
    (copy / "model").rename(other_folder / "model")
    assert all(run_stages(copy / "tiny.yaml", warm_artifacts).cached.values())
    written = with_absolute_paths(tiny_run.load(copy / "tiny.yaml"), copy)
    assert written.model == str(other_folder / "model")


def test_absolute_paths_keep_split_and_sample_names(tmp_path: Path, other_folder: Path) -> None:
    for name in ("train", "student", "data"):
        (tmp_path / name).mkdir()
    for name in ("data/test.csv", "test.csv", "more.csv"):
        (tmp_path / name).touch()
    values = {
        "name": "r",
        "task": "text-classification",
        "model": "org/name",
        "data": {
            "source": "data",
            "splits": {"train": "train", "test": "test.csv", "validation": "more.csv"},
            "unlabeled": ["sample:snippets", "more.csv"],
        },
        "stages": [{"distill": {"student": {"model": "student"}}}],
    }
    resolved = with_absolute_paths(Recipe.model_validate(values), tmp_path)
    assert resolved.model == "org/name"
    assert resolved.data.source == str(tmp_path / "data")
    assert resolved.data.splits == {
        "train": "train",
        "test": str(tmp_path / "data" / "test.csv"),
        "validation": str(tmp_path / "more.csv"),
    }
    assert resolved.data.unlabeled == ("sample:snippets", str(tmp_path / "more.csv"))
    assert resolved.model_dump()["stages"][0]["student"]["model"] == str(tmp_path / "student")


def test_random_student_is_initialized_from_its_config(tmp_path: Path) -> None:
    student = {"model": "small", "random_weights": True}
    recipe = tiny_run.write_all(tmp_path, stages=[{"distill": {"student": student}}], baseline="start", seed=3)
    shutil.copytree(tmp_path / "model", tmp_path / "small")
    (tmp_path / "small/model.safetensors").unlink()
    runner = StageRunner(tiny_run.load(recipe), tmp_path, tmp_path / "artifacts", tiny_run.Notes())
    drawn = load_file(runner.inputs.resolve("small") / "model.safetensors")
    torch.manual_seed(3)
    expected = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "small")).state_dict()
    assert {name: tensor.tolist() for name, tensor in drawn.items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }
    assert runner.inputs.resolve("model") == tmp_path / "model", "the starting model is read as it is"
    read = tiny_run.load(recipe, "stages.0.distill.student.random_weights=false")
    with pytest.raises(ModelError, match="safetensors"):
        StageRunner(read, tmp_path, tmp_path / "artifacts", tiny_run.Notes()).inputs.resolve("small")


def test_model_name_cannot_be_both_loaded_and_random(tmp_path: Path) -> None:
    recipe = tiny_run.write_all(tmp_path, stages=[{"distill": {"student": {"model": "small", "random_weights": True}}}])
    overrides = ("model=small", "baseline=start")
    with pytest.raises(InputError, match=r"'small'[\s\S]*a student with random weights"):
        tiny_run.load(recipe, *overrides)
    given = tiny_run.load(recipe, "baseline=start").model_dump()
    with pytest.raises(ValidationError, match="for 'small', a student with random weights"):
        Recipe.model_validate({**given, "model": "small"})


def test_diverging_stage_stops_run_and_is_not_cached(recipe_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        go(recipe_folder / "tiny.yaml", tmp_path, "stages.0.finetune.learning_rate=1", "stages.0.finetune.epochs=20")
    assert Cache(tmp_path / "cache").entries() == []
    assert not (tmp_path / "runs" / "tiny" / "latest").exists()
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    assert {path.name for path in folder.iterdir()} == {"run.log", "recipe.yaml"}
    assert caught.value.what.splitlines()[0] in (folder / "run.log").read_text()


def test_integrity_failure_names_stage_and_keeps_earlier_ones(
    recipe_folder: Path, warm_artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.stages.base import OutputSpec
    from compress.stages.onnx_int8.stage import OnnxInt8

    monkeypatch.setattr(OnnxInt8, "output_spec", lambda self: OutputSpec(max_size_ratio=0.01))
    with pytest.raises(IntegrityError, match=r"'onnx_int8'.*the stage guarantees at most 1%") as caught:
        run_stages(recipe_folder / "tiny.yaml", warm_artifacts, "stages.5.onnx_int8.per_channel=false")
    assert caught.value.exit_code == 3
    monkeypatch.undo()
    done = run_stages(recipe_folder / "tiny.yaml", warm_artifacts, "stages.5.onnx_int8.per_channel=false")
    assert done.cached == {label: label != "onnx_int8" for label in LABELS}
