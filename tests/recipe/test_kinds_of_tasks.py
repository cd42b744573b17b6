"""What a recipe may do with a task depends on its model, where that is here to tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.formats.registry import FORMATS
from compress.recipe.loading import read_recipe
from compress.recipe.recipe import Recipe
from compress.stages.registry import STAGES
from compress.tasks.registry import get_task
from compress.utils.errors import RecipeError

TRAINED = "[finetune, onnx, onnx_int8]"
FEW_BITS = "[onnx, {onnx_int8: {part: encoder}}]"
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
def test_only_what_names_each_frame_is_trained(tmp_path: Path, config: object, allowed: bool) -> None:
    if allowed:
        assert recipe(tmp_path, config, TRAINED).labels() == ("finetune", "onnx", "onnx_int8")
        return
    with pytest.raises(RecipeError, match="finetune, for automatic-speech-recognition"):
        recipe(tmp_path, config, TRAINED)


def test_a_model_that_is_not_here_may_be_of_any_kind(tmp_path: Path) -> None:
    assert recipe(tmp_path, None, FEW_BITS).labels() == ("onnx", "onnx_int8")


@pytest.mark.parametrize(
    ("config", "task", "written"),
    [
        (SPECTROGRAMS, "audio-classification", {"onnx", "ort", "openvino", "litert", "coreml", "executorch"}),
        (WAVES, "audio-classification", {"onnx", "ort", "openvino"}),
        (CTC, "automatic-speech-recognition", {"onnx", "ort", "openvino"}),
    ],
)
def test_formats_are_those_that_hold_sound_of_any_length(
    tmp_path: Path, config: dict[str, Any], task: str, written: set[str]
) -> None:
    kind = get_task(task).specialize(config)
    writers = {spec.written_by for spec in FORMATS.values() if spec.written_by}
    assert {writer for writer in writers if STAGES[writer].supports(kind.capabilities)} == written
    stages = "[finetune, litert]" if "litert" in written else "[finetune, onnx]"
    assert recipe(tmp_path, config, stages, task).labels()
    if "litert" not in written:
        with pytest.raises(RecipeError, match=f"litert, for {task}"):
            recipe(tmp_path / "other", config, "[finetune, litert]", task)


def test_a_broken_config_is_left_to_whoever_reads_the_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{")
    assert recipe(tmp_path, None, TRAINED).labels()
