"""Boxes as data sets have them, read, named and checked against their pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny_places
from PIL import Image

from compress.data.config import DataConfig
from compress.data.dataset import Dataset, load_dataset
from compress.data.media import media, picture_size
from compress.data.objects import objects_in, read_objects
from compress.tasks.registry import get_task
from compress.utils.errors import DataError
from compress.utils.progress import SilentProgress


def load(folder: Path, objects: list[Any], **config: Any) -> Dataset:
    """A data set of pictures of 20 x 10 pixels."""
    pictures = [tiny_places.png(np.full((10, 20, 3), shade, np.uint8)) for shade in range(len(objects))]
    pa.parquet.write_table(pa.table({"image": pictures, "objects": objects}), folder / "train.parquet")
    given = DataConfig(splits={"train": "train.parquet"}, **config)
    return load_dataset(given, get_task(tiny_places.DETECTION).columns, folder, SilentProgress())


def test_lists_mappings_and_json_are_the_same() -> None:
    columns = {"bbox": [[1, 2, 3, 4], [0, 0, 5, 5]], "category": ["cat", 7]}
    rows = [{"bbox": [1, 2, 3, 4], "category": "cat"}, {"bbox": [0, 0, 5, 5], "category": 7, "area": 25}]
    assert read_objects(columns) == read_objects(rows) == read_objects(json.dumps(columns))
    assert objects_in(read_objects(columns)) == ([[1, 2, 3, 4], [0, 0, 5, 5]], ["cat", "7"])
    assert objects_in(read_objects({"bbox": [], "category": []})) == ([], [])


def test_names_are_those_of_all_boxes_and_ids_get_theirs(tmp_path: Path) -> None:
    rows = [{"bbox": [[0, 0, 9, 9], [1, 1, 5, 5]], "category": [1, 0]}, {"bbox": [], "category": []}]
    assert load(tmp_path, rows).labels == ("0", "1")
    named = load(tmp_path, rows, labels=("cat", "dining table"))
    values = named.split("train")["objects"].to_pylist()
    assert [objects_in(value).categories for value in values] == [["dining table", "cat"], []]
    assert load(tmp_path, rows[:1] * 1 + [{"bbox": [[0, 0, 1, 1]], "category": [1]}]).labels == ("0", "1")


def test_a_detector_may_have_one_class(tmp_path: Path) -> None:
    assert load(tmp_path, [{"bbox": [[0, 0, 9, 9]], "category": ["face"]}]).labels == ("face",)
    with pytest.raises(DataError, match="has no class"):
        load(tmp_path, [{"bbox": pa.scalar([], pa.list_(pa.list_(pa.float64()))).as_py(), "category": []}])


@pytest.mark.parametrize(
    ("objects", "says"),
    [
        ({"bbox": [[12, 0, 10, 5]], "category": ["a"]}, r"row 2: The box \[12\.0, 0\.0, 10\.0, 5\.0\] reaches out"),
        ({"bbox": [[0, 6, 5, 6]], "category": ["a"]}, "row 2: .*reaches out"),
        ({"bbox": [[-3, 0, 5, 5]], "category": ["a"]}, "row 2: .*reaches out"),
        ({"bbox": [[3, 3, 0, 5]], "category": ["a"]}, r"row 2: The box \[3\.0, 3\.0, 0\.0, 5\.0\] is empty"),
        ({"bbox": [[3, 3, 5]], "category": ["a"]}, "no four numbers"),
        ({"bbox": [[3, 3, 5, float("nan")]], "category": ["a"]}, "no four numbers"),
        ({"bbox": [[3, 3, 5, 5]], "category": ["a", "b"]}, "1 boxes and 2 categories"),
        ({"bbox": [[3, 3, 5, 5]], "category": [" "]}, "no name and no id"),
    ],
)
def test_a_wrong_box_is_named_with_its_row(tmp_path: Path, objects: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load(tmp_path, [{"bbox": [[0.0, 0, 20.9, 10]], "category": ["a"]}, objects])


def test_an_unknown_category_is_named_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'dog' is not among the labels") as found:
        load(tmp_path, [{"bbox": [[0, 0, 5, 5]], "category": ["dog"]}], labels=("cat", "cow"))
    assert "row 1" in str(found.value.where)


def test_what_is_no_list_of_objects() -> None:
    for value in (5, "no JSON", [[1, 2, 3, 4]], {"bbox": 3, "category": 4}):
        with pytest.raises(TypeError):
            read_objects(value)
    with pytest.raises(DataError, match="have no category"):
        read_objects({"bbox": [[1, 2, 3, 4]], "area": [12]})


def test_a_picture_on_its_side_is_as_wide_as_it_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    turned = media("turned.jpg", tmp_path)
    assert turned is not None and picture_size(turned) == (10, 20)
