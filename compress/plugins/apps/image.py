"""Pictures -> floats as an app does it: by the rule of the manifest, without transformers."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.data.media import Mode, decode, media
from compress.formats.runtime import Batch
from compress.plugins.apps.app_type import Case, Inputs
from compress.plugins.apps.pictures import noise, pictures
from compress.plugins.apps.preprocess import Channels, Crop, PrepareImage, Resize
from compress.utils.errors import BundleError, DataError, InputError, ModelError

if TYPE_CHECKING:
    from PIL import Image

INPUT = "pixel_values"
FOLDER = "samples"
_FILTERS = {2: "bilinear", 3: "bicubic", 1: "lanczos"}
"""Pillow's numbers of its filters, which are Hugging Face's too."""
_LONGEST = 512
"""Of a sample that the user names: a bundle is small, and every model sees less."""
_PLACES, _STEP = 64, 10_007
_TOLERANCE = 1e-4
"""Of a prepared value. Pillow's resampling is of whole numbers, so that nothing is left but the last bit of a float."""
_MOST_PIXELS = 1 << 26
_PROBES = ((1, 1), (7, 300), (400, 9), (640, 427), (33, 65), (225, 224), (57, 301))
"""Widths and heights of noise on which the rule is tried, beside the samples."""
_SHOWN = 3


class ImageCase(Case):
    """One picture, and 64 of its prepared values: value k is at the place 10007 k, modulo their number, in NCHW."""

    image: str
    pixels: tuple[float, ...]

    @property
    def shown(self) -> str:
        """Its file."""
        return repr(self.image)

    @property
    def uses(self) -> tuple[str, ...]:
        """That file."""
        return (self.image,)


class ImageRule:
    """The rule of a manifest over the pictures of its bundle."""

    def __init__(self, folder: Path, rule: PrepareImage) -> None:
        self.folder, self.rule = folder, rule
        levels = np.arange(256)[None, :] * rule.rescale_factor
        mean, std = np.array(rule.mean)[:, None], np.array(rule.std)[:, None]
        self._values = ((levels - mean) / std).astype(np.float32)

    @property
    def mode(self) -> Mode:
        """Return Pillow's name for the channels, apart from their order."""
        return "L" if self.rule.channels == "L" else "RGB"

    def pixels(self, image: Image.Image) -> np.ndarray:
        """An upright, opaque image as floats [1, channels, height, width]. Raises `BundleError` for a huge one."""
        rule = self.rule
        if rule.resize is not None:
            image = self._resized(image, rule.resize)
        found = np.asarray(image).reshape(image.height, image.width, -1)
        if rule.channels == "BGR":
            found = found[:, :, ::-1]
        found = found.transpose(2, 0, 1)
        if rule.center_crop is not None:
            found = _cropped(found, rule.center_crop)
        return np.stack([values[channel] for values, channel in zip(self._values, found, strict=True)])[None]

    def open(self, name: str) -> Image.Image:
        """A picture of the bundle. Raises `BundleError`."""
        try:
            return decode(media(name, self.folder) or {}, self.mode, Counter())
        except DataError as error:
            raise BundleError(f"A picture of the self-test cannot be read: {error}", where=str(self.folder)) from error

    def feed(self, case: ImageCase) -> Batch:
        """The picture, prepared."""
        return {self.rule.input: self.pixels(self.open(case.image))}

    def difference(self, case: ImageCase) -> tuple[str, str] | None:
        """See `Preparation`."""
        return other_values(self.pixels(self.open(case.image)), case.pixels, "prepared value", _TOLERANCE)

    def _resized(self, image: Image.Image, how: Resize) -> Image.Image:
        from PIL import Image

        width, height = how.width, how.height
        if width is None or height is None:
            edge, short, long = how.shortest_edge or 1, min(image.size), max(image.size)
            other = int(edge * long / short)
            width, height = (edge, other) if image.width <= image.height else (other, edge)
        if width * height > _MOST_PIXELS:
            raise BundleError(
                f"A picture of {image.width} x {image.height} would be resized to {width} x {height}.",
                expected=f"at most {_MOST_PIXELS} pixels",
            )
        return image.resize((width, height), Image.Resampling[how.filter.upper()])


def sampled(pixels: np.ndarray) -> tuple[float, ...]:
    """Return the prepared values that a case stores, rounded to seven digits."""
    flat = pixels.ravel()
    return tuple(float(f"{flat[place * _STEP % flat.size]:.7g}") for place in range(_PLACES))


def other_values(values: np.ndarray, known: Sequence[float], what: str, tolerance: float) -> tuple[str, str] | None:
    """Compare prepared values with those that a case stores.

    Args:
        values: Prepared values.
        known: Stored values.
        what: Name of a value, for the message.
        tolerance: Largest difference that is ignored.

    Returns:
        The prepared and the expected value with the largest difference, or None.
    """
    found, expected = np.array(sampled(values)), np.array(known)
    if found.shape != expected.shape:
        return f"{found.size} {what}s", f"{expected.size}"
    apart = np.abs(found - expected)
    if apart.max() <= tolerance:
        return None
    worst = int(apart.argmax())
    return f"{what} {worst} is {found[worst]:.6g}", f"{expected[worst]:.6g} within {tolerance:g}"


