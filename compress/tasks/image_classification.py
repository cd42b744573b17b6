"""Image classification: one image, one label. Importing this imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from compress.checkpoints.allowed_code import MODULE_KEY
from compress.checkpoints.torch_model import TorchModel
from compress.data.columns import Column
from compress.data.media import Mode, decode, in_words
from compress.data.slices import Slice
from compress.errors import DataError, ModelError
from compress.tasks.capability import ANSWERS_AT_ONCE, HAS_CLASSES, READS_ROWS, TAKES_IMAGES
from compress.tasks.task import Examples, Kept, Task

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from PIL import Image

    from compress.measurement import Measurement
    from compress.tasks.evaluation import Evaluation

_LOGITS, _PIXELS = "logits", "pixel_values"
_AT_ONCE = 256
"""Images that the processor is given at once."""
_IN_MEMORY_BYTES = 1 << 30
"""Up to so many bytes of pixels are made once and kept; beyond, an image is decoded whenever it is asked for."""
_TOP = 5
_BLACK = (64, 64)
"""Width and height of the image that shows what black becomes; its middle is no padding of the processor's."""

_STARTER: dict[str, Any] = {
    "name": "my-image-classifier",
    "description": "a smaller, faster image classifier from my own photographs, in a folder for each class",
    "model": "google/vit-base-patch16-224",
    "data": {"splits": {"train": "photos/train", "validation": "photos/validation", "test": "photos/test"}},
    "stages": [{"finetune": {"epochs": 2}}, {"export": {}}, {"quantize": {}}],
    "baseline": "finetune",
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "accuracy", "at_least": 0.98, "of": "baseline"}],
}


class ImageClassification(Task):
    """Hugging Face `image-classification`."""

    name = "image-classification"
    columns = (Column("image", kind="image"), Column("label", label=True))
    capabilities = frozenset({READS_ROWS, TAKES_IMAGES, HAS_CLASSES, ANSWERS_AT_ONCE})
    architectures = ("ForImageClassification", "ForImageClassificationWithTeacher")
    app_steps = ("prepare-image", "softmax")
    starter = _STARTER
    slices = (Slice(column="label"),)

    def told_by(self, config: Mapping[str, Any]) -> bool:
        """Where a recipe's `module` makes the model."""
        return MODULE_KEY in config

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and image processor. Without a trained head, a new one is drawn from torch's generator.

        Raises `ModelError` for files that do not load and `DataError` for labels that a trained head lacks.
        """
        from compress.checkpoints.checks import refuse_quantized
        from compress.checkpoints.config_check import loading_failures
        from compress.checkpoints.processor import load_processor

        refuse_quantized(directory)
        try:
            processor = load_processor(directory)
            module = _load_module(directory, labels, trust_remote_code)
        except loading_failures() as error:
            raise ModelError(
                f"The model cannot be loaded for {self.name}: {error}",
                where=str(directory),
                expected="an image model with a preprocessor_config.json, in Hugging Face layout",
            ) from error
        return TorchModel(module.float().eval(), processor)

    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Decode, and prepare as the model's own processor does. Raises `DataError` for a broken image.

        ``max_length`` means nothing here. The note says which images had to be converted.
        """
        import numpy as np

        from compress.tasks.classes import label_ids

        images = _Images(rows["image"].to_pylist(), processor)
        ids = None
        if labels is not None and "label" in rows.column_names:
            ids = label_ids(rows["label"].to_pylist(), labels)
        sizes = np.full(len(images), images[0][_PIXELS].shape[-1] if len(images) else 0)
        inputs = images if images.size_bytes > _IN_MEMORY_BYTES else images.all()
        note = in_words(images.conversions, len(images))
        return Examples(inputs, {_PIXELS: None}, ids, note=note, sizes=sizes, black=images.black())

    def held_out(
        self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int, evaluation: Evaluation
    ) -> Examples:
        """Every row."""
        return self.encode(rows, processor, labels, max_length)

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy over the rows that have a label; a label of -100 marks a row without."""
        from compress.tasks.classes import cross_entropy

        return cross_entropy(outputs.logits.float(), labels)

    def keep(self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]) -> Kept:
        """The logits, [batch, classes]. Raises `DataError` for examples without labels."""
        from compress.tasks.classes import keep_logits

        return keep_logits(outputs, examples)

    def measure(self, kept: Kept, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Accuracy, macro F1, calibration error, Brier score and, of more than five classes, top-5 accuracy."""
        import numpy as np

        from compress.tasks.classes import class_rows, outcome_row

        rows = class_rows(kept, labels, model, target)
        logits = kept[_LOGITS]
        if labels is not None and logits.shape[-1] > _TOP:
            # Of equal logits the first counts, as argmax has it.
            first = np.argsort(-logits, axis=-1, kind="stable")[:, :_TOP]
            rows.insert(1, outcome_row(f"top_{_TOP}_accuracy", (first == labels[:, None]).any(axis=-1), model, target))
        return rows

    def probabilities(self, kept: Kept) -> np.ndarray:
        """Softmax of logits [n, classes]. Raises `ModelError` where they are not finite."""
        from compress.tasks.classes import class_probabilities

        return class_probabilities(kept)

    def compare(self, kept: Kept, reference: Kept, model: str, target: str) -> list[Measurement]:
        """On how many examples both choose the same class."""
        from compress.tasks.classes import same_class

        return same_class(kept, reference, model, target)


