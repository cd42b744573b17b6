"""Small image sets: 20 labeled photographs of ImageNet, and unlabeled images of single objects."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path

from PIL import Image, ImageOps

from compress.utils.errors import SampleError
from compress.utils.progress import Progress
from compress_samples.image_table import write_images

SIDE = 256
CALIBRATION = 128
OTHERS = 500
_ZOOMED = 0.7
"""Share of the sides of an image that its second, cropped view has."""
_LABELED = re.compile(r"^imagenet_\d+_(\d+)\.jpg$")


def write_imagenet(members: Path, files: Path, progress: Progress) -> None:
    """Write test.parquet: the original images and their class ids in ILSVRC 2012. Raises `SampleError`."""
    image_files = sorted(path for path in members.rglob("*") if path.is_file())
    labels = []
    for path in image_files:
        match = _LABELED.match(path.name)
        if match is None:
            raise SampleError(f"{path.name} does not have its class in its name.", expected="imagenet_NUMBER_CLASS.jpg")
        labels.append(match[1])
    write_images(files / "test.parquet", [path.read_bytes() for path in image_files], labels)
    progress.note(f"imagenet-20: {len(image_files)} images of {len(set(labels))} classes")


def write_objects(members: Path, files: Path, progress: Progress) -> None:
    """Write train.parquet and test.parquet, unlabeled images without duplicates. Raises `SampleError`.

    The images are single objects on white squares. 128 are for calibration; test has 500 views of the others, complete
    and cropped to the center. The split follows from the SHA-256 of a file.
    """
    object_files = [path for path in members.rglob("*") if path.is_file()]
    ordered = sorted((hashlib.sha256(path.read_bytes()).hexdigest(), path) for path in object_files)
    distinct = list(dict(ordered).values())
    if len(distinct) < CALIBRATION + OTHERS // 2:
        raise SampleError(f"The archive holds {len(distinct)} pictures.", expected=f"{CALIBRATION + OTHERS // 2}")
    others = distinct[CALIBRATION:]
    views = [(path, 1.0) for path in others] + [(path, _ZOOMED) for path in others]
    for split, chosen in (
        ("train", [(path, 1.0) for path in distinct[:CALIBRATION]]),
        ("test", views[:OTHERS]),
    ):
        tracked = progress.track(chosen, f"preparing objects, {split}", len(chosen))
        write_images(files / f"{split}.parquet", [_on_white(path, share) for path, share in tracked], None)
    progress.note(f"objects: {CALIBRATION} images for calibration, {min(len(views), OTHERS)} others")


def _on_white(path: Path, share: float) -> bytes:
    """Return the central ``share`` of an image on a white square, as JPEG."""
    with Image.open(path) as opened:
        layer = opened.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    width, height = flat.size
    margins = round(width * (1 - share) / 2), round(height * (1 - share) / 2)
    flat = flat.crop((*margins, width - margins[0], height - margins[1]))
    square = ImageOps.pad(flat, (SIDE, SIDE), Image.Resampling.BICUBIC, color="white")
    file = io.BytesIO()
    square.save(file, "JPEG", quality=95)
    return file.getvalue()
