"""Preparation of images by the rule of a manifest, without transformers, and test images drawn from formulas."""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.data.media import Mode, decode, media
from compress.formats.runtime import Batch
from compress.plugins.apps.app_type import Case, Inputs, first_difference, sampled
from compress.plugins.apps.preprocess import Channels, Crop, PrepareImage, Resize
from compress.utils.errors import BundleError, DataError, InputError, ModelError
from compress.utils.read_limits import LIMITS

if TYPE_CHECKING:
    from PIL import Image

    from compress.models.model import Processor


@functools.cache
def synthetic_images() -> Sequence[bytes]:
    """Return PNG files of synthetic images: a landscape, a disc, tiles, grey stripes, noise, and one of six pixels.

    They cover colour and grey, transparency, sizes above and below those of any model, odd sides, and patterns of one
    pixel, which only the right resampling filter reproduces.
    """
    from PIL import Image

    # Draw a sky, a sun and hills with antialiased edges: at three times the size, averaged 3 by 3 at the end.
    height = 300
    y, x = np.mgrid[0 : 3 * height, 0 : 3 * 400] / (3 * height)
    row = (np.floor(y * height) / height)[..., None]
    canvas = (1 - row) * np.array((96, 148, 214)) + row * np.array((250, 214, 165))
    canvas[np.hypot(x - 0.95, y - 0.38) < 0.12] = (255, 240, 190)
    for number, colour in enumerate(((84, 120, 92), (52, 92, 70), (34, 62, 54))):
        ridge = 0.55 + 0.15 * number + 0.07 * np.sin(x * (5 - number) + 2.3 * number) + 0.02 * np.sin(17 * x + number)
        canvas[y > ridge] = colour
    landscape = np.asarray(canvas.reshape(height, 3, 400, 3, 3).mean(axis=(1, 3)), np.uint8)
    # Draw grey stripes that get finer from top to bottom.
    y = np.mgrid[0:301, 0:97][0] / 301
    stripes = np.where(np.sin(60 * y * y * y) > 0, 220, 60).astype(np.uint8)
    arrays = (landscape, _fruit(200), _tiles(480, 360), stripes, _noise(61, 43), _noise(3, 2))
    return tuple(_png(Image.fromarray(array)) for array in arrays)


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


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


INPUT = "pixel_values"
FOLDER = "samples"
_TOLERANCE = 1e-4
"""Largest difference of a prepared value.

Pillow resamples in integers, so that only the last bit of a float differs.
"""


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


