"""Tests of the task of a recipe, given or inferred from the model's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml
from imported import packages_imported_by

from compress.formats.registry import FORMATS
from compress.pipeline.planning import make_plan
from compress.recipe.loading import dump_recipe, read_recipe, recipe_schema
from compress.recipe.recipe import Recipe
from compress.stages.registry import STAGES
from compress.tasks.registry import TASKS
from compress.utils.errors import RecipeError

TRAINED = "[finetune, onnx, onnx_int8]"
CTC = {"architectures": ["HubertForCTC"], "conv_dim": [8]}
WHISPER = {"architectures": ["WhisperForConditionalGeneration"]}
SPECTROGRAMS = {"architectures": ["ASTForAudioClassification"]}
WAVES = {"architectures": ["WavLMForSequenceClassification"], "conv_dim": [8]}


def recipe(folder: Path, config: object, stages: str, task: str = "automatic-speech-recognition") -> Recipe:
    if config is not None:
        (folder / "model").mkdir(parents=True)
        (folder / "model/config.json").write_text(json.dumps(config))
        (folder / "model/preprocessor_config.json").write_text("{}")
    for split in ("train", "test"):
        (folder / f"{split}.wav").write_bytes(b"sound of " + split.encode())
        row = {"audio": f"{split}.wav", "text": "words", "label": "high"}
        (folder / f"{split}.jsonl").write_text(json.dumps(row))
    lines = ["name: one", f"task: {task}", "model: model", "data: {splits: {train: train.jsonl, test: test.jsonl}}"]
    path = folder / "one.yaml"
    path.write_text("\n".join([*lines, f"stages: {stages}", "targets: [cpu]"]))
    return read_recipe(path)


@pytest.mark.parametrize(("config", "allowed"), [(CTC, True), (WHISPER, False), (None, True)])
def test_only_ctc_speech_models_can_be_trained(tmp_path: Path, config: object, allowed: bool) -> None:
    if allowed:
        assert recipe(tmp_path, config, TRAINED).labels() == ("finetune", "onnx", "onnx_int8")
        return
    with pytest.raises(RecipeError, match="finetune, for automatic-speech-recognition"):
        recipe(tmp_path, config, TRAINED)


@pytest.mark.parametrize(
    ("config", "task", "written"),
    [
        (SPECTROGRAMS, "audio-classification", {"onnx", "ort", "openvino", "litert", "coreml", "executorch"}),
        (WAVES, "audio-classification", {"onnx", "ort", "openvino"}),
        (CTC, "automatic-speech-recognition", {"onnx", "ort", "openvino"}),
    ],
)
def test_formats_for_audio_of_variable_length(
    tmp_path: Path, config: dict[str, Any], task: str, written: set[str]
) -> None:
    kind = TASKS[task].specialize(config)
    writers = {spec.written_by for spec in FORMATS.values() if spec.written_by}
    assert {writer for writer in writers if STAGES[writer].supports(kind.capabilities)} == written
    stages = "[finetune, litert]" if "litert" in written else "[finetune, onnx]"
    assert recipe(tmp_path, config, stages, task).labels()
    if "litert" not in written:
        with pytest.raises(RecipeError, match=f"litert, for {task}"):
            recipe(tmp_path / "other", config, "[finetune, litert]", task)


def test_broken_config_is_ignored_by_recipe_validation(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{")
    assert recipe(tmp_path, None, TRAINED).labels()


@pytest.fixture
def untyped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a recipe of a tiny classifier without `task`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    path = tiny_run.write_all(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("task:")))
    assert len(path.read_text().splitlines()) == len(lines) - 1
    return path


def set_architectures(folder: Path, names: list[str] | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = names
    (folder / "config.json").write_text(json.dumps(config))


def refusal(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    (problem,) = caught.value.problems
    assert (problem.field, problem.found) == ("task", "nothing")
    assert "text-classification, text-generation" in problem.expected
    return problem.expected


def test_task_is_inferred_from_the_model_config(untyped_recipe: Path, tmp_path: Path) -> None:
    set_architectures(tmp_path / "model", ["BertForSequenceClassification"])
    read = read_recipe(untyped_recipe)
    assert (read.task, read.task_is_inferred) == ("text-classification", True)
    assert make_plan(read, tmp_path, None, tmp_path).task_is_inferred
    # The recipe in a run's folder names it.
    (tmp_path / "own.yaml").write_text(dump_recipe(read))
    again = read_recipe(tmp_path / "own.yaml")
    assert again == read and not again.task_is_inferred
    assert "task: text-classification" in (tmp_path / "own.yaml").read_text()


def test_given_task_takes_precedence(untyped_recipe: Path, tmp_path: Path) -> None:
    set_architectures(tmp_path / "model", ["BertModel"])
    untyped_recipe.write_text(untyped_recipe.read_text() + "task: text-classification\n")
    read = read_recipe(untyped_recipe)
    assert (read.task, read.task_is_inferred) == ("text-classification", False)


def test_inferred_task_is_validated_like_a_given_one(untyped_recipe: Path, tmp_path: Path) -> None:
    set_architectures(tmp_path / "model", ["GPT2LMHeadModel"])
    with pytest.raises(RecipeError) as caught:
        read_recipe(untyped_recipe)
    assert any("for text-generation" in problem.found for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("columns", "stages", "expected"),
    [
        ({"text": "review", "label": "stars"}, ["onnx"], "one of text-classification, text-ranking"),
        (
            {"text": "review"},
            [{"finetune": {}}, "onnx"],
            "one of text-classification, text-ranking, fill-mask, text2text-generation",
        ),
        ({"tokens": "words"}, [{"finetune": {}}, "onnx"], "one of token-classification"),
        ({"words": "words"}, ["onnx"], "stages and data for feature-extraction"),
    ],
)
def test_stages_or_columns_that_the_inferred_task_lacks_ask_for_a_task(
    untyped_recipe: Path, tmp_path: Path, columns: dict[str, str], stages: list[object], expected: str
) -> None:
    set_architectures(tmp_path / "model", ["BertModel"])
    fields = yaml.safe_load(untyped_recipe.read_text())
    fields["data"]["columns"] = columns
    untyped_recipe.write_text(yaml.safe_dump(fields | {"stages": stages, "baseline": "start"}))
    with pytest.raises(RecipeError) as caught:
        read_recipe(untyped_recipe)
    (problem,) = caught.value.problems
    assert (problem.field, problem.expected) == ("task", expected)
    assert problem.found == "nothing, and the stages or data are not for feature-extraction, the model's task"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        *((names, "config.json names no architectures") for names in (None, [], "BertModel")),
        (["BertForNextSentencePrediction"], "architecture 'BertForNextSentencePrediction' has no known task"),
    ],
)
def test_configs_without_a_known_task(
    untyped_recipe: Path, tmp_path: Path, names: list[str] | None, words: str
) -> None:
    set_architectures(tmp_path / "model", names)
    assert words in refusal(untyped_recipe)


@pytest.mark.parametrize("reference", ["sample:minilm", "nobody/never-fetched"])
def test_remote_model_has_no_inferred_task(
    untyped_recipe: Path, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    untyped_recipe.write_text(untyped_recipe.read_text().replace("model: model", f"model: {reference}"))
    assert f"the model '{reference}' is not available yet to infer it" in refusal(untyped_recipe)


def test_broken_config_is_reported(untyped_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").write_text("{")
    assert "not valid JSON" in refusal(untyped_recipe)


def test_missing_model_and_task_are_both_reported(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: r\ndata: {}\nstages: [onnx]\n")
    with pytest.raises(RecipeError) as caught:
        read_recipe(tmp_path / "r.yaml")
    assert {"task", "model"} <= {problem.field for problem in caught.value.problems}


def test_schema_lists_task_names_and_requires_none() -> None:
    schema = recipe_schema()
    assert "task" not in schema["required"] and "model" in schema["required"]
    assert "text-classification" in schema["properties"]["task"]["enum"]


def test_task_inference_imports_no_heavy_package(untyped_recipe: Path, tmp_path: Path) -> None:
    set_architectures(tmp_path / "model", ["BertForSequenceClassification"])
    code = (
        "from pathlib import Path\nfrom compress.recipe.loading import read_recipe\n"
        "assert read_recipe(Path(sys.argv[1])).task_is_inferred"
    )
    imported = packages_imported_by(code, untyped_recipe)
    assert imported.isdisjoint({"torch", "transformers", "optimum", "huggingface_hub"})
