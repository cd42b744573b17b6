"""Tests of image and audio columns: files by bytes or by path, identified by a digest of their content."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from compress.data.columns import Column
from compress.data.config import DataConfig
from compress.data.dataset import Dataset, load_dataset
from compress.data.files import read_class_folder
from compress.data.media import content, identities
from compress.data.membership import character_lengths
from compress.utils.errors import DataError
from compress.utils.progress import SilentProgress

COLUMNS = (Column("image", kind="image"), Column("label", label=True))
FILES = {"cat/1.png": b"one", "cat/2.PNG": b"two", "dog/1.jpg": b"three"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return class folders `train` and `test` with the same file names and different contents."""
    for split, mark in (("train", b""), ("test", b"!")):
        for name, media_bytes in FILES.items():
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(media_bytes + mark)
    return tmp_path


def load(folder: Path, columns: tuple[Column, ...] = COLUMNS, **config: Any) -> Dataset:
    return load_dataset(DataConfig(**config), columns, folder, SilentProgress())


SPLITS = {"train": "train", "test": "test"}


def test_class_folders_are_read_in_order(folder: Path) -> None:
    data = load(folder, source=".", splits=SPLITS)
    table = data.split("train")
    assert table["label"].to_pylist() == ["cat", "cat", "dog"]
    assert [content(value) for value in table["image"].to_pylist()] == [b"one", b"two", b"three"]
    assert table["image"].to_pylist()[0]["bytes"] is None, "files are referenced by path"
    assert data.labels == ("cat", "dog")


def test_split_may_be_path_of_class_folder(folder: Path) -> None:
    data = load(folder, splits={"train": "./train", "test": str(folder / "test")})
    assert [content(value) for value in data.split("test")["image"].to_pylist()] == [b"one!", b"two!", b"three!"]


def test_paths_are_relative_to_folder_of_table(folder: Path) -> None:
    for split in SPLITS:
        rows = [[f"{split}/{name}", name.split("/")[0]] for name in FILES]
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["image", "label"], *rows])
    by_path = load(folder, splits={split: f"{split}.csv" for split in SPLITS})
    assert [content(value) for value in by_path.split("train")["image"].to_pylist()] == [b"one", b"two", b"three"]
    assert by_path.digest("train", "test") == load(folder, source=".", splits=SPLITS).digest("test", "train")


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_parquet_may_hold_file_contents(folder: Path, form: str) -> None:
    for split, mark in (("train", b""), ("test", b"!")):
        files = [media_bytes + mark for media_bytes in FILES.values()]
        # The second is what the Hugging Face datasets feature `Image` stores.
        images = files if form == "bytes" else [{"bytes": media_bytes, "path": "x.png"} for media_bytes in files]
        labels = [name.split("/")[0] for name in FILES]
        pa.parquet.write_table(pa.table({"image": images, "label": labels}), folder / f"{split}.parquet")
    data = load(folder, splits={split: f"{split}.parquet" for split in SPLITS})
    assert [content(value) for value in data.split("train")["image"].to_pylist()] == [b"one", b"two", b"three"]
    assert next(identities(data.split("train")["image"])) == hashlib.sha256(b"one").hexdigest()
    # The digest covers order and content of rows, not the location of files.
    assert data.digest("train") == load(folder, source=".", splits=SPLITS).digest("train")


def test_digest_depends_on_file_content(folder: Path) -> None:
    digest_before = load(folder, source=".", splits=SPLITS).digest("train")
    (folder / "train/cat/1.png").write_bytes(b"other")
    assert load(folder, source=".", splits=SPLITS).digest("train") != digest_before


def test_image_overlap_with_test_is_rejected(folder: Path) -> None:
    (folder / "train/dog/again.png").write_bytes(b"one!")
    with pytest.raises(DataError, match="1 of 4 rows of the split 'train' also occur in the test split") as caught:
        load(folder, source=".", splits=SPLITS)
    assert "again.png" in str(caught.value)
    kept_rows = load(folder, source=".", splits=SPLITS, drop_overlap=True).split("train")
    assert len(kept_rows) == 3


