"""Tests of invalid recipes, data, models and disks: one error message, the right exit code, and no partial output."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import disks
import pytest
import tiny_run
import yaml
from disks import Filler
from safetensors import SafetensorError

from compress.models.model import TorchModel
from compress.pipeline.cache import Cache
from compress.pipeline.runner import StageRunner
from compress.tasks.registry import TASKS
from compress.utils.errors import StorageError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")
Refuse = Callable[..., str]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with model, data and recipe, which no test changes."""
    folder = tmp_path_factory.mktemp("pristine")
    tiny_run.write_all(folder)
    return folder


def replace_fields(path: Path, **changes: Any) -> None:
    """Replace top-level fields of a recipe."""
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}, sort_keys=False))


@pytest.mark.parametrize("command", ["run", "check"])
def test_all_recipe_problems_are_listed_together(place: Path, refuse: Refuse, command: str) -> None:
    replace_fields(place / "tiny.yaml", task="text-clasification", seed=-1, targets=["cpuu"])
    message = refuse(command, "tiny.yaml")
    assert "The recipe has 3 problems" in message
    for words in ("'text-classification'", "seed", "targets"):
        assert re.search(rf"tiny\.yaml:\d+: .*{words}", message), (words, message)


def rename_column(place: Path) -> None:
    lines = (place / "test.csv").read_text().splitlines()
    (place / "test.csv").write_text("\n".join(["sentence,label", *lines[1:]]))


def repeat_a_test_row(place: Path) -> None:
    row = (place / "test.csv").read_text().splitlines()[1]
    with (place / "train.csv").open("a") as file:
        file.write(row + "\n")


def other_labels(place: Path) -> None:
    shutil.rmtree(place / "model")
    tiny_run.write_model(place / "model", labels=("negative", "positive"))


def other_label_in_test(place: Path) -> None:
    with (place / "test.csv").open("a") as file:
        file.write("the film was what it was,neither\n")


def nan_in_weights(place: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(place / "model" / "model.safetensors")
    tensors["encoder.layer.1.intermediate.dense.weight"][3, 5] = torch.nan
    save_file(tensors, place / "model" / "model.safetensors", metadata={"format": "pt"})


def tokenizer_of_another_model(place: Path) -> None:
    path = place / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"more{index}": len(vocabulary) + index for index in range(50)}
    path.write_text(json.dumps(content))


def no_tokenizer(place: Path) -> None:
    for path in place.glob("model/*token*"):
        path.unlink()


def config_of_another_model(place: Path) -> None:
    config = json.loads((place / "model" / "config.json").read_text())
    (place / "model" / "config.json").write_text(json.dumps({**config, "hidden_size": 96}))


SPOILED: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (rename_column, ("test.csv", "'text'", "sentence")),
    (repeat_a_test_row, ("train", "test")),
    (other_labels, ("'bad'", "negative, positive")),
    (other_label_in_test, ("'neither'",)),
    (nan_in_weights, ("'encoder.layer.1.intermediate.dense.weight'", "1 of 8192 values", "NaN")),
    (tokenizer_of_another_model, ("tokenizer does not match", "134")),
    (no_tokenizer, ("no tokenizer", "Copy the files of the tokenizer")),
    (config_of_another_model, ("model cannot be loaded",)),
]


@pytest.mark.parametrize(("damage", "expected"), SPOILED, ids=[damage.__name__ for damage, _ in SPOILED])
def test_run_rejects_invalid_data_or_model(
    place: Path, refuse: Refuse, damage: Callable[[Path], None], expected: tuple[str, ...]
) -> None:
    damage(place)
    message = refuse("run", "tiny.yaml")
    for text in expected:
        assert text in message


