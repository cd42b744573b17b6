"""Tests of `compress init`: task, columns and stages that it finds, its questions, and recipes that it writes."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphs
import pytest
import tiny_generation
import tiny_images
import tiny_run
import tiny_tasks
import yaml
from command_line import invoke, output_of
from mergeable import save_mergeable_llama
from onnx import helper

from compress.data.column_names import column_names, match_columns
from compress.data.config import DataConfig
from compress.recipe.initial_recipe import choose_task
from compress.recipe.loading import read_recipe
from compress.tasks.registry import TASKS
from compress.utils.errors import CompressError, InputError

MOST_LINES = 25


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an encoder without a head, and reviews in one file and in a file for each split."""
    folder = tmp_path_factory.mktemp("reviews")
    tiny_run.write_model(folder / "encoder")
    (folder / "splits").mkdir()
    tiny_run.write_rows(folder / "splits")
    (folder / "splits" / "validation.csv").rename(folder / "splits" / "dev.csv")
    rows = [line for path in sorted((folder / "splits").iterdir()) for line in path.read_text().splitlines()[1:]]
    (folder / "reviews.csv").write_text("review;sentiment\n" + "\n".join(row.replace(",", ";") for row in rows) + "\n")
    return folder


def checked(path: Path) -> dict[str, object]:
    """Return the fields of a recipe that is short and that `compress check` accepts."""
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES, text
    assert json.loads(output_of("check", str(path), "--json"))["recipe"]
    fields: dict[str, object] = yaml.safe_load(text)
    return fields


def test_folder_with_splits_becomes_a_short_valid_recipe(place: Path) -> None:
    written = output_of("init", "--model", "encoder", "--data", "splits", "--output", "mine.yaml")
    assert "compress check mine.yaml" in written and "compress run mine.yaml" in written
    fields = checked(place / "mine.yaml")
    assert (fields["name"], fields["task"], fields["model"]) == ("mine", "text-classification", "encoder")
    splits = {"train": "train.csv", "validation": "dev.csv", "test": "test.csv"}
    assert fields["data"] == {"source": "splits", "splits": splits}
    assert read_recipe(place / "mine.yaml").labels()[-2:] == ("onnx", "onnx_int8")
    assert fields["baseline"] == "finetune"


def test_the_model_may_be_an_argument(place: Path) -> None:
    output_of("init", "encoder", "--data", "splits", "--output", "one.yaml")
    output_of("init", "--model", "encoder", "--data", "splits", "--output", "two.yaml")
    one, two = (yaml.safe_load((place / name).read_text()) for name in ("one.yaml", "two.yaml"))
    assert one == {**two, "name": "one"}
    with pytest.raises(InputError, match="Two models are named: encoder and other"):
        invoke("init", "encoder", "--model", "other", "--data", "splits", "--output", "three.yaml")
    assert not (place / "three.yaml").exists()


def test_other_column_names_are_mapped(place: Path) -> None:
    output_of("init", "--model", "encoder", "--data", "reviews.csv")
    fields = checked(place / "reviews.yaml")
    assert fields["data"] == {"source": "reviews.csv", "columns": {"text": "review", "label": "sentiment"}}
    assert fields["task"] == "text-classification"


def test_named_columns_tell_the_task(place: Path) -> None:
    rows = (place / "reviews.csv").read_text().splitlines()[1:]
    (place / "tickets.csv").write_text("Beschreibung;Bereich\n" + "\n".join(rows) + "\n")
    error = refused("--model", "encoder", "--data", "tickets.csv", "--column", "text=Beschreibung")
    assert "--task text-classification --column text=Beschreibung --column label=Bereich" in str(error)
    output_of(
        "init", "--model", "encoder", "--data", "tickets.csv", "--column", "text=Beschreibung",
        "--column", "label=Bereich",
    )  # fmt: skip
    fields = checked(place / "tickets.yaml")
    assert fields["task"] == "text-classification"
    assert fields["data"] == {"source": "tickets.csv", "columns": {"text": "Beschreibung", "label": "Bereich"}}


def image_folder(folder: Path) -> None:
    tiny_images.write_class_folders(folder / "data")
    tiny_images.vit().save(folder / "model")


def rows_of(task: str) -> Callable[[Path], object]:
    return lambda folder: tiny_tasks.write_all(folder, task, [{"onnx": {}}])


KINDS: dict[str, Callable[[Path], object]] = {
    **{task: rows_of(task) for task in tiny_tasks.MAKERS},
    "image-classification": image_folder,
    "text-generation": tiny_generation.write_all,
}


