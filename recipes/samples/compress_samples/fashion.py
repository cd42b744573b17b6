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
"""The classes as captions name them."""
TEMPLATES = (
    *("a photo of {}", "a picture of {}", "a small photo of {}", "a gray picture of {}", "a photo of {} on black"),
    *("{} in a catalogue", "{} for sale", "the shop has {}"),
)
VALIDATION_ROWS = 5_000
"""The last of the training rows."""
Columns = Callable[[np.ndarray, Sequence[int]], Mapping[str, Sequence[str]]]
"""Of images [n, 28, 28] and the ids of their classes: further columns by their names."""


def write_splits(members: Path, files: Path, progress: Progress) -> None:
    """Write train, validation and test.parquet (columns image, label), no picture in two of them.

    Raises `SampleError` for files that are no whole IDX files, or don't fit each other.
    """
    write_articles(members, files, progress, CLASSES)


def write_captions(members: Path, files: Path, progress: Progress) -> None:
    """Write the same with a column `text`, the class in a template drawn for each picture. Raises `SampleError`."""
    write_articles(members, files, progress, PHRASES, _captions)


def _captions(images: np.ndarray, kinds: Sequence[int]) -> Mapping[str, Sequence[str]]:
    drawn = np.random.default_rng(0).integers(0, len(TEMPLATES), len(kinds))
    return {"text": [TEMPLATES[which].format(PHRASES[kind]) for which, kind in zip(drawn, kinds, strict=True)]}


def write_articles(
    members: Path, files: Path, progress: Progress, names: Sequence[str], more: Columns | None = None
) -> None:
    """Write the splits with classes called by ``names``, and the columns ``more``. Raises `SampleError`."""
    train, test = read_articles(members, "train"), read_articles(members, "t10k")
    seen = {image.tobytes() for image in test[0]}
    distinct_rows = [row for row, image in enumerate(train[0]) if image.tobytes() not in seen]
    if len(distinct_rows) <= VALIDATION_ROWS:
        raise SampleError(
            f"The archive holds {len(distinct_rows)} training images.", expected=f"more than {VALIDATION_ROWS}"
        )
    learned = distinct_rows[:-VALIDATION_ROWS]
    judged = {train[0][row].tobytes() for row in learned}
    held_out = [row for row in distinct_rows[-VALIDATION_ROWS:] if train[0][row].tobytes() not in judged]
    for split, (images, labels), rows in (
        ("train", train, learned),
        ("validation", train, held_out),
        ("test", test, range(len(test[0]))),
    ):
        label = "encoding fashion-mnist, " + split
        encoded = [png(images[row]) for row in progress.track(rows, label, len(rows))]
        kinds = [labels[row] for row in rows]
        beside = {} if more is None else more(images[list(rows)], kinds)
        write_images(files / f"{split}.parquet", encoded, [names[kind] for kind in kinds], beside)
    dropped = len(train[0]) - len(learned) - len(held_out)
    progress.note(
        f"fashion-mnist: {len(learned):,} train, {len(held_out):,} validation, {len(test[0]):,} test images; "
        f"{dropped} that stand in another split too are left out"
    )


def read_articles(members: Path, part: str) -> tuple[np.ndarray, Sequence[int]]:
    """Images [n, 28, 28] uint8 and the ids of their classes."""
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