def test_model_missing_locally_without_network_is_rejected(place: Path, tmp_path: Path) -> None:
    replace_fields(place / "tiny.yaml", model="no-such-owner/no-such-model")
    done = tiny_run.compress_anew("run", "tiny.yaml", folder=place, HF_HOME=str(tmp_path / "hub"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert "no-such-owner/no-such-model" in done.stderr
    assert "hf download" in done.stderr


@pytest.mark.parametrize("blocked", ["artifacts/cache", "artifacts/runs", "artifacts/runs/tiny"])
def test_file_in_place_of_artifacts_folder_is_rejected(place: Path, refuse: Refuse, blocked: str) -> None:
    (place / blocked).parent.mkdir(parents=True)
    (place / blocked).touch()
    message = refuse("run", "tiny.yaml", code=3)
    assert blocked in message
    assert "--artifacts" in message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 3 MB and return its folder."""
    with disks.mounted(tmp_path / "disk", megabytes=3) as disk:
        yield disk


def test_full_disk_in_each_stage_keeps_finished_stages(place: Path, small_disk: Path) -> None:
    recipe = tiny_run.load(place / "tiny.yaml")
    for index, label in enumerate(tiny_run.LABELS_OF_STAGES):
        filler = Filler(small_disk, f"] {label}")
        with pytest.raises(StorageError, match="The disk is full") as caught:
            StageRunner(recipe, place, small_disk, filler).run_all()
        assert caught.value.exit_code == 3
        assert "finished stages are kept" in str(caught.value)
        assert len(Cache(small_disk / "cache").entries()) == index
        assert Cache(small_disk / "cache").remove_partial() == 0
        filler.file.unlink()
    StageRunner(recipe, place, small_disk, tiny_run.Notes()).run_all()


def test_full_disk_while_saving_model_raises_no_space_error(pristine: Path, small_disk: Path) -> None:
    """The free space grows by 4096 bytes per attempt, so that saving fails once in each of the model's files."""
    model = TorchModel.load(pristine / "model", TASKS["text-classification"])
    failed_at: set[str] = set()
    target = small_disk / "target"
    for room in count(0, 4096):
        target.mkdir()
        filler = Filler(small_disk, "", room)
        filler.fill()
        try:
            model.save(target)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failed_at.add(Path(error.filename or error.filename2 or "").name)
        except SafetensorError as error:
            assert "No space left on device" in str(error)
            failed_at.add("model.safetensors")
        shutil.rmtree(target)
        filler.file.unlink()
    assert (target / "tokenizer.json").stat().st_size > 1000
    assert "model.safetensors" in failed_at
    assert len(failed_at) > 1


def test_disk_too_small_for_plan_is_rejected_before_run(place: Path, small_disk: Path) -> None:
    Filler(small_disk, "").fill()
    done = tiny_run.compress("run", "tiny.yaml", "--artifacts", small_disk, folder=place)
    assert done.returncode == 2
    assert "disk" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def artifact(place: Path, pristine: Path) -> Path:
    """Return an ONNX artifact of the recipe, exported without measuring."""
    exported_folder = pristine / "exported"
    recipe = tiny_run.load(pristine / "tiny.yaml", 'stages=[{"onnx": {}}]', "baseline=start")
    runner = StageRunner(recipe, pristine, exported_folder, tiny_run.Notes())
    runner.run_all()
    shutil.copytree(runner.results["onnx"].entry.folder, place / "made")
    return place / "made"


@pytest.mark.parametrize("command", ["evaluate", "bench"])
def test_missing_or_empty_artifact_is_rejected(place: Path, refuse: Refuse, command: str) -> None:
    (place / "empty").mkdir()
    assert "no model in 'empty'" in refuse(command, "empty")
    assert "no model in 'nowhere'" in refuse(command, "nowhere", "--recipe", "tiny.yaml")


@pytest.mark.parametrize("command", ["evaluate", "bench"])
def test_unusable_artifact_or_target_is_rejected(artifact: Path, refuse: Refuse, command: str) -> None:
    assert "--recipe" in refuse(command, "made")
    given = ("made", "--recipe", "tiny.yaml")
    assert "'gpuu'" in refuse(command, *given, "--target", "gpuu")
    assert "CUDAExecutionProvider" in refuse(command, *given, "--target", "gpu", code=3)
    assert ".onnx" in refuse(command, "model", "--recipe", "tiny.yaml")
    (artifact / "onnx" / "model.onnx").write_bytes(b"no graph at all")
    assert "model.onnx" in refuse(command, *given)
    for path in artifact.glob("*token*"):
        path.unlink()
    assert "tokenizer" in refuse(command, *given)
    (artifact / "config.json").write_text("{")
    assert "config.json" in refuse(command, *given)


def test_unknown_split_is_rejected(artifact: Path, refuse: Refuse) -> None:
    message = refuse("evaluate", "made", "--recipe", "tiny.yaml", "--split", "tests")
    assert "'tests'" in message
    assert "train, validation, test" in message


def test_report_of_missing_run_is_rejected(refuse: Refuse) -> None:
    assert "'nothing'" in refuse("report", "nothing")


@pytest.mark.parametrize("command", ["run", "check"])
def test_json_error_lists_the_problems_of_a_recipe(place: Path, here: Callable[..., Any], command: str) -> None:
    replace_fields(place / "tiny.yaml", task="text-clasification", seed=-1)
    done = here(command, "tiny.yaml", "--json", folder=place)
    assert done.returncode == 2 and "error: The recipe has 2 problems" in done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "RecipeError" and error["message"].startswith("The recipe has 2 problems")
    lines = (place / "tiny.yaml").read_text().splitlines()
    for problem in error["problems"]:
        assert lines[problem["line"] - 1].startswith(f"{problem['field']}:"), problem
        assert set(problem) == {"severity", "message", "file", "line", "field", "expected", "hint"}
        assert (problem["severity"], problem["file"]) == ("error", "tiny.yaml")
    assert {problem["field"]: problem["hint"] for problem in error["problems"]} == {
        "task": "did you mean 'text-classification'?",
        "seed": None,
    }


def test_json_error_lists_the_problems_of_data_with_positions(place: Path, here: Callable[..., Any]) -> None:
    for split, line in (("train", 2), ("test", 3)):
        lines = (place / f"{split}.csv").read_text().splitlines()
        lines[line - 1] = "," + lines[line - 1].rpartition(",")[2]
        (place / f"{split}.csv").write_text("\n".join(lines) + "\n")
    done = here("check", "tiny.yaml", "--json", folder=place)
    problems = json.loads(done.stdout)["error"]["problems"]
    assert done.returncode == 2
    positions = [(Path(problem["file"]).name, problem["line"]) for problem in problems]
    assert positions == [("train.csv", 2), ("test.csv", 3)]
    assert {problem["severity"] for problem in problems} == {"error"}


def test_json_error_has_the_line_of_the_field_that_names_missing_data(place: Path, here: Callable[..., Any]) -> None:
    (place / "test.csv").unlink()
    limits = "limits=[{metric: accuracy, at_least: 0.5}]"
    done = here("check", "tiny.yaml", "--json", "--set", limits, folder=place)
    (problem,) = json.loads(done.stdout)["error"]["problems"]
    assert (problem["file"], problem["field"]) == ("tiny.yaml", "data.splits.test")
    assert (place / "tiny.yaml").read_text().splitlines()[problem["line"] - 1].strip() == "test: test.csv"
    # A field given on the command line has no line.
    done = here("check", "tiny.yaml", "--json", "--set", "data.splits.test=none.csv", folder=place)
    (problem,) = json.loads(done.stdout)["error"]["problems"]
    assert (problem["file"], problem["line"]) == ("--set data.splits.test=none.csv", None)


@pytest.mark.parametrize("option", [("--format", "json"), ("--format=json",), ("--json",)])
def test_json_error_has_the_parts_of_the_message(
    option: tuple[str, ...], here: Callable[..., Any], tmp_path: Path
) -> None:
    done = here("report", "nothing", *option, folder=tmp_path)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 2 and set(error) == {"type", "message", "where", "expected", "hint", "problems"}
    (problem,) = error["problems"]
    assert (problem["message"], problem["hint"]) == (error["message"], error["hint"])
    assert done.stderr.splitlines()[-1].endswith(error["hint"] or error["expected"] or error["where"])


@pytest.mark.parametrize("arguments", [("run", "tiny.yaml", "--sett", "a=1"), ("run",), ("rum",)])
def test_unknown_option_or_command_prints_usage(
    arguments: tuple[str, ...], here: Callable[..., Any], tmp_path: Path
) -> None:
    done = here(*arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and "Usage: compress" in done.stderr