@pytest.mark.parametrize("task", KINDS)
def test_task_is_inferred_and_its_recipe_passes_check(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    KINDS[task](tmp_path)
    data = "data" if (tmp_path / "data").is_dir() else "."
    output_of("init", "--model", "model", "--data", data, "--output", "mine.yaml")
    assert checked(tmp_path / "mine.yaml")["task"] == task


def test_class_folders_without_splits_and_a_note_beside_them_are_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path)
    (tmp_path / "data" / "train" / "note.txt").write_text("taken in May\n")
    output_of("init", "--model", "model", "--data", "data/train", "--output", "mine.yaml")
    assert checked(tmp_path / "mine.yaml")["data"] == {"source": "data/train"}


@pytest.mark.parametrize(("rows", "bound"), [(100, 0.82), (400, 0.91), (8000, 0.98)])
def test_limit_is_lowered_for_few_test_rows(rows: int, bound: float, place: Path) -> None:
    lines = [f"text {number},{('bad', 'good')[number % 2]}" for number in range(rows)]
    (place / "few.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    output_of("init", "--model", "encoder", "--data", "few.csv")
    # A fifth of the rows is the test split.
    assert checked(place / "few.yaml")["limits"] == [{"metric": "accuracy", "at_least": bound, "of": "baseline"}]


@pytest.mark.parametrize(("rows", "epochs"), [(281, 8), (400, 6), (2000, 2)])
def test_few_training_rows_get_more_epochs(rows: int, epochs: int, place: Path) -> None:
    lines = [f"text {number},{('bad', 'good')[number % 2]}" for number in range(rows)]
    (place / "few.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    output_of("init", "--model", "encoder", "--data", "few.csv")
    stages = yaml.safe_load((place / "few.yaml").read_text())["stages"]
    # At least 30 steps of 64 rows, of which seven in ten are for training.
    assert stages[0]["finetune"]["epochs"] == epochs


def test_note_names_columns_that_the_task_does_not_read(place: Path) -> None:
    rows = [f"a text {index},{index % 3}" for index in range(30)]
    Path("own.csv").write_text("\n".join(["description,section", *rows, ""]))
    command = ["init", "--model", "encoder", "--data", "own.csv"]
    written = " ".join(invoke(*command, "--output", "mine.yaml").output.split())
    assert "fill-mask does not read the columns section" in written
    option = "--task text-classification --column label=section"
    assert option in written
    written = invoke(*command, "--output", "other.yaml", *option.split()).output
    assert "text-classification" in written and "does not read" not in written


def test_hint_for_other_columns_is_a_command_that_works(place: Path) -> None:
    lines = [f"so {number};{('gut', 'schlecht')[number % 2]}" for number in range(90)]
    (place / "k.csv").write_text("\n".join(["Kommentar;Note", *lines]) + "\n")
    with pytest.raises(InputError) as caught:
        output_of("init", "--model", "encoder", "--data", "k.csv")
    assert caught.value.what == "The columns of k.csv do not tell the task: Kommentar, Note."
    assert caught.value.hint is not None
    options = caught.value.hint.removeprefix("for another task: ").split()
    assert options == ["--task", "text-classification", "--column", "text=Kommentar", "--column", "label=Note"]
    output_of("init", "--model", "encoder", "--data", "k.csv", *options)
    assert checked(place / "k.yaml")["data"]["columns"] == {"text": "Kommentar", "label": "Note"}


def test_sample_is_named_by_its_splits(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.data.layout.cached_directory", lambda name: place / "splits")
    (place / "splits" / "dev.csv").rename(place / "splits" / "validation.csv")
    output_of("init", "--model", "encoder", "--data", "sample:movie-reviews", "--output", "whole.yaml")
    assert read_recipe(place / "whole.yaml").data == DataConfig(source="sample:movie-reviews")
    (place / "splits" / "validation.csv").unlink()
    output_of("init", "--model", "encoder", "--data", "sample:movie-reviews", "--output", "two.yaml")
    assert yaml.safe_load((place / "two.yaml").read_text())["data"]["splits"] == {"train": "train", "test": "test"}


def test_onnx_file_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx_graphs.write_classifier(tmp_path, 32, 2)
    output_of("init", "--model", "onnx/model.onnx", "--output", "mine.yaml")
    fields = checked(tmp_path / "mine.yaml")
    assert fields["task"] == "graph-agreement" and "data" not in fields
    assert fields["stages"] == [{"onnx_int8": {"error_ceiling": 0.05}}]


@pytest.mark.parametrize(("rows", "method"), [(8, "static"), (8000, None)])
def test_graph_of_convolutions_is_quantized_statically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, method: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    kernel, head = np.ones((8, 4, 3), np.float32), np.ones((rows, 2), np.float32)
    nodes = [
        helper.make_node("ConvTranspose" if rows == 8 else "Conv", ["x", "kernel"], ["features"]),
        helper.make_node("MatMul", ["y", "head"], ["scores"]),
    ]
    weights = {"kernel": kernel if rows != 8 else kernel.transpose(1, 0, 2), "head": head}
    inputs, outputs = {"x": ["n", 4, 16], "y": ["n", rows]}, {"features": None, "scores": ["n", 2]}
    onnx.save(onnx_graphs.onnx_model(nodes, inputs, outputs, weights), "graph.onnx")
    result = invoke("init", "--model", "graph.onnx", "--output", "mine.yaml")
    assert ("because dynamic quantization leaves convolutions in float" in result.stderr) == (method is not None)
    assert ("random inputs; --data names a folder" in result.stderr) == (method is not None)
    fields = checked(tmp_path / "mine.yaml")["stages"]
    assert fields == [{"onnx_int8": {**({"method": method} if method else {}), "error_ceiling": 0.05}}]


def test_target_decides_the_stages_and_where_limits_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_generation.write_texts(tmp_path)
    save_mergeable_llama(tmp_path / "model")
    output_of("init", "--model", "model", "--data", ".", "--target", "llama-cpp", "--output", "mine.yaml")
    fields = checked(tmp_path / "mine.yaml")
    assert fields["targets"] == ["llama-cpp"]
    assert fields["stages"] == ["imatrix", {"gguf": {"type": "Q4_K_M"}}]
    assert fields["limits"] == [{"metric": "perplexity", "at_most": 1.35, "of": "baseline", "target": "llama-cpp"}]


def test_paths_are_relative_to_the_recipe(place: Path) -> None:
    (place / "recipes").mkdir()
    output_of("init", "--model", "encoder", "--data", "splits", "--output", "recipes/mine.yaml")
    fields = checked(place / "recipes" / "mine.yaml")
    assert fields["model"] == "../encoder"


def test_full_recipe_explains_every_field_and_means_the_same(place: Path) -> None:
    arguments = ("init", "--model", "encoder", "--data", "splits", "--name", "mine")
    output_of(*arguments, "--output", "short.yaml")
    output_of(*arguments, "--output", "full.yaml", "--full")
    assert read_recipe(place / "full.yaml") == read_recipe(place / "short.yaml")
    assert len((place / "full.yaml").read_text().splitlines()) > 200


def test_json_has_the_recipe_and_the_next_commands(place: Path) -> None:
    done = json.loads(output_of("init", "--model", "encoder", "--data", "reviews.csv", "--json"))
    assert done["file"] == "reviews.yaml"
    assert done["recipe"] == (place / "reviews.yaml").read_text()
    assert done["columns"] == {"text": "review", "label": "sentiment"}
    assert done["next"] == ["compress check reviews.yaml", "compress run reviews.yaml"]


def refused(*arguments: str) -> CompressError:
    """Return the error of a command, which asks nothing and writes no file."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(InputError) as caught:
        invoke("init", *arguments)
    assert sorted(Path().rglob("*")) == before
    assert caught.value.exit_code == 2
    return caught.value


def test_missing_value_in_a_pipe_is_an_error_that_names_the_flag(place: Path) -> None:
    assert "--model is missing" in refused("--data", "reviews.csv").what
    assert "--data is missing" in refused("--model", "encoder").what


def test_existing_file_is_kept_without_force(place: Path) -> None:
    (place / "reviews.yaml").write_text("mine")
    assert "exists already" in refused("--model", "encoder", "--data", "reviews.csv").what
    assert (place / "reviews.yaml").read_text() == "mine"
    output_of("init", "--model", "encoder", "--data", "reviews.csv", "--force")
    assert read_recipe(place / "reviews.yaml").name == "reviews"


def test_unknown_task_and_target_are_refused_with_the_nearest_name(place: Path) -> None:
    arguments = ("--model", "encoder", "--data", "reviews.csv")
    assert "'text-classification'" in refused(*arguments, "--task", "text-clasification").what
    assert "did you mean 'ios'" in str(refused(*arguments, "--target", "iso"))


def test_column_without_a_match_is_refused_and_can_be_named(place: Path) -> None:
    (place / "stars.csv").write_text((place / "reviews.csv").read_text().replace("sentiment", "verdict"))
    arguments = ("--model", "encoder", "--data", "stars.csv", "--task", "text-classification")
    error = refused(*arguments)
    assert "no column for label" in error.what
    assert "--column label=NAME" in str(error) and "review, verdict" in str(error)
    assert "no column 'verdit'. Did you mean 'verdict'?" in refused(*arguments, "--column", "label=verdit").what
    output_of("init", *arguments, "--column", "label=verdict")
    assert read_recipe(place / "stars.yaml").data.columns == {"text": "review", "label": "verdict"}


def test_model_that_is_not_here_is_not_fetched(place: Path) -> None:
    error = refused("--model", "my-org/my-encoder", "--data", "reviews.csv")
    assert error.hint == "run `hf download my-org/my-encoder`, or name the task with --task"
    output_of("init", "--model", "my-org/my-encoder", "--data", "reviews.csv", "--task", "text-classification")
    assert read_recipe(place / "reviews.yaml").model == "my-org/my-encoder"


def test_folder_without_test_split_is_refused(place: Path) -> None:
    (place / "splits" / "test.csv").unlink()
    error = refused("--model", "encoder", "--data", "splits")
    assert "dev.csv" in error.what and "nothing for test" in error.what


def test_missing_data_is_refused(place: Path) -> None:
    assert "There is no file or folder 'nowhere.csv'" in refused("--model", "encoder", "--data", "nowhere.csv").what


def test_terminal_asks_for_missing_values(place: Path) -> None:
    """The model and the data are proposed from the current folder, and the matched columns are confirmed."""
    shutil.rmtree(place / "splits")
    terminal, inner = pty.openpty()
    os.write(terminal, b"\n\n\n")
    process = subprocess.Popen(
        tiny_run.command("init"), cwd=place, stdin=inner, stdout=inner, stderr=inner, env=tiny_run.surroundings()
    )
    os.close(inner)
    assert process.wait(60) == 0
    shown = os.read(terminal, 1 << 16).decode()
    assert "[encoder]" in shown and "[reviews.csv]" in shown
    assert "Read 'review' as text and 'sentiment' as label?" in shown
    assert read_recipe(place / "reviews.yaml").data.columns == {"text": "review", "label": "sentiment"}


@pytest.mark.parametrize(
    ("model_task", "names", "task"),
    [
        ("feature-extraction", ("text", "label"), "text-classification"),
        ("feature-extraction", ("Review Text", "text", "class"), "text-classification"),
        ("feature-extraction", ("text", "pair"), "feature-extraction"),
        ("feature-extraction", ("query", "passage", "label"), "text-ranking"),
        ("feature-extraction", ("id", "tokens", "ner_tags"), "token-classification"),
        ("fill-mask", ("question", "context", "answers"), "question-answering"),
        ("fill-mask", ("text", "label"), "text-classification"),
        ("fill-mask", ("text",), "fill-mask"),
        ("text-generation", ("text", "label"), "text-generation"),
        ("text-classification", ("tokens", "tags"), "text-classification"),
        ("image-feature-extraction", ("image", "label"), "image-feature-extraction"),
        ("text2text-generation", ("source", "target"), "text2text-generation"),
        (None, ("image", "label"), "image-classification"),
        (None, ("audio", "label"), "audio-classification"),
        (None, ("audio", "text"), "automatic-speech-recognition"),
        (None, ("text",), "text-generation"),
        (None, ("a", "b"), None),
        ("feature-extraction", (), "feature-extraction"),
    ],
)
def test_columns_decide_the_task_of_a_model_without_a_head(
    model_task: str | None, names: tuple[str, ...], task: str | None
) -> None:
    assert choose_task(model_task, names) == task


def test_equal_names_come_before_synonyms() -> None:
    columns = TASKS["text2text-generation"].columns
    assert match_columns(columns, ("target", "question", "text")) == ({"text": "text", "target": "target"}, [])
    assert match_columns(columns, ("Question", "Answer")) == ({"text": "Question", "target": "Answer"}, [])
    assert match_columns(columns, ("text",)) == ({"text": "text"}, ["target"])


def test_column_names_come_from_the_head_of_a_large_file(tmp_path: Path) -> None:
    """The rest of the file, here invalid, is not read."""
    path = tmp_path / "large.csv"
    path.write_bytes("﻿Größe;text\n".encode() + b'1;"a"\n' * 20_000 + b'2;"open\n')
    assert column_names(path) == ("Größe", "text")
    path = tmp_path / "large.jsonl"
    path.write_text('{"text": "a", "label": 1}\n' * 10_000 + "{")
    assert column_names(path) == ("text", "label")
