"""Preparation of images by the rule of a manifest, without transformers, and test images drawn from formulas."""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.data.media import Mode, decode, media
from compress.formats.runtime import Batch
from compress.plugins.apps.app_type import Case, Inputs
from compress.plugins.apps.preprocess import Channels, Crop, PrepareImage, Resize
from compress.utils.errors import BundleError, DataError, InputError, ModelError

if TYPE_CHECKING:
    from PIL import Image

    from compress.models.model import Processor


_SKY, _SUN, _HILLS = ((96, 148, 214), (250, 214, 165)), (255, 240, 190), ((84, 120, 92), (52, 92, 70), (34, 62, 54))


@functools.cache
def synthetic_images() -> Sequence[bytes]:
    """Return PNG files of synthetic images: a landscape, a disc, tiles, grey stripes, noise, and one of six pixels.

    They cover colour and grey, transparency, sizes above and below those of any model, odd sides, and patterns of one
    pixel, which only the right resampling filter reproduces.
    """
    # Draw a sky, a sun and hills with antialiased edges (3 by 3 supersampling).
    height = 300
    # Draw at three times the size, and average 3 by 3 points at the end.
    y, x = np.mgrid[0 : 3 * height, 0 : 3 * 400] / (3 * height)
    row = (np.floor(y * height) / height)[..., None]
    canvas = (1 - row) * np.array(_SKY[0]) + row * np.array(_SKY[1])
    canvas[np.hypot(x - 0.95, y - 0.38) < 0.12] = _SUN
    for number, colour in enumerate(_HILLS):
        ridge = 0.55 + 0.15 * number + 0.07 * np.sin(x * (5 - number) + 2.3 * number) + 0.02 * np.sin(17 * x + number)
        canvas[y > ridge] = colour
    arrays = (
        np.asarray(canvas.reshape(height, 3, 400, 3, 3).mean(axis=(1, 3)), np.uint8),
        _fruit(200),
        _tiles(480, 360),
        _stripes(97, 301),
        _noise(61, 43),
        _noise(3, 2),
    )
    return tuple(map(_png, arrays))


def noise(width: int, height: int, mode: Mode) -> Image.Image:
    """Return a deterministic noise image."""
    from PIL import Image

    return Image.fromarray(_noise(width, height)).convert(mode)


def _noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng((width, height)).integers(0, 256, (height, width, 3), np.uint8)


def _fruit(side: int) -> np.ndarray:
    """Draw a disc with a transparent background, edge and shadow."""
    y, x = (np.mgrid[0:side, 0:side] + 0.5) / side - 0.5
    far = np.hypot(x, y)
    shade = np.floor(16 * np.clip(1 - np.hypot(x + 0.12, y + 0.14) * 1.6, 0, 1)) / 16
    colour = np.stack([150 + 95 * shade, 40 + 120 * shade, 40 + 60 * shade], axis=-1)
    alpha = np.clip((0.42 - far) * 24, 0, 1) * 255
    return np.dstack([colour, alpha]).astype(np.uint8)


