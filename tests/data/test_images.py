"""Tests of images and object annotations: decoding to a color mode, and validation of boxes."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny_places
from PIL import Image

from compress.data.annotations import objects_in, read_objects
from compress.data.config import DataConfig
from compress.data.dataset import Dataset, load_dataset
from compress.data.media import decode, in_words, media, picture_size
from compress.tasks.registry import TASKS
from compress.utils.errors import DataError, MissingExtraError
from compress.utils.progress import SilentProgress


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decoded(content: bytes, mode: Any = "RGB") -> tuple[list[Any], str]:
    """Return the pixels of an image and the note about its conversion."""
    value = media(content, None)
    assert value is not None
    conversions: Counter[str] = Counter()
    image = decode(value, mode, conversions)
    assert image.mode == mode
    return np.asarray(image).tolist(), in_words(conversions, 1)


def flat(mode: str, value: Any, size: tuple[int, int] = (1, 1)) -> Image.Image:
    return Image.new(mode, size, value)


def test_matching_mode_is_unchanged() -> None:
    assert decoded(encoded(flat("RGB", (1, 2, 3)))) == ([[[1, 2, 3]]], "")
    assert decoded(encoded(flat("L", 7)), "L") == ([[7]], "")


def test_grayscale_becomes_rgb_with_equal_channels() -> None:
    assert decoded(encoded(flat("L", 7))) == ([[[7, 7, 7]]], "Of 1 images: 1 grayscale, converted to RGB.")


def test_cmyk_becomes_rgb() -> None:
    # Ink covers paper: red = (255 - cyan)(255 - black) / 255, and so on.
    pixels, note = decoded(encoded(flat("CMYK", (255, 0, 51, 0)), "TIFF"))
    assert pixels == [[[0, 255, 204]]]
    assert "1 CMYK, as RGB" in note


def test_color_becomes_grayscale_by_luma() -> None:
    # ITU-R 601-2: 0.299 R + 0.587 G + 0.114 B
    pixels, note = decoded(encoded(flat("RGB", (100, 50, 200))), "L")
    assert pixels == [[round(0.299 * 100 + 0.587 * 50 + 0.114 * 200)]]
    assert "1 RGB, as grayscale" in note


def test_transparent_pixels_are_blended_with_white() -> None:
    pixels, note = decoded(encoded(flat("RGBA", (0, 0, 0, 51))))
    assert pixels == [[[204, 204, 204]]]
    assert "transparent, composited on white" in note
    palette = flat("P", 0)
    palette.putpalette([10, 20, 30])
    assert decoded(encoded(palette))[0] == [[[10, 20, 30]]]
    assert decoded(encoded(palette, transparency=0))[0] == [[[255, 255, 255]]]


def test_sixteen_bit_values_are_scaled() -> None:
    deep = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    pixels, note = decoded(encoded(deep), "L")
    assert pixels == [[0, 1, 255]]
    assert "16 bits" in note


def test_float_pixels_are_rejected() -> None:
    with pytest.raises(DataError, match="more than 16 bits"):
        decoded(encoded(flat("F", 0.5), "TIFF"))


def test_exif_orientation_is_applied() -> None:
    wide = Image.fromarray(np.array([[[1, 1, 1], [2, 2, 2]]], np.uint8))
    exif = wide.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    assert decoded(encoded(wide, exif=exif))[0] == [[[1, 1, 1]], [[2, 2, 2]]]


def test_first_frame_of_animation_is_used() -> None:
    frames = [flat("L", 10), flat("L", 200)]
    pixels, note = decoded(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "L")
    assert pixels == [[10]]
    assert "first frame" in note


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not an image", "is not an image that Pillow can read"),
        (encoded(Image.effect_noise((64, 64), 50))[:900], "is broken"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900], "is broken"),
    ],
)
def test_broken_image_is_reported(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        decoded(content)
    assert "SHA-256" in str(caught.value.where), "an image without a path is identified by its content"


def test_decompression_bomb_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(flat("L", 0, (20, 20)))
    for limit in (300, 100):  # Pillow warns above the limit, and refuses above twice as much
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match="too large"):
            decoded(content)


def test_missing_pillow_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    content = encoded(flat("L", 0))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError):
        decoded(content)


def load(folder: Path, objects: list[Any], **config: Any) -> Dataset:
    """Load a dataset of images of 20 x 10 pixels with these annotations."""
    images = [tiny_places.png(np.full((10, 20, 3), shade, np.uint8)) for shade in range(len(objects))]
    pa.parquet.write_table(pa.table({"image": images, "objects": objects}), folder / "train.parquet")
    given = DataConfig(splits={"train": "train.parquet"}, **config)
    return load_dataset(given, TASKS[tiny_places.DETECTION].columns, folder, SilentProgress())


def test_objects_may_be_lists_mappings_or_json() -> None:
    columns = {"bbox": [[1, 2, 3, 4], [0, 0, 5, 5]], "category": ["cat", 7]}
    rows = [{"bbox": [1, 2, 3, 4], "category": "cat"}, {"bbox": [0, 0, 5, 5], "category": 7, "area": 25}]
    assert read_objects(columns) == read_objects(rows) == read_objects(json.dumps(columns))
    assert objects_in(read_objects(columns)) == ([[1, 2, 3, 4], [0, 0, 5, 5]], ["cat", "7"])
    assert objects_in(read_objects({"bbox": [], "category": []})) == ([], [])


def test_category_ids_become_names(tmp_path: Path) -> None:
    rows = [{"bbox": [[0, 0, 9, 9], [1, 1, 5, 5]], "category": [1, 0]}, {"bbox": [], "category": []}]
    assert load(tmp_path, rows).labels == ("0", "1")
    named = load(tmp_path, rows, labels=("cat", "dining table"))
    values = named.split("train")["objects"].to_pylist()
    assert [objects_in(value).categories for value in values] == [["dining table", "cat"], []]
    assert load(tmp_path, rows[:1] * 1 + [{"bbox": [[0, 0, 1, 1]], "category": [1]}]).labels == ("0", "1")


def test_detection_may_have_one_class(tmp_path: Path) -> None:
    assert load(tmp_path, [{"bbox": [[0, 0, 9, 9]], "category": ["face"]}]).labels == ("face",)
    with pytest.raises(DataError, match="has no class"):
        load(tmp_path, [{"bbox": pa.scalar([], pa.list_(pa.list_(pa.float64()))).as_py(), "category": []}])


@pytest.mark.parametrize(
    ("objects", "says"),
    [
        ({"bbox": [[12, 0, 10, 5]], "category": ["a"]}, r"row 2: The box \[12\.0, 0\.0, 10\.0, 5\.0\] exceeds"),
        ({"bbox": [[0, 6, 5, 6]], "category": ["a"]}, "row 2: .*exceeds the image"),
        ({"bbox": [[-3, 0, 5, 5]], "category": ["a"]}, "row 2: .*exceeds the image"),
        ({"bbox": [[3, 3, 0, 5]], "category": ["a"]}, r"row 2: The box \[3\.0, 3\.0, 0\.0, 5\.0\] is empty"),
        ({"bbox": [[3, 3, 5]], "category": ["a"]}, "not four numbers"),
        ({"bbox": [[3, 3, 5, float("nan")]], "category": ["a"]}, "not four numbers"),
        ({"bbox": [[3, 3, 5, 5]], "category": ["a", "b"]}, "1 boxes and 2 categories"),
        ({"bbox": [[3, 3, 5, 5]], "category": [" "]}, "no name and no id"),
    ],
)
def test_invalid_box_is_reported_with_its_row(tmp_path: Path, objects: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load(tmp_path, [{"bbox": [[0.0, 0, 20.9, 10]], "category": ["a"]}, objects])


def test_unknown_category_is_reported_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'dog' is not among the labels") as found:
        load(tmp_path, [{"bbox": [[0, 0, 5, 5]], "category": ["dog"]}], labels=("cat", "cow"))
    assert "row 1" in str(found.value.where)


def test_invalid_objects_are_rejected() -> None:
    for value in (5, "no JSON", [[1, 2, 3, 4]], {"bbox": 3, "category": 4}):
        with pytest.raises(TypeError):
            read_objects(value)
    with pytest.raises(DataError, match="have no category"):
        read_objects({"bbox": [[1, 2, 3, 4]], "area": [12]})


def test_image_size_accounts_for_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    turned = media("turned.jpg", tmp_path)
    assert turned is not None and picture_size(turned) == (10, 20)
