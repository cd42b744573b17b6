"""Images as a model's own processor prepares them, made once or whenever they are asked for. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.data.media import Mode, decode, in_words
from compress.tasks.lazy_examples import OnDemand
from compress.tasks.task import Examples
from compress.utils.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

PIXELS = "pixel_values"
_AT_ONCE = 256
"""Images that the processor is given at once."""
_IN_MEMORY_BYTES = 1 << 30
"""Up to so many bytes of pixels are made once and kept; beyond, an image is decoded whenever it is asked for."""
_BLACK = (64, 64)
"""Width and height of the image that shows what black becomes; its middle is no padding of the processor's."""


def encode_images(values: Sequence[Mapping[str, Any]], processor: Any) -> Examples:
    """Examples of ``values`` of an image column, without labels. Raises `DataError` for a broken image.

    The note says which images had to be converted.
    """
    import numpy as np

    images = Images(values, processor)
    sizes = np.full(len(images), images[0][PIXELS].shape[-1] if len(images) else 0)
    inputs = images if images.size_bytes > _IN_MEMORY_BYTES else images.all()
    note = in_words(images.conversions, len(images))
    return Examples(inputs, {PIXELS: None}, note=note, sizes=sizes, black_pixel=images.black())


class Images(OnDemand):
    """Images that are decoded and prepared when they are asked for; ``conversions`` counts what was done to them."""

    def __init__(self, values: Sequence[Mapping[str, Any]], processor: Any) -> None:
        self._values = values
        self._processor = processor
        self._mode = mode_of(processor)
        self.conversions: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._values)

    def some(self, which: slice) -> Sequence[Mapping[str, np.ndarray]]:
        """Prepared at once."""
        return self._prepared(self._values[which], Counter())

    @property
    def size_bytes(self) -> int:
        """Of all of them, once prepared."""
        return len(self) * int(self[0][PIXELS].nbytes) if len(self) else 0

    def all(self) -> list[Mapping[str, np.ndarray]]:
        """Every image, prepared."""
        found: list[Mapping[str, np.ndarray]] = []
        for start in range(0, len(self), _AT_ONCE):
            found += self._prepared(self._values[start : start + _AT_ONCE], self.conversions)
        return found

    def black(self) -> np.ndarray:
        """What a black pixel becomes, [channels]."""
        from PIL import Image

        (found,) = self._through_processor([Image.new(self._mode, _BLACK)])
        return found[PIXELS][:, found[PIXELS].shape[1] // 2, found[PIXELS].shape[2] // 2]

    def _prepared(self, values: Sequence[Mapping[str, Any]], conversions: Counter[str]) -> list[dict[str, np.ndarray]]:
        return self._through_processor([decode(value, self._mode, conversions) for value in values])

    def _through_processor(self, images: list[Image.Image]) -> list[dict[str, np.ndarray]]:
        import numpy as np

        try:
            found = self._processor(images)[PIXELS]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"The model's processor refuses an image: {error}",
                expected="a preprocessor_config.json that fits the model",
            ) from error
        return [{PIXELS: np.ascontiguousarray(pixels, dtype=np.float32)} for pixels in found]


def mode_of(processor: Any) -> Mode:
    """Grayscale for a processor that normalises one channel, else RGB."""
    mean = getattr(processor, "image_mean", None)
    return "L" if isinstance(mean, Sequence) and len(mean) == 1 else "RGB"


def one_by_one(processor: Any) -> Any:
    """An image processor that takes images apart; one of several images to a text is given each as the only one.

    Idefics3's and SmolVLM's: its pixels are [images, 1, channels, height, width].
    """
    return processor if getattr(processor, "do_image_splitting", None) is None else _OnlyImage(processor)


@dataclass(frozen=True)
class _OnlyImage:
    processor: Any

    @property
    def image_mean(self) -> Any:
        """Of each channel."""
        return self.processor.image_mean

    def __call__(self, images: Sequence[Any]) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.processor([[image] for image in images])
        return found
