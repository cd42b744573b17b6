"""Tests of building bundles: manifest against the graph, token ids against transformers, and reproducible bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tokenizers
from huggingface_hub import ModelCard
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from toy_bundles import EMBEDDINGS, LABELS, MATRIX, changed_json, run_example, tokenizer, wanted_of
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from compress.cli import app
from compress.formats.onnx.model import OnnxModel
from compress.formats.ort.stage import to_ort
from compress.plugins.apps import app_types
from compress.plugins.apps.app_types import APP_TYPES, find_app_type
from compress.plugins.apps.build import Bundle, build
from compress.plugins.apps.text import Texts
from compress.plugins.apps.tokenizer_fallbacks import expand_whitespace_classes, to_page_tokenizer
from compress.plugins.apps.verify import verify
from compress.tasks.registry import TASK_NAMES, TASKS
from compress.tasks.text_classification import TextClassification
from compress.utils.errors import InputError, ModelError
from compress.utils.progress import SilentProgress

LINES = ["the film was great", "", "a boring plot, an awful cast", "zebra! ß 3.14", "très naïve 👍🏽 映画", "the " * 40]


def test_manifest_equals_graph_interface(made: Bundle) -> None:
    graph = onnx.load(made.folder / made.manifest.model).graph
    for entries, values in ((made.manifest.inputs, graph.input), (made.manifest.outputs, graph.output)):
        assert [entry.name for entry in entries] == [value.name for value in values]
        for entry, value in zip(entries, values, strict=True):
            kind = value.type.tensor_type
            assert entry.shape == tuple(axis.dim_param or axis.dim_value for axis in kind.shape.dim)
            assert entry.dtype == onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    assert made.manifest.postprocessing.labels == LABELS
    assert {entry.of for entry in made.manifest.licences} == {"model", "data sample:movie-reviews"}


def test_token_ids_equal_transformers(made: Bundle) -> None:
    processor = tokenizer()
    rule = Texts(made.folder, made.manifest.preprocessing)
    for line in LINES:
        assert rule.ids(line) == processor(line, truncation=True, max_length=16)["input_ids"]
    assert len(rule.ids(LINES[-1])) == 16


def test_same_model_gives_the_same_archive_bytes(made: Bundle, run: Path, tmp_path: Path) -> None:
    again = build(wanted_of(run, "android"), tmp_path / "elsewhere", SilentProgress())
    assert again.archive.read_bytes() == made.archive.read_bytes()
    with zipfile.ZipFile(made.archive) as opened:
        assert {entry.date_time for entry in opened.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_example_equals_closed_form_and_writes_no_files(made: Bundle, tmp_path: Path) -> None:
    text = "The film was lovely!"
    command = [sys.executable, str(made.folder / "examples" / "run.py")]
    alone = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    lines = subprocess.run([*command, text], env=alone, capture_output=True, text=True, check=True).stdout.split()
    # ONNX Runtime's telemetry would store a machine id and its events here.
    assert list(tmp_path.rglob("*")) == []
    verify(made.folder)
    logits = EMBEDDINGS[[2, 4, 5, 6, 9, 13, 3]].mean(axis=0) @ MATRIX
    shares = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-shares)
    assert lines == [word for index in order for word in (f"{shares[index]:.2%}", LABELS[index])]


def test_example_classifies_each_argument(made: Bundle) -> None:
    texts = ["The film was lovely!", "boring plot"]
    alone = [run_example(made.folder, text) for text in texts]
    assert alone[0] != alone[1]
    assert run_example(made.folder, *texts) == "".join(
        f"{text}\n{answer}" for text, answer in zip(texts, alone, strict=True)
    )


def test_help_of_the_example_names_packages_and_usage(made: Bundle) -> None:
    for option in ("--help", "-h"):
        text = run_example(made.folder, option)
        assert 'python examples/run.py "A lovely film."' in text and "pip install tokenizers numpy" in text
        assert "%" not in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"most_bytes": 1000}, "biggest, compressed: model/onnx/model.onnx"),
        ({"most_bytes": 1000}, "of the weights are float32: the stage onnx_int8"),
        ({"key": Path("no-such-key")}, "There is no such key"),
    ],
)
def test_refused_build_leaves_no_files(run: Path, tmp_path: Path, change: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError, match=re.escape(expected)):
        build(wanted_of(run, **change), tmp_path / "none", SilentProgress())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="The output is there already"):
        build(wanted_of(run), tmp_path / "none", SilentProgress())


def test_every_task_with_an_app_can_be_bundled() -> None:
    bundled_tasks = {name for name in TASK_NAMES if TASKS[name].app_steps}
    assert {find_app_type(name).name for name in bundled_tasks} == bundled_tasks
    assert len(APP_TYPES) == len(bundled_tasks)


def test_ort_format_is_bundled(run: Path, tmp_path: Path) -> None:
    phone = tmp_path / "phone"
    shutil.copytree(run, phone, ignore=shutil.ignore_patterns("onnx"))
    to_ort(OnnxModel.load(run / "model", "text-classification")).save(phone / "model")
    bundle = build(wanted_of(phone, "android"), tmp_path / "out", SilentProgress())
    assert (bundle.manifest.model, bundle.manifest.opsets) == ("model/model.ort", {})
    assert [entry.shape for entry in bundle.manifest.outputs] == [("batch", 2)]
    assert {path.name for path in (bundle.folder / "examples").iterdir()} == {"model.py", "run.py"}
    assert verify(bundle.archive).worst < 0.01
    with pytest.raises(InputError, match="for browser cannot hold a model of text-classification in the format ort"):
        build(wanted_of(phone, "browser"), tmp_path / "none", SilentProgress())


def test_bundle_keeps_provenance_and_measurements_of_the_run(run: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    row = {"model": "final", "metric": "accuracy", "target": "cpu", "value": 0.875, "unit": "fraction"}
    rows = [row, {**row, "target": "android", "value": 0.75}]
    (whole / "report.json").write_text(json.dumps({"schema": 1, "recipe": "toy", "measurements": rows}))
    lock = {"seed": 3, "start": "a" * 64, "data": {"test": "b" * 64}, "stages": {"onnx": "c" * 64}, "packages": {}}
    (whole / "lock.json").write_text(json.dumps(lock))
    (whole / "bom.cdx.json").write_text("{}")
    command = ["bundle", str(whole), "--target", "desktop", "-o", str(tmp_path / "out"), "--licence", "mit", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert {name: answer["provenance"][name] for name in lock} == lock
    assert answer["provenance"]["samples"].keys() == {"sample:minilm", "sample:movie-reviews"}
    assert answer["provenance"]["measured"] == {"accuracy on cpu": 0.875, "accuracy on android": 0.75}
    phone = build(wanted_of(whole, "android"), tmp_path / "phone", SilentProgress())
    assert phone.manifest.provenance.measured == {"accuracy on android": 0.75}
    for name, file in (("recipe_sha256", "recipe.yaml"), ("report_sha256", "report.json")):
        assert answer["provenance"][name] == hashlib.sha256((whole / file).read_bytes()).hexdigest()
    assert answer["licences"][0] == {"of": "model", "licence": "mit"}
    assert answer["files"]["bom.cdx.json"]["size_bytes"] == 2
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    # There are no measurements on the target "desktop", so that all are shown.
    assert "| Accuracy | cpu | 87.50% |" in card.text and "| Accuracy | android | 75.00% |" in card.text
    assert card.data.eval_results is None  # a hundred lines of front matter would hide the text
    again = CliRunner().invoke(app, ["verify", str(tmp_path / "out.zip"), "--json"])
    assert json.loads(again.stdout)["cases"] == 10


def test_label_count_must_match_the_graph(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    with changed_json(copy / "model" / "config.json") as config:
        config["id2label"] = {"0": "only"}
    with pytest.raises(ModelError, match="names 1 labels, and the graph gives 2 scores"):
        build(wanted_of(copy), tmp_path / "none", SilentProgress())


def test_texts_without_tokens_are_left_out_of_the_self_test(tmp_path: Path) -> None:
    """The tokenizer adds no special tokens, and graphs do not accept rows without tokens."""
    words = tokenizers.Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "dull": 2, "film": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    (tmp_path / "model").mkdir()
    words.save(str(tmp_path / "model" / "tokenizer.json"))
    processor = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    rule = Texts.find_rule(tmp_path, processor, 8)
    texts = Texts(tmp_path, rule)
    cases = texts.make_cases((), processor)
    assert len(cases) > 5 and all(case.input_ids for case in cases)
    assert [case.input_ids for case in texts.make_cases(("", "a dull film"), processor)] == [(1, 2, 3)]


class Sentiment(TextClassification):
    name = "sentiment"


def test_app_type_is_chosen_by_the_task_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "sentiment", Sentiment())
    assert app_types.find_app_type("sentiment") is app_types.find_app_type("text-classification")
    monkeypatch.setattr(Sentiment, "app_steps", None)
    with pytest.raises(InputError, match="no app for a model of sentiment"):
        app_types.find_app_type("sentiment")


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2009\u2028\u202f\u205f\u3000\ufeff\u180e\u200b"
ODD = [*SPACES, *"  aZß7½\u09ed\u0663Ⅻ①\U0001d7d8-'\u2019_[]\\", "'s", "👍🏽", "映画"]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES_ALONE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
STEPS: dict[str, Any] = {
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "runs of digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(), BYTES]),
    "bytes": BYTES,
    "qwen": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), behavior="isolated"), BYTES_ALONE]),
}
NODE = """
const [pattern, texts] = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(texts.map((text) => [...text.matchAll(new RegExp(pattern, "gu"))].map(([found]) => found))));
"""


def texts() -> list[str]:
    chance = random.Random(0)
    return ["".join(chance.choices(ODD, k=chance.randrange(1, 12))) for _ in range(2000)]


@pytest.mark.parametrize("name", STEPS)
def test_page_pretokenizer_equals_the_original(name: str) -> None:
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = STEPS[name]
    page_tokenizer = to_page_tokenizer(json.loads(whole.to_str()))
    again = Tokenizer.from_str(json.dumps(page_tokenizer))
    assert again.to_str() != whole.to_str()
    for text in texts():
        pieces = [piece for piece, _ in whole.pre_tokenizer.pre_tokenize_str(text)]
        assert [piece for piece, _ in again.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_expanded_whitespace_classes_match_in_javascript_as_in_rust(node: str) -> None:
    plain = r"\p{N}|\s+(?!\S)|[^\s\p{N}]+|\s+"
    expanded = expand_whitespace_classes(plain)
    rust = pre_tokenizers.Split(Regex(plain), behavior="isolated")
    right = [[piece for piece, _ in rust.pre_tokenize_str(text)] for text in texts()]
    matches = {}
    for pattern in (plain, expanded):
        given = json.dumps([pattern, texts()])
        done = subprocess.run(["node", "-e", NODE], input=given, capture_output=True, text=True, check=True)
        matches[pattern] = json.loads(done.stdout)
    assert matches[expanded] == right
    assert matches[plain] != right, "then nothing need be written out"


def test_texts_are_cut_to_the_positions_of_the_model(run: Path, tmp_path: Path) -> None:
    short = shutil.copytree(run, tmp_path / "run")
    config = json.loads((short / "model/config.json").read_text())
    (short / "model/config.json").write_text(json.dumps({**config, "max_position_embeddings": 12}))
    request = wanted_of(short)
    data = request.recipe.data.model_copy(update={"max_length": 512})
    recipe = request.recipe.model_copy(update={"data": data})
    bundle = build(wanted_of(short, recipe=recipe), tmp_path / "out", SilentProgress())
    assert bundle.manifest.preprocessing.max_length == 12
    assert (
        max(len(case["input_ids"]) for case in json.loads((bundle.folder / "selftest.json").read_text())["cases"]) == 12
    )
