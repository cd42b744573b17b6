"""The first `check` in an empty folder finds bad data files, limits and images, all at once."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny_images
import tiny_run

import compress
from compress.utils.errors import InputError

Content = Callable[[Path], bytes]
STAGES = [{"finetune": {"epochs": 1}}, {"onnx": {}}]
ROWS = "".join(f"valid text {number},{('bad', 'good')[number % 2]}\n" for number in range(20))
HEADER = "text,label\n"


def text(content: str, encoding: str = "utf-8") -> Content:
    """Return a file's content that does not depend on the folder."""
    return lambda folder: content.encode(encoding)


def repeated_row(folder: Path) -> bytes:
    """Return a file whose third line repeats a row of the test split."""
    return f"{HEADER}only here,bad\n{(folder / 'test.csv').read_text().splitlines()[5]}\n".encode()


def parquet(labels: list[Any], end: int | None = None) -> Content:
    """Return a Parquet file, cut off at ``end``."""
    file = io.BytesIO()
    pa.parquet.write_table(pa.table({"text": [f"row {index}" for index in range(len(labels))], "label": labels}), file)
    return lambda folder: file.getvalue()[:end]


BAD_FILES: dict[str, tuple[str, Content, str]] = {
    # The six files of the review.
    "empty text": ("csv", text(f"{HEADER}{ROWS},good\n"), "'text' has 1 of 21 values missing or empty"),
    "empty label": ("csv", text(f"{HEADER}a,\n{ROWS}"), "'label' has 1 of 21 values missing or empty"),
    "undecodable": ("csv", text(f"{HEADER}\x81é,bad\n", "latin-1"), "is neither UTF-8 nor Windows-1252"),
    "open quote": ("tsv", text('text\tlabel\na\tbad\n"b\tgood\n'), "cannot be parsed"),
    "objects": ("jsonl", text('{"text": {"en": "a"}, "label": "bad"}\n'), "'text' has a value of type dict"),
    "test row": ("csv", repeated_row, "also occur in the test split"),
    # Ten further kinds.
    "repeated column": ("csv", text("text,label,text\na,bad,b\n"), "has the column 'text' twice"),
    "ragged row": ("csv", text(f"{HEADER}{ROWS}one, two,bad\n"), "has a row with 3 fields"),
    "header only": ("csv", text(HEADER), "has a header and no rows"),
    "empty file": ("csv", text(""), "is empty"),
    "NaN label": ("parquet", parquet([0.0, float("nan"), 1.0]), "'label' has 1 of 3 values missing or empty"),
    "truncated Parquet": ("parquet", parquet(["bad", "good"], -9), "is not a complete Parquet file"),
    "invalid JSON": ("jsonl", text('{"text": "a", "label": "bad"}\n{"text": "b",\n'), "has a line that is not JSON"),
    "mixed types": ("json", text('[{"text": "a", "label": 1}, {"text": 2, "label": 0}]'), "has a value of type int"),
    "NUL bytes": ("csv", text(f"{HEADER}a\0b,bad\n"), "it has NUL bytes"),
    "label not in train": ("csv", text(f"{HEADER}{ROWS}a,neutral\n"), "'neutral' is not among the labels"),
}
"""Kind of bad file: suffix, content and words of its problem."""
LINES = {
    "empty text": 22,
    "empty label": 2,
    "undecodable": 2,
    "open quote": 3,
    "objects": 1,
    "test row": 3,
    "ragged row": 22,
    "invalid JSON": 2,
    "NUL bytes": 2,
    "label not in train": 22,
}
"""Line of the problem, where it has one."""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small text model, data and a recipe, which no test changes."""
    folder = tmp_path_factory.mktemp("pristine")
    tiny_run.write_all(folder, stages=STAGES)
    return folder


@pytest.fixture
def place(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "place")


def refusal(place: Path, **fields: Any) -> InputError:
    """Return the error of the first check of the recipe with other fields; nothing is written."""
    recipe = tiny_run.write_recipe(place, **{"stages": STAGES, **fields})
    before = sorted(place.rglob("*"))
    with pytest.raises(InputError) as caught:
        compress.check(recipe, artifacts=place / "artifacts")
    assert sorted(place.rglob("*")) == before and caught.value.exit_code == 2
    return caught.value


def with_files(kinds: list[str], place: Path) -> dict[str, Any]:
    """Write bad files and return the `data` section with a split for each of them."""
    splits = {split: f"{split}.csv" for split in ("train", "test")}
    for number, kind in enumerate(kinds):
        suffix, content, _ = BAD_FILES[kind]
        (place / f"bad{number}.{suffix}").write_bytes(content(place))
        splits[f"split{number}"] = f"bad{number}.{suffix}"
    return {"splits": splits, "max_length": 16}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_first_check_finds_bad_file(kind: str, place: Path) -> None:
    error = refusal(place, data=with_files([kind], place))
    (record,) = error.problem_records()
    assert BAD_FILES[kind][2] in str(record["message"])
    assert Path(str(record["file"])).name == f"bad0.{BAD_FILES[kind][0]}" and record["line"] == LINES.get(kind)


def test_first_check_finds_all_bad_files_at_once(place: Path) -> None:
    records = refusal(place, data=with_files(list(BAD_FILES), place)).problem_records()
    assert len(records) == len(BAD_FILES) == 16
    for number, (kind, (_, _, words)) in enumerate(BAD_FILES.items()):
        (record,) = (record for record in records if Path(str(record["file"])).name.startswith(f"bad{number}."))
        assert words in str(record["message"]) and record["line"] == LINES.get(kind)


def test_single_class_is_found(place: Path) -> None:
    (place / "train.csv").write_text("text,label\n" + "".join(f"text {number},good\n" for number in range(20)))
    assert "a single class, 'good'" in str(refusal(place))


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"metric": "acuracy", "at_least": 0.9}, "Did you mean 'accuracy'?"),
        ({"metric": "latency", "at_most": 5}, "Did you mean 'latency_ms'?"),
        ({"metric": "perplexity", "at_most": 5}, "'perplexity', which no run of this recipe measures"),
        ({"metric": "accuracy", "at_least": 98.5, "of": "baseline"}, "98.5 percent is 0.985"),
        ({"metric": "accuracy", "at_least": 0.99, "of": "baseline"}, "cannot be tested with 60 test rows"),
    ],
)
def test_first_check_and_run_refuse_limit_that_cannot_be_judged(limit: dict[str, Any], words: str, place: Path) -> None:
    assert words in str(refusal(place, limits=[limit]))
    with pytest.raises(InputError) as caught:
        compress.run(place / "tiny.yaml", artifacts=place / "artifacts")
    assert words in str(caught.value)
    assert not list(place.glob("artifacts/cache/*/content")) and not list(place.glob("artifacts/runs/*/latest"))


def plan_of(place: Path, rows: dict[str, list[str]]) -> Any:
    """Return the plan for data with the labels of each split."""
    for split, labels in rows.items():
        lines = (f"text {number} of {split},{label}" for number, label in enumerate(labels))
        (place / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return compress.check(place / "tiny.yaml", artifacts=place / "artifacts")


def test_plan_warns_of_dates_and_of_classes_that_are_not_tested(place: Path) -> None:
    splits = ("train", "validation", "test")
    plan = plan_of(place, {split: [f"2024-01-{10 + number % 4}" for number in range(80)] for split in splits})
    assert "4 classes for 240 rows, such as '2024-01-10'; dates" in plan.data_warnings[0]
    plan = plan_of(place, {split: ["a", "b", "c"][: 3 if split == "train" else 2] * 20 for split in splits})
    assert any("c (in train)" in warning for warning in plan.data_warnings)
    assert "60 train, 40 validation, 40 test rows" in plan.data[0]


def test_five_thousand_classes_are_checked_in_seconds(place: Path) -> None:
    classes = [f"class {number}" for number in range(5000)]
    plan = plan_of(place, {"train": classes * 2, "validation": classes[:10], "test": classes})
    assert "5,000 classes for 15,010 rows" in plan.data_warnings[0]
    (place / "test.csv").write_text("text,label\nany,new\n")
    text = str(refusal(place))
    assert "'new' is not among the labels" in text and "and 4,950 more" in text and len(text) < 2000


def image_folder(folder: Path, side: int, **processor: Any) -> Path:
    """Write images of ``side`` pixels, a model for 16 pixels and a recipe, and return the folder."""
    folder.mkdir()
    model = tiny_images.vit()
    model.save(folder / "model")
    tiny_images.processor(**processor).save_pretrained(folder / "model")
    counts = {"train": 8, "validation": 4, "test": 8}
    tiny_images.write_rows(folder, lambda count, seed: tiny_images.table(count, seed, side), counts)
    return folder


def image_recipe(**fields: Any) -> dict[str, Any]:
    splits = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    return {"task": tiny_images.TASK, "data": {"splits": splits}, "baseline": "finetune", **fields}


def test_image_size_that_the_model_does_not_accept_is_found(tmp_path: Path) -> None:
    text = str(refusal(image_folder(tmp_path / "place", 48, do_resize=False), **image_recipe()))
    assert "does not accept images of 48 x 48 pixels" in text and "preprocessor_config.json" in text
    assert "images of 16 pixels" in text and '"do_resize": true' in text


@pytest.mark.parametrize(("side", "resize"), [(48, True), (16, False)])
def test_image_size_that_the_processor_makes_or_the_model_accepts_passes(
    side: int, resize: bool, tmp_path: Path
) -> None:
    place = image_folder(tmp_path / "place", side, do_resize=resize)
    recipe = tiny_run.write_recipe(place, stages=STAGES, **image_recipe())
    assert compress.check(recipe, artifacts=place / "artifacts").task == tiny_images.TASK


def test_all_broken_images_are_found_at_once(tmp_path: Path) -> None:
    place = image_folder(tmp_path / "place", 16)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    (place / "train-1.png").write_bytes(tiny_images.png(noise)[:2000])
    (place / "test-2.png").write_bytes(b"GIF99 not an image")
    rows = [{"image": "none.png", "label": "above"}, {"image": "train-0.png", "label": "below"}]
    (place / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    records = refusal(place, **image_recipe()).problem_records()
    assert len(records) == 3
    for words, file in (
        ("is broken", "train-1.png"),
        ("is not an image that Pillow can read", "test-2.png"),
        ("validation.jsonl:1: none.png cannot be read", "none.png"),
    ):
        assert [record for record in records if words in str(record["message"]) and file in str(record["file"])]


def test_tokenizer_file_that_cannot_be_read_is_found(place: Path) -> None:
    path = place / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace('"BertPreTokenizer"', '"Other"'))
    assert "The tokenizer cannot be used" in str(refusal(place))


def test_mistakes_of_stages_limits_and_data_are_listed_together(place: Path) -> None:
    fields: dict[str, Any] = {
        "stages": [{"finetune": {"epoch": 1}}, {"onxx": {}}],
        "limits": [{"metric": "acuracy", "at_least": "98%"}],
        "data": with_files(["ragged row", "empty text"], place),
    }
    records = refusal(place, **fields).problem_records()
    messages = " ".join(str(record["message"]) for record in records)
    assert len(records) == 6 and BAD_FILES["ragged row"][2] in messages and BAD_FILES["empty text"][2] in messages
    assert {record["field"] for record in records} >= {
        "stages.0.finetune.epoch", "stages.1.onxx", "limits.0.metric", "limits.0.at_least"
    }  # fmt: skip
    assert {"did you mean 'epochs'?", "did you mean 'onnx'?", "did you mean 'accuracy'?"} <= {
        record["hint"] for record in records
    }
    assert "a share: 0.98 for 98%" in {record["expected"] for record in records}
    # A model that does not exist does not hide the data's problems.
    records = refusal(place, **fields, model="sample:minilmm").problem_records()
    assert len(records) == 7 and "did you mean 'sample:minilm'?" in {record["hint"] for record in records}


@pytest.mark.parametrize("layers", [[0, 9], [0, 0], [-1]])
def test_layers_that_the_model_lacks_are_found(place: Path, layers: list[int]) -> None:
    distill = {"teacher": "finetune", "student": {"layers": layers}}
    (record,) = refusal(place, stages=[STAGES[0], {"distill": distill}, STAGES[1]]).problem_records()
    assert f"Layers {layers} cannot be kept in a model with 2" in str(record["message"])
    assert record["field"] == "stages.1.distill" and record["line"] is not None
