"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017) as Parquet files with an image column, in fixed splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from compress.utils.errors import SampleError
from compress.utils.progress import Progress
from compress_samples.idx import read_idx
from compress_samples.image_table import png, write_images

CLASSES = (*("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),)
PHRASES = (
    *("a T-shirt", "trousers", "a pullover", "a dress", "a coat", "a sandal", "a shirt", "a sneaker", "a bag"),
    "an ankle boot",
)
"""Names of the classes in captions."""
TEMPLATES = (
    *("a photo of {}", "a picture of {}", "a small photo of {}", "a gray picture of {}", "a photo of {} on black"),
    *("{} in a catalogue", "{} for sale", "the shop has {}"),
)
VALIDATION_ROWS = 5_000
"""Number of validation rows, which are the last training rows."""
Columns = Callable[[np.ndarray, Sequence[int]], Mapping[str, Sequence[str]]]
"""Function of images [n, 28, 28] and class ids that returns additional columns by name."""


def write_splits(members: Path, files: Path, progress: Progress) -> None:
    """Write train, validation and test.parquet (columns image, label) without common images.

    Raises `SampleError` for damaged or inconsistent IDX files.
    """
    write_articles(members, files, progress, CLASSES)


def write_captions(members: Path, files: Path, progress: Progress) -> None:
    """Write the splits with a column `text`, a random caption template with the class. Raises `SampleError`."""
    write_articles(members, files, progress, PHRASES, _captions)


def _captions(images: np.ndarray, kinds: Sequence[int]) -> Mapping[str, Sequence[str]]:
    indices = np.random.default_rng(0).integers(0, len(TEMPLATES), len(kinds))
    return {"text": [TEMPLATES[index].format(PHRASES[kind]) for index, kind in zip(indices, kinds, strict=True)]}


def write_articles(
    members: Path, files: Path, progress: Progress, names: Sequence[str], columns: Columns | None = None
) -> None:
    """Write the splits with these class names and additional columns. Raises `SampleError`."""
    train, test = read_articles(members, "train"), read_articles(members, "t10k")
    seen = {image.tobytes() for image in test[0]}
    distinct_rows = [row for row, image in enumerate(train[0]) if image.tobytes() not in seen]
    if len(distinct_rows) <= VALIDATION_ROWS:
        raise SampleError(
            f"The archive holds {len(distinct_rows)} training images.", expected=f"more than {VALIDATION_ROWS}"
        )
    train_rows = distinct_rows[:-VALIDATION_ROWS]
    train_images = {train[0][row].tobytes() for row in train_rows}
    held_out = [row for row in distinct_rows[-VALIDATION_ROWS:] if train[0][row].tobytes() not in train_images]
    for split, (images, labels), rows in (
        ("train", train, train_rows),
        ("validation", train, held_out),
        ("test", test, range(len(test[0]))),
    ):
        label = "encoding fashion-mnist, " + split
        encoded = [png(images[row]) for row in progress.track(rows, label, len(rows))]
        kinds = [labels[row] for row in rows]
        additional = {} if columns is None else columns(images[list(rows)], kinds)
        write_images(files / f"{split}.parquet", encoded, [names[kind] for kind in kinds], additional)
    dropped = len(train[0]) - len(train_rows) - len(held_out)
    progress.note(
        f"fashion-mnist: {len(train_rows):,} train, {len(held_out):,} validation, {len(test[0]):,} test images; "
        f"{dropped} duplicates of other splits are left out"
    )


def read_articles(members: Path, part: str) -> tuple[np.ndarray, Sequence[int]]:
    """Return images [n, 28, 28] uint8 and their class ids."""
    images = read_idx(_file(members, f"{part}-images"), 3)
    labels: list[int] = read_idx(_file(members, f"{part}-labels"), 1).tolist()
    if len(images) != len(labels) or max(labels, default=0) >= len(CLASSES):
        raise SampleError(
            f"{part} has {len(images)} images, {len(labels)} labels up to {max(labels, default=0)}.",
            expected=f"as many of both, of {len(CLASSES)} classes",
        )
    return images, labels


def _file(members: Path, beginning: str) -> Path:
    return next(path for path in sorted(members.rglob("*")) if path.name.startswith(beginning))