def test_invalid_file_values_are_reported(folder: Path) -> None:
    def refused(value: object) -> str:
        rows = [{"image": value, "label": "cat"}, {"image": "test/dog/1.jpg", "label": "dog"}]
        (folder / "rows.json").write_text(json.dumps(rows))
        with pytest.raises(DataError) as caught:
            load(folder, splits={"test": "rows.json"})
        return str(caught.value)

    assert "rows.json, row 1: gone.png cannot be read" in refused("gone.png")
    assert "1 of 2 values missing or empty" in refused(" ")
    assert "value of type int" in refused(3) and "an encoded file's bytes" in refused(3)
    (folder / "nothing.png").write_bytes(b"")
    assert "nothing.png is empty" in refused("nothing.png")


def test_train_split_may_lack_labels_on_request(folder: Path) -> None:
    rows = [{"image": f"train/{name}"} for name in FILES]
    (folder / "bare.json").write_text(json.dumps(rows))
    splits = {"train": "bare.json", "test": "./test"}
    data = load(folder, splits=splits, without_labels=["train"])
    assert data.splits == ("train", "test")
    assert data.split("train").column_names == ["image"]
    assert data.labels == ("cat", "dog")
    with pytest.raises(DataError, match="no column 'label'"):
        load(folder, splits=splits)
    with pytest.raises(ValueError, match="other than test"):
        load(folder, splits=splits, without_labels=["test"])


def test_file_changed_after_loading_is_rejected(folder: Path) -> None:
    value = load(folder, source=".", splits=SPLITS).split("test")["image"].to_pylist()[0]
    (folder / "test/cat/1.png").write_bytes(b"other")
    with pytest.raises(DataError, match="has changed since"):
        content(value)


def test_class_folder_with_other_files_is_rejected(folder: Path) -> None:
    def refused(name: str) -> str:
        path = folder / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        with pytest.raises(DataError) as caught:
            load(folder, source=".", splits=SPLITS)
        path.unlink()
        return str(caught.value)

    assert "1.png is an image or recording outside the folder of a class" in refused("1.png")
    assert "holds audio and image" in refused("cat/miaow.wav")
    assert "cat/kittens is a folder within the folder of a class" in refused("cat/kittens/1.png")
    (folder / "train/cat/kittens").rmdir()
    assert "train/bird holds no image or recording" in refused("bird/1.heic")
    with pytest.raises(DataError, match="train/bird holds no image or recording"):
        load(folder, source=".", splits=SPLITS)


def test_other_files_beside_media_are_ignored_with_one_note(folder: Path) -> None:
    before = read_class_folder(folder / "train", {"image", "label"})
    assert before.notes == ()
    for name in ("cat/Thumbs.db", "cat/.DS_Store", "cat/._1.png", "notes.txt", ".DS_Store"):
        (folder / "train" / name).write_bytes(b"x")
    (folder / "train/.thumbnails").mkdir()
    rows = read_class_folder(folder / "train", {"image", "label"})
    assert (rows.columns, rows.names) == (before.columns, before.names)
    assert len(rows.notes) == 1
    assert rows.notes[0].startswith("train: 6 files are ignored")
    shutil.rmtree(folder / "train/cat")
    shutil.rmtree(folder / "train/dog")
    with pytest.raises(DataError, match="no class folders"):
        read_class_folder(folder / "train", {"label"})


def test_character_lengths_require_a_text_column(folder: Path) -> None:
    data = load(folder, source=".", splits=SPLITS)
    with pytest.raises(DataError, match="no text whose characters"):
        character_lengths(data, "test")
    table = pa.table({"audio": data.split("test")["image"], "text": ["a", "bc", "def"]})
    spoken = Dataset((Column("audio", kind="audio"), Column("text")), {"test": table}, ())
    assert character_lengths(spoken, "test").tolist() == [1, 2, 3]
