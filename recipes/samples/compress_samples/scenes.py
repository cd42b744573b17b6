"""Synthetic images with boxes and masks: articles of Fashion-MNIST, pasted over photographs of ImageNet.

They are synthetic because no package registry has images with annotated boxes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image
from scipy import ndimage

from compress.utils.errors import SampleError
from compress.utils.progress import Progress
from compress_samples.fashion import CLASSES, read_articles
from compress_samples.image_table import png

KINDS = ("background", "top", "trousers", "dress", "shoe", "bag")
"""Classes, in the order of their ids in masks."""
_KIND_OF = {"Trouser": 2, "Dress": 3, "Sandal": 4, "Sneaker": 4, "Ankle boot": 4, "Bag": 5}
"""Class of each Fashion-MNIST class; all others are tops, which are hard to distinguish at 28 x 28 pixels."""
SIDE = 96
ROWS = {"train": 5_000, "validation": 300, "test": 600}
_PHOTOGRAPHS = {"train": slice(0, 12), "validation": slice(12, 15), "test": slice(15, 20)}
"""Splits share no photographs and no articles; the last fifth of the training articles is for validation."""
_SMALLEST, _LARGEST, _MOST, _TRIES = 22, 56, 3, 20
"""Range of an article's longer side in pixels, largest number of articles, and attempts to place an article."""
_DARK, _FREE = 24, 3
"""Threshold of an article's pixels, and smallest distance between two boxes in pixels."""


class Scene(NamedTuple):
    """An image [SIDE, SIDE, 3], its mask of class ids [SIDE, SIDE], and the boxes and classes of its objects."""

    image: np.ndarray
    mask: np.ndarray
    boxes: list[list[int]]
    kinds: list[int]


def write_scenes(members: Path, files: Path, progress: Progress) -> None:
    """Write train, validation and test.parquet with columns image, objects and mask. Raises `SampleError`."""
    photographs = [_photograph(path) for path in sorted(members.rglob("imagenet_*.jpg"))]
    if len(photographs) < _PHOTOGRAPHS["test"].stop:
        raise SampleError(f"The archive holds {len(photographs)} photographs.", expected="20")
    train, test = read_articles(members, "train"), read_articles(members, "t10k")
    last = len(train[0]) - len(train[0]) // 5
    articles = {
        "train": (train[0][:last], train[1][:last]),
        "validation": (train[0][last:], train[1][last:]),
        "test": test,
    }
    for index, (split, count) in enumerate(ROWS.items()):
        scenes = make_scenes(*articles[split], photographs[_PHOTOGRAPHS[split]], count, seed=index)
        _write(files / f"{split}.parquet", list(progress.track(scenes, f"pasting, {split}", count)))
    progress.note(f"fashion-scenes: {', '.join(f'{count:,} {split}' for split, count in ROWS.items())} pictures")


def make_scenes(
    images: np.ndarray, labels: Sequence[int], photographs: Sequence[np.ndarray], count: int, seed: int
) -> Iterator[Scene]:
    """Yield ``count`` images of articles [n, 28, 28] over parts of ``photographs``."""
    generator = np.random.default_rng(seed)
    kinds = np.array([_KIND_OF.get(CLASSES[label], 1) for label in labels])
    indices_by_kind = [np.flatnonzero(kinds == kind) for kind in range(1, len(KINDS))]
    for _ in range(count):
        background = _random_crop(photographs[int(generator.integers(len(photographs)))], generator)
        scene = Scene(background, np.zeros((SIDE, SIDE), np.uint8), [], [])
        for _ in range(generator.integers(0, _MOST + 1) or 1):
            kind = int(generator.integers(1, len(KINDS)))
            _paste(scene, images[generator.choice(indices_by_kind[kind - 1])], kind, generator)
        yield scene


def _paste(scene: Scene, article: np.ndarray, kind: int, generator: np.random.Generator) -> None:
    """Paste an article at a random free position, with random tint, size and mirroring, unless no position is free."""
    inside = article > _DARK
    if not inside.any():
        return
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    cropped = article[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = generator.integers(_SMALLEST, _LARGEST + 1) / max(cropped.shape)
    height, width = (max(2, round(side * scale)) for side in cropped.shape)
    gray = np.asarray(Image.fromarray(cropped).resize((width, height), Image.Resampling.BILINEAR), np.float64)
    gray = gray[:, ::-1] if generator.random() < 0.5 else gray
    shape = ndimage.binary_fill_holes(gray > _DARK)
    tint = generator.uniform(0.5, 1.0, 3)
    for _ in range(_TRIES):
        top, left = (int(generator.integers(0, SIDE - side + 1)) for side in (height, width))
        neighborhood = scene.mask[
            max(0, top - _FREE) : top + height + _FREE, max(0, left - _FREE) : left + width + _FREE
        ]
        if neighborhood.any():
            continue
        region = slice(top, top + height), slice(left, left + width)
        scene.image[region][shape] = (gray[..., None] * tint)[shape].round()
        scene.mask[region][shape] = kind
        down, across = (np.flatnonzero(shape.any(axis=axis)) for axis in (1, 0))
        box = [left + across[0], top + down[0], across[-1] - across[0] + 1, down[-1] - down[0] + 1]
        scene.boxes.append([int(number) for number in box])
        scene.kinds.append(kind)
        return


def _photograph(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


def _random_crop(photograph: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return a random square of a photograph, at least half of its shorter side, maybe mirrored, [SIDE, SIDE, 3]."""
    shorter = min(photograph.shape[:2])
    side = int(generator.integers(shorter // 2, shorter + 1))
    top, left = (int(generator.integers(0, length - side + 1)) for length in photograph.shape[:2])
    crop = Image.fromarray(photograph[top : top + side, left : left + side])
    pixels = np.array(crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return pixels[:, ::-1].copy() if generator.random() < 0.5 else pixels


def _write(path: Path, scenes: Sequence[Scene]) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    objects = pa.struct([("bbox", pa.list_(pa.list_(pa.float64()))), ("category", pa.list_(pa.string()))])
    columns = {
        "image": pa.array([{"bytes": _jpeg(scene.image), "path": None} for scene in scenes], image),
        "objects": pa.array(
            [{"bbox": scene.boxes, "category": [KINDS[kind] for kind in scene.kinds]} for scene in scenes], objects
        ),
        "mask": pa.array([{"bytes": png(scene.mask), "path": None} for scene in scenes], image),
    }
    features = {"image": {"_type": "Image"}, "mask": {"_type": "Image"}}
    features_json = json.dumps({"info": {"features": features}})
    pa.parquet.write_table(pa.table(columns).replace_schema_metadata({"huggingface": features_json}), path)


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()
