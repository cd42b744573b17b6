"""Pasted pictures: boxes are those of their masks, nothing covers another, and splits share nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.tasks.registry import get_task
from compress.utils.errors import SampleError
from compress.utils.progress import SilentProgress
from compress_samples import scenes
from compress_samples.scenes import KINDS, SIDE, make_scenes, write_scenes

PHOTOGRAPH = np.full((150, 120, 3), 7, np.uint8)


def articles() -> tuple[np.ndarray, list[int]]:
    """A bright rectangle of its own shape for each of ten classes, one of them with a hole."""
    images = np.zeros((10, 28, 28), np.uint8)
    for number, image in enumerate(images):
        image[4 : 10 + 2 * number, 6 : 24 - number] = 250
    images[8, 8:12, 9:12] = 0
    return images, list(range(10))


def test_boxes_are_those_of_the_masks() -> None:
    scenes = list(make_scenes(*articles(), [PHOTOGRAPH], 40, seed=1))
    assert {len(scene.boxes) for scene in scenes} == {1, 2, 3}
    for scene in scenes:
        left = scene.mask.copy()
        for (x, y, wide, high), kind in zip(scene.boxes, scene.kinds, strict=True):
            own_mask = left[y : y + high, x : x + wide]
            assert set(np.unique(own_mask)) <= {0, kind}
            for edge in (own_mask[0], own_mask[-1], own_mask[:, 0], own_mask[:, -1]):
                assert edge.any(), "the box is tight"
            left[y : y + high, x : x + wide] = 0
        assert not left.any(), "nothing is outside of boxes"
        assert np.array_equal((scene.picture != 7).any(axis=-1), scene.mask > 0) and scene.picture.shape == (
            SIDE,
            SIDE,
            3,
        )
    again = next(make_scenes(*articles(), [PHOTOGRAPH], 1, seed=1))
    np.testing.assert_array_equal(again.picture, scenes[0].picture)
    assert {KINDS[kind] for scene in scenes for kind in scene.kinds} == set(KINDS[1:])


def test_both_tasks_read_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "ROWS", {"train": 6, "validation": 3, "test": 4})
    monkeypatch.setattr(
        scenes, "read_articles", lambda members, part: (np.tile(articles()[0], (5, 1, 1)), [*range(10)] * 5)
    )
    with pytest.raises(SampleError, match="holds 0 photographs"):
        write_scenes(tmp_path, tmp_path, SilentProgress())
    for number in range(20):
        Image.fromarray(PHOTOGRAPH + number).save(tmp_path / f"imagenet_{number:02d}_{number}.jpg")
    write_scenes(tmp_path, tmp_path, SilentProgress())
    splits = {name: f"{name}.parquet" for name in scenes.ROWS}
    for task, labels in (("object-detection", KINDS[1:]), ("image-segmentation", KINDS)):
        data = load_dataset(
            DataConfig(splits=splits, labels=labels), get_task(task).columns, tmp_path, SilentProgress()
        )
        assert [len(data.split(name)) for name in data.splits] == [6, 3, 4]
        assert data.labels == labels
    assert set(pyarrow.parquet.read_table(tmp_path / "test.parquet").column_names) == {"image", "objects", "mask"}