class ImageInputs(Inputs):
    """Images, prepared by Pillow."""

    plural, web = "pictures", "image"
    case = ImageCase
    meanings = {INPUT: "prepared images, one a row"}
    required = frozenset({INPUT})
    # Node has no decoder of pictures.
    node_files = ("image/picture_of_file.mjs", "image/png.mjs")
    rule: PrepareImage

    @classmethod
    def find_rule(cls, folder: Path, processor: Processor, max_length: int) -> PrepareImage:
        """Return the rule for an image processor of transformers.

        The rule contains the processor's settings. `make_cases` verifies that the processor does nothing else.

        Raises:
            ModelError: A setting has no counterpart in the rule.
        """

        def setting(name: str) -> Any:
            return getattr(processor, name, None)

        resize, crop = None, setting("crop_size") if setting("do_center_crop") else None
        if setting("do_resize"):
            size = {name: value for name, value in dict(setting("size")).items() if value is not None}
            number = setting("resample")
            # Hugging Face uses Pillow's filter numbers.
            name = {2: "bilinear", 3: "bicubic", 1: "lanczos"}.get(int(2 if number is None else number))
            if name is None or size.keys() not in ({"height", "width"}, {"shortest_edge"}):
                raise _no_rule(f"it resizes to {size} with Pillow's filter {number}")
            if (side := size.get("shortest_edge")) is not None and (share := setting("crop_pct")):
                # ConvNeXT resizes to a larger size and crops the centre.
                crop, size = {"height": side, "width": side}, {"shortest_edge": int(side / share)}
            resize = Resize.model_validate({"filter": name, **size})
        mean, std = (0.0,) * 3, (1.0,) * 3
        if setting("do_normalize"):
            mean, std = tuple(setting("image_mean")), tuple(setting("image_std"))
        channels: Channels = "L" if len(mean) == 1 else "BGR" if setting("do_flip_channel_order") else "RGB"
        return PrepareImage(
            input=INPUT,
            channels=channels,
            resize=resize,
            center_crop=None if crop is None else Crop(height=crop["height"], width=crop["width"]),
            rescale_factor=setting("rescale_factor") if setting("do_rescale") else 1.0,
            mean=mean,
            std=std,
        )

    def make_cases(self, samples: Sequence[str], processor: Processor) -> Sequence[ImageCase]:
        """Store the samples as PNG files with at most 512 pixels a side, verify the rule, and return a case for each.

        Raises:
            InputError: A sample does not exist.
            ModelError: The processor prepares an image differently than the rule.
        """
        (self.folder / FOLDER).mkdir()
        contents = []
        for path in samples:
            if not Path(path).is_file():
                raise InputError(
                    "There is no such picture.", where=path, expected="for --sample, the path of a picture"
                )
            image = decode(media(path, None) or {}, self.mode, Counter())
            image.thumbnail((512, 512))
            # Metadata may contain personal data, such as a location.
            image.info.clear()
            contents.append(_png(image))
        names = []
        for number, content in enumerate(contents or synthetic_images(), 1):
            names.append(f"{FOLDER}/{number}.png")
            (self.folder / names[-1]).write_bytes(content)
            self._check(names[-1], self.open(names[-1]), processor)
        # Samples may not need every branch of the rule, so that noise of other sizes is tried too.
        for size in ((1, 1), (7, 300), (400, 9), (640, 427), (33, 65), (225, 224), (57, 301)):
            self._check(f"noise of {size[0]} x {size[1]}", noise(*size, self.mode), processor)
        return [ImageCase(image=name, pixels=sampled(self.pixels(self.open(name)))) for name in names]

    def _check(self, name: str, image: Image.Image, processor: Processor) -> None:
        """Raise `ModelError` if transformers prepares an image differently than the rule."""
        expected, prepared = np.asarray(processor([image])[INPUT]), self.pixels(image)
        if expected.shape != prepared.shape:
            raise _no_rule(f"of {name} it makes {list(expected.shape)}, the rule {list(prepared.shape)}")
        difference = float(np.abs(expected - prepared).max())
        # `not <=` also rejects NaN.
        if not difference <= _TOLERANCE:
            raise _no_rule(f"of {name} it makes values that are {difference:.3g} apart from the rule's")

    @property
    def mode(self) -> Mode:
        """Pillow's name for the channels, without their order."""
        return "L" if self.rule.channels == "L" else "RGB"

    @functools.cached_property
    def values(self) -> np.ndarray:
        """Prepared value of each of the 256 levels of a channel, [channels, 256]."""
        levels = np.arange(256)[None, :] * self.rule.rescale_factor
        values: np.ndarray = (levels - np.array(self.rule.mean)[:, None]) / np.array(self.rule.std)[:, None]
        return values.astype(np.float32)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Return an upright, opaque image as floats [1, channels, height, width].

        Raises `BundleError` if it is huge.
        """
        from PIL import Image

        rule = self.rule
        if (how := rule.resize) is not None:
            width, height = how.width, how.height
            # The longer side is rounded down.
            if width is None or height is None:
                edge, short, long = how.shortest_edge or 1, min(image.size), max(image.size)
                other = int(edge * long / short)
                width, height = (edge, other) if image.width <= image.height else (other, edge)
            # A very narrow image would become huge if its shorter side is enlarged.
            if width * height > LIMITS.pixels:
                raise BundleError(
                    f"A picture of {image.width} x {image.height} would be resized to {width} x {height}.",
                    expected=f"at most {LIMITS.pixels} pixels",
                )
            image = image.resize((width, height), Image.Resampling[how.filter.upper()])
        # Pillow pads with zeros where the crop exceeds the image.
        if (crop := rule.center_crop) is not None:
            left, top = (image.width - crop.width) // 2, (image.height - crop.height) // 2
            image = image.crop((left, top, left + crop.width, top + crop.height))
        array = np.asarray(image).reshape(image.height, image.width, -1)
        if rule.channels == "BGR":
            array = array[:, :, ::-1]
        array = array.transpose(2, 0, 1)
        return np.stack([values[channel] for values, channel in zip(self.values, array, strict=True)])[None]

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

    @classmethod
    def shown(cls, cases: Sequence[ImageCase]) -> list[str]:
        """Return the paths of the first images."""
        return [case.image for case in cases[:3]]


def _no_rule(reason: str) -> ModelError:
    return ModelError(
        f"The image processor cannot be described to an app: {reason}.",
        expected="resizing (bilinear, bicubic, lanczos), cutting out the middle, rescaling and normalising, in order",
    )


class UncroppedImages(ImageInputs):
    """Images whose boxes and masks are places of the whole image."""

    @classmethod
    def find_rule(cls, folder: Path, processor: Processor, max_length: int) -> PrepareImage:
        """Return the image rule without cropping. Raises `ModelError` if the image processor crops images."""
        rule = super().find_rule(folder, processor, max_length)
        if rule.center_crop is not None:
            raise ModelError(
                "The image processor cuts out the middle of a picture, and places would be those of the middle.",
                expected='"do_center_crop": false in preprocessor_config.json',
            )
        return rule
