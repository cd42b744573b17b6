"""Image preprocessing by the model's processor, eager or lazy. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.media import Mode, decode, in_words
from compress.models.model import TorchModel
from compress.tasks.lazy_modules import np
from compress.tasks.loading import Origin, load_with_head
from compress.tasks.task import Examples, Joined, NamedArrays, OnDemand
from compress.utils.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

    from compress.models.model import Processor

PIXELS = "pixel_values"
_AT_ONCE = 256
"""Number of images per call of the processor."""
_IN_MEMORY_BYTES = 1 << 30
"""Pixels up to this size are computed once and cached. Beyond it, images are decoded on each access."""
_BLACK = (64, 64)
"""Width and height of the image that shows the value of black; its middle is no padding of the processor."""


def encode_images(values: Sequence[Mapping[str, object]], processor: Processor) -> Examples:
    """Return examples of the values of an image column, without labels. Raises `DataError` for a broken image.

    The note tells which images were converted.
    """
    images = Images(values, processor)
    sizes = np.full(len(images), images[0][PIXELS].shape[-1] if len(images) else 0)
    inputs = images if images.size_bytes > _IN_MEMORY_BYTES else images.all()
    note = in_words(images.conversions, len(images))
    return Examples(inputs, {PIXELS: None}, note=note, sizes=sizes, black_pixel=images.black())


class Images(OnDemand):
    """Images that are decoded and preprocessed on access; ``conversions`` counts conversions."""

    def __init__(self, values: Sequence[Mapping[str, object]], processor: Processor) -> None:
        """Set the values and the processor."""
        self._values = values
        self._processor = processor
        self._mode = mode_of(processor)
        self.conversions: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._values)

    def some(self, which: slice) -> Sequence[NamedArrays]:
        """Return the preprocessed images of a slice."""
        return self._prepared(self._values[which], Counter())

    @property
    def size_bytes(self) -> int:
        """Return the size of all preprocessed images."""
        return len(self) * int(self[0][PIXELS].nbytes) if len(self) else 0

    def all(self) -> list[NamedArrays]:
        """Return all preprocessed images."""
        images: list[NamedArrays] = []
        for start in range(0, len(self), _AT_ONCE):
            images += self._prepared(self._values[start : start + _AT_ONCE], self.conversions)
        return images

    def black(self) -> np.ndarray:
        """Return the value of a black pixel after preprocessing, [channels]."""
        from PIL import Image

        (example,) = self._through_processor([Image.new(self._mode, _BLACK)])
        return example[PIXELS][:, example[PIXELS].shape[1] // 2, example[PIXELS].shape[2] // 2]

    def _prepared(
        self, values: Sequence[Mapping[str, object]], conversions: Counter[str]
    ) -> list[dict[str, np.ndarray]]:
        return self._through_processor([decode(value, self._mode, conversions) for value in values])

    def _through_processor(self, images: list[Image.Image]) -> list[dict[str, np.ndarray]]:
        try:
            arrays = self._processor(images)[PIXELS]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"The model's processor refuses an image: {error}",
                expected="a preprocessor_config.json that fits the model",
            ) from error
        return [{PIXELS: np.ascontiguousarray(pixels, dtype=np.float32)} for pixels in arrays]


def mode_of(processor: Processor) -> Mode:
    """Return grayscale for a processor that normalizes one channel, else RGB."""
    mean = getattr(processor, "image_mean", None)
    return "L" if isinstance(mean, Sequence) and len(mean) == 1 else "RGB"


def one_by_one(processor: Processor) -> Processor:
    """Return an image processor that processes images separately, for processors that expect several images per text.

    This applies to Idefics3 and SmolVLM, whose pixels are [images, 1, channels, height, width].
    """
    return processor if getattr(processor, "do_image_splitting", None) is None else _OnlyImage(processor)


@dataclass(frozen=True)
class _OnlyImage:
    processor: Processor

    @property
    def image_mean(self) -> Any:
        """Return the mean of each channel."""
        return self.processor.image_mean

    def __call__(self, images: Sequence[object]) -> Mapping[str, Any]:
        batch: Mapping[str, Any] = self.processor([[image] for image in images])
        return batch


def load_model(
    task: str,
    directory: Path,
    heads: Sequence[str],
    labels: Sequence[str] | None,
    trust_remote_code: bool,
    answers: Callable[[Any, Any, Any], Any],
) -> TorchModel:
    """Load weights and image processor by `AutoModelFor` plus the first of ``heads``. A missing head is initialized.

    Args:
        task: Name of the task, for messages.
        directory: Folder of the model.
        heads: Suffixes of class names that have the head.
        labels: Class names for a new head.
        trust_remote_code: Allow code of the repository.
        answers: Adapts the outputs of a plain torch module (see `compress.models.custom_module`).

    Raises:
        ModelError: If files do not load.
        DataError: If a trained head lacks a label.
    """
    from compress.models.processor import load_processor

    expected = "an image model with a preprocessor_config.json, in Hugging Face layout"
    origin = Origin(task, directory, load_processor, expected, answers)
    return load_with_head(origin, heads, labels, trust_remote_code)


def encode_places(
    values: Sequence[Mapping[str, object]], processor: Processor, more: Sequence[NamedArrays]
) -> Examples:
    """Return images of equal size with additional inputs ``more`` for each. Raises `DataError`.

    Augmentation would move the answers, so ``black_pixel`` is None.
    """
    check_size(processor)
    examples = encode_images(values, processor)
    return replace(examples, inputs=Joined(examples.inputs, more), black_pixel=None)


def check_size(processor: Processor) -> None:
    """Raise `DataError` for a processor that keeps the sizes of images."""
    size = getattr(processor, "size", None) or {}
    if getattr(processor, "do_resize", False) and size.get("height") and size.get("width"):
        return
    description = ", ".join(f"{name} {value}" for name, value in dict(size).items() if value) or "as they are"
    raise DataError(
        f"The model's processor does not resize images to one size: {description}.",
        where="preprocessor_config.json",
        expected="one size for all images, as the exported graph requires",
        hint='write "do_resize": true, "do_pad": false and "size": {"height": 512, "width": 512} into it, in pixels '
        "that suit the model",
    )