def _cropped(found: np.ndarray, crop: Crop) -> np.ndarray:
    """Of [channels, height, width] the middle; zeros beyond."""
    channels, height, width = found.shape
    top, left = (height - crop.height) // 2, (width - crop.width) // 2
    whole = np.zeros((channels, crop.height, crop.width), np.uint8)
    inner = found[:, max(top, 0) : top + crop.height, max(left, 0) : left + crop.width]
    down, right = max(-top, 0), max(-left, 0)
    whole[:, down : down + inner.shape[1], right : right + inner.shape[2]] = inner
    return whole


def find_rule(processor: Any) -> PrepareImage:
    """The rule by which an app prepares what ``processor``, an image processor of transformers, does.

    Only what it says is read here; whether that is all it does, `make_cases` proves. Raises `ModelError`.
    """

    def said(name: str) -> Any:
        return getattr(processor, name, None)

    resize, crop = _resize(said) if said("do_resize") else None, said("crop_size") if said("do_center_crop") else None
    if resize is not None and resize.shortest_edge is not None and said("crop_pct"):
        # ConvNeXT's: resized to more, and cut to what the size says.
        side = resize.shortest_edge
        crop = {"height": side, "width": side}
        resize = Resize(filter=resize.filter, shortest_edge=int(side / said("crop_pct")))
    mean, std = (said("image_mean"), said("image_std")) if said("do_normalize") else ((0.0,) * 3, (1.0,) * 3)
    channels: Channels = "L" if len(mean) == 1 else "BGR" if said("do_flip_channel_order") else "RGB"
    return PrepareImage(
        input=INPUT,
        channels=channels,
        resize=resize,
        center_crop=None if crop is None else Crop(height=crop["height"], width=crop["width"]),
        rescale_factor=said("rescale_factor") if said("do_rescale") else 1.0,
        mean=tuple(mean),
        std=tuple(std),
    )


def _resize(said: Any) -> Resize:
    size, number = dict(said("size")), said("resample")
    named = {name: value for name, value in size.items() if value is not None}
    name = _FILTERS.get(int(2 if number is None else number))
    if name is None or named.keys() not in ({"height", "width"}, {"shortest_edge"}):
        raise _no_rule(f"it resizes to {named} with Pillow's filter {number}")
    return Resize.model_validate({"filter": name, **named})


def check_rule(way: ImageRule, name: str, image: Image.Image, processor: Any) -> None:
    """Raises `ModelError` where transformers prepares the image otherwise than the rule does."""
    wanted = np.asarray(processor([image])[INPUT])
    found = way.pixels(image)
    if wanted.shape != found.shape:
        raise _no_rule(f"of {name} it makes {list(wanted.shape)}, the rule {list(found.shape)}")
    apart = float(np.abs(wanted - found).max())
    if not apart <= _TOLERANCE:
        raise _no_rule(f"of {name} it makes values that are {apart:.3g} apart from the rule's")


def _no_rule(reason: str) -> ModelError:
    return ModelError(
        f"The image processor cannot be described to an app: {reason}.",
        expected="resizing (bilinear, bicubic, lanczos), cutting out the middle, rescaling and normalising, in order",
    )


def _make_cases(folder: Path, rule: PrepareImage, samples: Sequence[str], processor: Any) -> Sequence[ImageCase]:
    """Of samples, which are paths of pictures: kept as PNG, no side longer than 512."""
    way = ImageRule(folder, rule)
    (folder / FOLDER).mkdir()
    contents = [_small(path, way.mode) for path in samples] or pictures()
    names = [f"{FOLDER}/{number}.png" for number in range(1, len(contents) + 1)]
    for name, content in zip(names, contents, strict=True):
        (folder / name).write_bytes(content)
        check_rule(way, name, way.open(name), processor)
    for size in _PROBES:
        check_rule(way, f"noise of {size[0]} x {size[1]}", noise(*size, way.mode), processor)
    return [ImageCase(image=name, pixels=sampled(way.pixels(way.open(name)))) for name in names]


def _small(path: str, mode: Mode) -> bytes:
    """A picture of the user's, no larger than a self-test needs, without loss from there on. Raises `InputError`."""
    if not Path(path).is_file():
        raise InputError("There is no such picture.", where=path, expected="for --sample, the path of a picture")
    image = decode(media(path, None) or {}, mode, Counter())
    image.thumbnail((_LONGEST, _LONGEST))
    file = io.BytesIO()
    image.info.clear()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


IMAGES = Inputs(
    plural="pictures",
    folder="image",
    case=ImageCase,
    meanings={INPUT: "prepared images, one a row"},
    required=frozenset({INPUT}),
    # Node has no decoder of pictures.
    node_files=("image/picture_of_file.mjs", "image/png.mjs"),
    find_rule=lambda folder, processor, max_length: find_rule(processor),
    open=ImageRule,
    make_cases=_make_cases,
    shown=lambda cases: [case.image for case in cases[:_SHOWN]],
)
