"""Pictures with known boxes and masks: articles of Fashion-MNIST, pasted over photographs of ImageNet.

They are made and not photographed: no registry has pictures in which people have drawn boxes.
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
"""In the order of the ids that masks hold."""
_KIND_OF = {"Trouser": 2, "Dress": 3, "Sandal": 4, "Sneaker": 4, "Ankle boot": 4, "Bag": 5}
"""The others are tops, which 28 x 28 pixels hardly tell apart."""
SIDE = 96
ROWS = {"train": 5_000, "validation": 300, "test": 600}
_PHOTOGRAPHS = {"train": slice(0, 12), "validation": slice(12, 15), "test": slice(15, 20)}
"""No photograph, and no article, is in two splits; of the training articles the last fifth is for validation."""
_SMALLEST, _LARGEST, _MOST, _TRIES = 22, 56, 3, 20
"""Pixels of an article's longer side, articles in a picture, and how often a free place for one is looked for."""
_DARK, _FREE = 24, 3
"""Below this an article's pixel is outside; so many pixels are between two boxes at least."""


class Scene(NamedTuple):
    """A picture [SIDE, SIDE, 3], the kind of each of its pixels [SIDE, SIDE], and its objects' boxes and kinds."""

    picture: np.ndarray
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
    """``count`` pictures of articles [n, 28, 28] over parts of ``photographs``; the same for the same seed."""
    chance = np.random.default_rng(seed)
    kinds = np.array([_KIND_OF.get(CLASSES[label], 1) for label in labels])
    places = [np.flatnonzero(kinds == kind) for kind in range(1, len(KINDS))]
    for _ in range(count):
        picture = _part(photographs[int(chance.integers(len(photographs)))], chance)
        scene = Scene(picture, np.zeros((SIDE, SIDE), np.uint8), [], [])
        for _ in range(chance.integers(0, _MOST + 1) or 1):
            kind = int(chance.integers(1, len(KINDS)))
            _paste(scene, images[chance.choice(places[kind - 1])], kind, chance)
        yield scene


def _paste(scene: Scene, article: np.ndarray, kind: int, chance: np.random.Generator) -> None:
    """Put an article somewhere free, tinted, in a size by chance and maybe mirrored; nowhere if nothing is free."""
    inside = article > _DARK
    if not inside.any():
        return
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    cut = article[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = chance.integers(_SMALLEST, _LARGEST + 1) / max(cut.shape)
    height, width = (max(2, round(side * scale)) for side in cut.shape)
    gray = np.asarray(Image.fromarray(cut).resize((width, height), Image.Resampling.BILINEAR), np.float64)
    gray = gray[:, ::-1] if chance.random() < 0.5 else gray
    shape = ndimage.binary_fill_holes(gray > _DARK)
    tint = chance.uniform(0.5, 1.0, 3)
    for _ in range(_TRIES):
        top, left = (int(chance.integers(0, SIDE - side + 1)) for side in (height, width))
        around = scene.mask[max(0, top - _FREE) : top + height + _FREE, max(0, left - _FREE) : left + width + _FREE]
        if around.any():
            continue
        region = slice(top, top + height), slice(left, left + width)
        scene.picture[region][shape] = (gray[..., None] * tint)[shape].round()
        scene.mask[region][shape] = kind
        down, across = (np.flatnonzero(shape.any(axis=axis)) for axis in (1, 0))
        box = [left + across[0], top + down[0], across[-1] - across[0] + 1, down[-1] - down[0] + 1]
        scene.boxes.append([int(number) for number in box])
        scene.kinds.append(kind)
        return


def _photograph(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


def _part(photograph: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """A square of a photograph, at least half as wide as that, maybe mirrored, [SIDE, SIDE, 3]."""
    shorter = min(photograph.shape[:2])
    side = int(chance.integers(shorter // 2, shorter + 1))
    top, left = (int(chance.integers(0, length - side + 1)) for length in photograph.shape[:2])
    part = Image.fromarray(photograph[top : top + side, left : left + side])
    pixels = np.array(part.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return pixels[:, ::-1].copy() if chance.random() < 0.5 else pixels


def _write(path: Path, scenes: Sequence[Scene]) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    objects = pa.struct([("bbox", pa.list_(pa.list_(pa.float64()))), ("category", pa.list_(pa.string()))])
    columns = {
        "image": pa.array([{"bytes": _jpeg(scene.picture), "path": None} for scene in scenes], image),
        "objects": pa.array(
            [{"bbox": scene.boxes, "category": [KINDS[kind] for kind in scene.kinds]} for scene in scenes], objects
        ),
        "mask": pa.array([{"bytes": png(scene.mask), "path": None} for scene in scenes], image),
    }
    features = {"image": {"_type": "Image"}, "mask": {"_type": "Image"}}
    features_json = json.dumps({"info": {"features": features}})
    pa.parquet.write_table(pa.table(columns).replace_schema_metadata({"huggingface": features_json}), path)


def _jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=92)
    return file.getvalue()
