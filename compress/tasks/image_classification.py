"""Image classification: one label per image. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.columns import Column
from compress.models.config_checks import MODULE_KEY, is_timm
from compress.models.model import TorchModel
from compress.tasks.capability import HAS_CLASSES, READS_ROWS, SINGLE_CALL, TAKES_IMAGES
from compress.tasks.classes import Classification, outcome_row
from compress.tasks.image_inputs import encode_images, load_model
from compress.tasks.lazy_modules import np, pa
from compress.tasks.task import LOGITS, Examples, NamedArrays, relative_limit, split_folders, starter_recipe

if TYPE_CHECKING:
    from compress.models.model import Processor
    from compress.results.report import Measurement

_TOP = 5


class ImageClassification(Classification):
    """Hugging Face `image-classification`."""

    name = "image-classification"
    columns = (Column("image", kind="image"), Column("label", label=True))
    capabilities = frozenset({READS_ROWS, TAKES_IMAGES, HAS_CLASSES, SINGLE_CALL})
    architectures = ("ForImageClassification", "ForImageClassificationWithTeacher")
    metrics = (*Classification.metrics, "top_5_accuracy")
    app_steps = ("prepare-image", "softmax")
    starter = starter_recipe(
        "my-image-classifier",
        "a smaller, faster image classifier from my own photographs, in a folder for each class",
        "google/vit-base-patch16-224",
        split_folders("photos"),
        {"finetune": {"epochs": 2}, "onnx": {}, "onnx_int8": {"method": "static"}},
        relative_limit("accuracy", 0.98),
        baseline="finetune",
    )

    def matches_config(self, config: Mapping[str, Any]) -> bool:
        """Return whether the model is a plain torch module or a timm network."""
        return MODULE_KEY in config or is_timm(config)

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and image processor. A missing head is initialized randomly.

        Raises `ModelError` for files that do not load and `DataError` for labels that a trained head lacks.
        """
        from compress.models.custom_module import logits

        return load_model(self.name, directory, ("ImageClassification",), labels, trust_remote_code, logits)

    def encode_inputs(self, rows: pa.Table, processor: Processor, max_length: int) -> Examples:
        """Decode and preprocess the images with the model's processor. Raises `DataError` for a broken image.

        ``max_length`` has no effect. The note tells which images were converted.
        """
        return encode_images(rows["image"].to_pylist(), processor)

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return accuracy, macro F1, calibration error, Brier score and, for more than five classes, top-5 accuracy.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        rows = super().measure(collected, labels, model, target)
        logits = collected[LOGITS]
        if labels is not None and logits.shape[-1] > _TOP:
            # Of equal logits the first counts, as argmax has it.
            first = np.argsort(-logits, axis=-1, kind="stable")[:, :_TOP]
            rows.insert(1, outcome_row(f"top_{_TOP}_accuracy", (first == labels[:, None]).any(axis=-1), model, target))
        return rows


TASK = ImageClassification()
