"""Tests of unusable models, recordings and images: the error names the cause, without a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_generation
import tiny_images
import tiny_run
import tiny_speech
import yaml
from stage_context import write_recipe

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")
KINDS = ("text", "chat", "speech", "images")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one recipe folder for each kind of model, which no test changes."""
    root = tmp_path_factory.mktemp("pristine")
    tiny_run.write_all(root / "text", stages=[{"finetune": {"epochs": 1}}], baseline="start")
    tiny_generation.write_all(root / "chat")
    (root / "speech").mkdir()
    write_recipe(root / "speech", tiny_speech.TASK, tiny_speech.write_speech(root / "speech"), ["onnx"])
    tiny_images.vit().save(_made(root / "images" / "model"))
    tiny_images.write_class_folders(root / "images")
    write_recipe(root / "images", tiny_images.TASK, {"train": "./train", "test": "./test"}, ["onnx"])
    return root


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def change(config: Mapping[str, Any], *without: str) -> Callable[[Path], None]:
    """Return a function that updates the model's config with ``config`` and removes the fields in ``without``."""

    def spoil(place: Path) -> None:
        path = place / "model" / "config.json"
        content = {name: value for name, value in json.loads(path.read_text()).items() if name not in without}
        path.write_text(json.dumps({**content, **config}))

    return spoil


def model_with_custom_code(place: Path) -> None:
    change({"model_type": "pony", "auto_map": {"AutoConfig": "pony.Pony", "AutoModel": "pony.PonyModel"}})(place)
    (place / "model" / "pony.py").write_text("raise SystemExit('it ran')\n")


def tokenizer_with_custom_code(place: Path) -> None:
    path = place / "model" / "tokenizer_config.json"
    named = {"tokenizer_class": "Pony", "auto_map": {"AutoTokenizer": ["pony.Pony", None]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
    (place / "model" / "tokenizer.json").unlink()
    (place / "model" / "pony.py").write_text("raise SystemExit('it ran')\n")


def recording_of_zero_samples(place: Path) -> None:
    import numpy as np
    import soundfile

    soundfile.write(place / "test-3.flac", np.zeros(0, np.float32), 16_000, format="WAV")


def recording_file_of_zero_bytes(place: Path) -> None:
    (place / "test-3.flac").write_bytes(b"")


def row_without_image(place: Path) -> None:
    rows = [{"image": None if index == 2 else str(path), "label": path.parent.name} for index, path in
            enumerate(sorted((place / "test").rglob("*.png")))]  # fmt: skip
    _use_test_rows(place, rows)


def rows_of_missing_images(place: Path) -> None:
    _use_test_rows(place, [{"image": f"lost-{index}.png", "label": "above"} for index in range(4)])


def _use_test_rows(place: Path, rows: list[dict[str, Any]]) -> None:
    (place / "test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    recipe = yaml.safe_load((place / "tiny.yaml").read_text())
    recipe["data"]["splits"]["test"] = "test.jsonl"
    (place / "tiny.yaml").write_text(yaml.safe_dump(recipe))


class Case(NamedTuple):
    """A kind of model, the function that damages its folder, parts of the error, and the commands that report it."""

    kind: str
    spoil: Callable[[Path], None]
    said: tuple[str, ...]
    seen_by: tuple[str, ...] = ("run", "check")


CASES = {
    "no model_type": Case("text", change({}, "model_type"), ("no model_type", "config.json")),
    "a newer transformers": Case(
        "text",
        change({"model_type": "bert9", "transformers_version": "9.1.0"}),
        ("has no architecture 'bert9'", "written by 9.1.0", "pip install -U transformers"),
    ),
    "code of its own": Case("chat", model_with_custom_code, ("Python files of its own", "trust_remote_code: true")),
    "a tokenizer's code": Case(
        "text", tokenizer_with_custom_code, ("tokenizer", "pony.Pony", "trust_remote_code: true"), ("run",)
    ),
    "a size missing": Case("text", change({}, "hidden_size"), ("cannot be loaded",), ("run",)),
    "a size of no number": Case("text", change({"num_hidden_layers": "two"}), ("num_hidden_layers",), ("run",)),
    "nothing for a size": Case(
        "chat", change({"num_key_value_heads": None, "hidden_size": None}), ("config.json", "hidden_size")
    ),
    "no heads": Case("chat", change({"num_attention_heads": 0}), ("config.json", "num_attention_heads")),
    "audio of no length": Case("speech", recording_of_zero_samples, ("recording is empty", "test-3.flac"), ("run",)),
    "an empty file": Case("speech", recording_file_of_zero_bytes, ("test-3.flac is empty",), ("run",)),
    "captions without pictures": Case("images", row_without_image, ("'image'", "1 of 16", "test.jsonl"), ("run",)),
    "pictures that are lost": Case("images", rows_of_missing_images, ("lost-0.png cannot be read",), ("run",)),
}


@pytest.mark.parametrize("name", CASES)
def test_unusable_model_or_media_is_named_in_error(
    pristine: Path, tmp_path: Path, here: Callable[..., Any], name: str
) -> None:
    case = CASES[name]
    folder = shutil.copytree(pristine / case.kind, tmp_path / "place")
    case.spoil(folder)
    for command in case.seen_by:
        done = here(command, "tiny.yaml", folder=folder)
        assert done.returncode in (2, 3) and done.stderr.count("error: ") == 1, done.stderr
        assert "Traceback" not in done.stderr and all(text in done.stderr for text in case.said), done.stderr
    assert here("inspect", "model", folder=folder).returncode == 0, "weights are there all the same"
    assert not list(folder.glob("artifacts/runs/*/latest"))


def test_max_positions_of_minus_one_means_unlimited(pristine: Path, tmp_path: Path) -> None:
    from compress.models.config_checks import max_positions
    from compress.pipeline.run_checks import check_running_text
    from compress.pipeline.runner import StageRunner

    folder = shutil.copytree(pristine / "chat", tmp_path / "place")
    change({"max_position_embeddings": -1})(folder)
    check_running_text(StageRunner(tiny_run.load(folder / "tiny.yaml"), folder, folder / "artifacts", tiny_run.Notes()))
    assert max_positions({"max_position_embeddings": -1}) is None
    assert max_positions({"text_config": {"max_position_embeddings": 9}}) == 9