class _Images(Sequence["Mapping[str, np.ndarray]"]):
    """Images that are decoded and prepared when they are asked for; ``conversions`` counts what was done to them."""

    def __init__(self, values: Sequence[Mapping[str, Any]], processor: Any) -> None:
        self._values = values
        self._processor = processor
        self._mode = _mode(processor)
        self.conversions: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, np.ndarray]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]]:
        if isinstance(index, slice):
            return self._prepared(self._values[index], Counter())
        return self._prepared([self._values[index]], Counter())[0]

    @property
    def size_bytes(self) -> int:
        """Of all of them, once prepared."""
        return len(self) * int(self[0][_PIXELS].nbytes) if len(self) else 0

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
        return found[_PIXELS][:, found[_PIXELS].shape[1] // 2, found[_PIXELS].shape[2] // 2]

    def _prepared(self, values: Sequence[Mapping[str, Any]], conversions: Counter[str]) -> list[dict[str, np.ndarray]]:
        return self._through_processor([decode(value, self._mode, conversions) for value in values])

    def _through_processor(self, images: list[Image.Image]) -> list[dict[str, np.ndarray]]:
        import numpy as np

        try:
            found = self._processor(images)[_PIXELS]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"The model's processor refuses an image: {error}",
                expected="a preprocessor_config.json that fits the model",
            ) from error
        return [{_PIXELS: np.ascontiguousarray(pixels, dtype=np.float32)} for pixels in found]


def _load_module(directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> Any:
    """A transformers model, or a plain module that the recipe names."""
    from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from compress.architectures.cut_model import is_cut, load_cut
    from compress.checkpoints.json_file import read_json
    from compress.checkpoints.plain_module import load_plain
    from compress.tasks.classes import set_labels

    content = read_json(directory / "config.json")
    if MODULE_KEY in content:
        known = content.get("model_type") in CONFIG_MAPPING_NAMES
        config = (AutoConfig if known else PreTrainedConfig).from_pretrained(directory)
        if labels is not None:
            set_labels(config, labels, has_head="id2label" in content)
        return load_plain(directory, config)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if labels is not None:
        set_labels(config, labels, any("ImageClassification" in name for name in config.architectures or ()))
    if is_cut(config):
        return load_cut(AutoModelForImageClassification, directory, config)
    return AutoModelForImageClassification.from_pretrained(
        directory, config=config, trust_remote_code=trust_remote_code, use_safetensors=True
    )


def _mode(processor: Any) -> Mode:
    """Grayscale for a processor that normalises one channel, else RGB."""
    mean = getattr(processor, "image_mean", None)
    return "L" if isinstance(mean, Sequence) and len(mean) == 1 else "RGB"


TASK = ImageClassification()