def _tiles(width: int, height: int) -> np.ndarray:
    """Draw tiles of eight colours. Every third tile is a checkerboard of single pixels."""
    y, x = np.mgrid[0:height, 0:width]
    number = (x // 60 + 3 * (y // 60)) % 8
    canvas = np.stack([np.where(number & bit, 230, 40) for bit in (1, 2, 4)], axis=-1)
    fine = ((x // 60 + y // 60) % 3 == 0) & ((x + y) % 2 == 0)
    canvas[fine] = 255 - canvas[fine]
    return canvas.astype(np.uint8)


def _stripes(width: int, height: int) -> np.ndarray:
    """Draw grey stripes that get finer from top to bottom."""
    y = np.mgrid[0:height, 0:width][0] / height
    return np.where(np.sin(60 * y * y * y) > 0, 220, 60).astype(np.uint8)


def _png(array: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", optimize=True)
    return file.getvalue()


INPUT = "pixel_values"
FOLDER = "samples"
_FILTERS = {2: "bilinear", 3: "bicubic", 1: "lanczos"}
"""Pillow's filter numbers, which Hugging Face uses too."""
_LONGEST = 512
"""Longest side of a user's sample in pixels. Bundles stay small, and models take smaller images."""
_PLACES, _STEP = 64, 10_007
_TOLERANCE = 1e-4
"""Largest difference of a prepared value.

Pillow resamples in integers, so that only the last bit of a float differs.
"""
_MOST_PIXELS = 1 << 26
_PROBES = ((1, 1), (7, 300), (400, 9), (640, 427), (33, 65), (225, 224), (57, 301))
"""Widths and heights of noise images on which the rule is verified."""
_SHOWN = 3


class ImageCase(Case):
    """Image and 64 of its prepared values: value k is at position 10007 k, modulo their number, in NCHW order."""

    image: str
    pixels: tuple[float, ...]

    @property
    def shown(self) -> str:
        """Path of the image, quoted for a message."""
        return repr(self.image)

    @property
    def uses(self) -> tuple[str, ...]:
        """Path of the image in the bundle."""
        return (self.image,)


class ImageRule:
    """Preparation of images of a bundle by the rule of its manifest."""

    def __init__(self, folder: Path, rule: PrepareImage) -> None:
        self.folder, self.rule = folder, rule
        # Rescaling and normalisation map each of the 256 levels of a channel to one float.
        levels = np.arange(256)[None, :] * rule.rescale_factor
        mean, std = np.array(rule.mean)[:, None], np.array(rule.std)[:, None]
        self._values = ((levels - mean) / std).astype(np.float32)

    @property
    def mode(self) -> Mode:
        """Pillow's name for the channels, without their order."""
        return "L" if self.rule.channels == "L" else "RGB"

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Return an upright, opaque image as floats [1, channels, height, width].

        Raises `BundleError` if it is huge.
        """
        rule = self.rule
        if rule.resize is not None:
            image = self._resized(image, rule.resize)
        # Pillow pads with zeros where the crop exceeds the image.
        if (crop := rule.center_crop) is not None:
            left, top = (image.width - crop.width) // 2, (image.height - crop.height) // 2
            image = image.crop((left, top, left + crop.width, top + crop.height))
        array = np.asarray(image).reshape(image.height, image.width, -1)
        if rule.channels == "BGR":
            array = array[:, :, ::-1]
        array = array.transpose(2, 0, 1)
        return np.stack([values[channel] for values, channel in zip(self._values, array, strict=True)])[None]

    def open(self, name: str) -> Image.Image:
        """Return an image of the bundle. Raises `BundleError`."""
        try:
            return decode(media(name, self.folder) or {}, self.mode, Counter())
        except DataError as error:
            raise BundleError(f"A picture of the self-test cannot be read: {error}", where=str(self.folder)) from error

    def feed(self, case: ImageCase) -> Batch:
        """Return the prepared image of a case."""
        return {self.rule.input: self.pixels(self.open(case.image))}

    def difference(self, case: ImageCase) -> tuple[str, str] | None:
        """Return the first differing value and the expected one, or None."""
        return first_difference(self.pixels(self.open(case.image)), case.pixels, "prepared value", _TOLERANCE)

    def _resized(self, image: Image.Image, how: Resize) -> Image.Image:
        """Return the image at the size of the rule. The longer side is rounded down."""
        from PIL import Image

        width, height = how.width, how.height
        if width is None or height is None:
            edge, short, long = how.shortest_edge or 1, min(image.size), max(image.size)
            other = int(edge * long / short)
            width, height = (edge, other) if image.width <= image.height else (other, edge)
        # A very narrow image would become huge if its shorter side is enlarged.
        if width * height > _MOST_PIXELS:
            raise BundleError(
                f"A picture of {image.width} x {image.height} would be resized to {width} x {height}.",
                expected=f"at most {_MOST_PIXELS} pixels",
            )
        return image.resize((width, height), Image.Resampling[how.filter.upper()])


def sampled(pixels: np.ndarray) -> tuple[float, ...]:
    """Return the prepared values that a case stores, rounded to seven digits."""
    flat = pixels.ravel()
    # The step is prime, so that the positions spread over all channels and rows.
    return tuple(float(f"{flat[index * _STEP % flat.size]:.7g}") for index in range(_PLACES))


def first_difference(values: np.ndarray, known: Sequence[float], what: str, tolerance: float) -> tuple[str, str] | None:
    """Compare prepared values with those that a case stores.

    Args:
        values: Prepared values.
        known: Stored values.
        what: Name of a value, for the message.
        tolerance: Largest difference that is ignored.

    Returns:
        The prepared and the expected value with the largest difference, or None.
    """
    prepared, expected = np.array(sampled(values)), np.array(known)
    if prepared.shape != expected.shape:
        return f"{prepared.size} {what}s", f"{expected.size}"
    differences = np.abs(prepared - expected)
    if differences.max() <= tolerance:
        return None
    worst = int(differences.argmax())
    return f"{what} {worst} is {prepared[worst]:.6g}", f"{expected[worst]:.6g} within {tolerance:g}"


def find_rule(processor: Processor) -> PrepareImage:
    """Return the rule for an image processor of transformers.

    The rule contains the processor's settings. `_make_cases` verifies that the processor does nothing else.

    Raises:
        ModelError: A setting has no counterpart in the rule.
    """

    def setting(name: str) -> Any:
        return getattr(processor, name, None)

    resize = _resize(setting) if setting("do_resize") else None
    crop = setting("crop_size") if setting("do_center_crop") else None
    if resize is not None and resize.shortest_edge is not None and setting("crop_pct"):
        # ConvNeXT resizes to a larger size and crops the centre.
        side = resize.shortest_edge
        crop = {"height": side, "width": side}
        resize = Resize(filter=resize.filter, shortest_edge=int(side / setting("crop_pct")))
    mean, std = (setting("image_mean"), setting("image_std")) if setting("do_normalize") else ((0.0,) * 3, (1.0,) * 3)
    channels: Channels = "L" if len(mean) == 1 else "BGR" if setting("do_flip_channel_order") else "RGB"
    return PrepareImage(
        input=INPUT,
        channels=channels,
        resize=resize,
        center_crop=None if crop is None else Crop(height=crop["height"], width=crop["width"]),
        rescale_factor=setting("rescale_factor") if setting("do_rescale") else 1.0,
        mean=tuple(mean),
        std=tuple(std),
    )


def _resize(setting: Callable[[str], Any]) -> Resize:
    """Return the resizing of a processor. Raises `ModelError` for other filters or sizes."""
    size, number = dict(setting("size")), setting("resample")
    stated_sizes = {name: value for name, value in size.items() if value is not None}
    name = _FILTERS.get(int(2 if number is None else number))
    if name is None or stated_sizes.keys() not in ({"height", "width"}, {"shortest_edge"}):
        raise _no_rule(f"it resizes to {stated_sizes} with Pillow's filter {number}")
    return Resize.model_validate({"filter": name, **stated_sizes})


def check_rule(preparation: ImageRule, name: str, image: Image.Image, processor: Processor) -> None:
    """Raise `ModelError` if transformers prepares an image differently than the rule.

    Args:
        preparation: Rule of the manifest.
        name: Name of the image, for the message.
        image: Image to prepare.
        processor: Image processor of transformers.
    """
    expected = np.asarray(processor([image])[INPUT])
    prepared = preparation.pixels(image)
    if expected.shape != prepared.shape:
        raise _no_rule(f"of {name} it makes {list(expected.shape)}, the rule {list(prepared.shape)}")
    difference = float(np.abs(expected - prepared).max())
    # `not <=` also rejects NaN.
    if not difference <= _TOLERANCE:
        raise _no_rule(f"of {name} it makes values that are {difference:.3g} apart from the rule's")


def _no_rule(reason: str) -> ModelError:
    return ModelError(
        f"The image processor cannot be described to an app: {reason}.",
        expected="resizing (bilinear, bicubic, lanczos), cutting out the middle, rescaling and normalising, in order",
    )


def _make_cases(folder: Path, rule: PrepareImage, samples: Sequence[str], processor: Processor) -> Sequence[ImageCase]:
    """Store the samples as PNG files with at most 512 pixels a side, verify the rule, and return a case for each."""
    preparation = ImageRule(folder, rule)
    (folder / FOLDER).mkdir()
    contents = [_small(path, preparation.mode) for path in samples] or synthetic_images()
    names = [f"{FOLDER}/{number}.png" for number in range(1, len(contents) + 1)]
    for name, content in zip(names, contents, strict=True):
        (folder / name).write_bytes(content)
        check_rule(preparation, name, preparation.open(name), processor)
    # Samples may not need every branch of the rule, so that noise of other sizes is tried too.
    for size in _PROBES:
        check_rule(preparation, f"noise of {size[0]} x {size[1]}", noise(*size, preparation.mode), processor)
    return [ImageCase(image=name, pixels=sampled(preparation.pixels(preparation.open(name)))) for name in names]


def _small(path: str, mode: Mode) -> bytes:
    """Return the user's image as a small PNG file.

    Raises:
        InputError: The file does not exist.
    """
    if not Path(path).is_file():
        raise InputError("There is no such picture.", where=path, expected="for --sample, the path of a picture")
    image = decode(media(path, None) or {}, mode, Counter())
    image.thumbnail((_LONGEST, _LONGEST))
    file = io.BytesIO()
    # Metadata may contain personal data, such as a location.
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


def _find_uncropped_rule(folder: Path, processor: Processor, max_length: int) -> PrepareImage:
    """Return the image rule without cropping. Boxes are shares of the whole image.

    Raises:
        ModelError: The image processor crops images.
    """
    rule = find_rule(processor)
    if rule.center_crop is not None:
        raise ModelError(
            "The image processor cuts out the middle of a picture, and places would be those of the middle.",
            expected='"do_center_crop": false in preprocessor_config.json',
        )
    return rule


UNCROPPED_IMAGES = replace(IMAGES, find_rule=_find_uncropped_rule)
