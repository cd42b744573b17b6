"""Semantic segmentation: a class for each pixel of an image. Importing this imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from compress.data.annotations import IGNORED, MaskIds, check_as_large, read_mask
from compress.data.columns import Column
from compress.tasks.capability import HAS_CLASSES, LOCALIZES, READS_ROWS, SINGLE_CALL, TAKES_IMAGES
from compress.tasks.classes import finite, mean_row, ratio_row, required
from compress.tasks.image_inputs import encode_places, load_model
from compress.tasks.lazy_modules import losses, np, pa, torch
from compress.tasks.task import (
    LOGITS,
    Examples,
    Head,
    NamedArrays,
    Task,
    relative_limit,
    split_files,
    starter_recipe,
)
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.utils import ModelOutput

    from compress.models.model import Processor, TorchModel
    from compress.results.report import Measurement

_SIZE, _MASK = "size", "mask"
_SHARED, _FOUND, _WANTED, _NAMES, _ANSWERS = "shared", "found", "wanted", "names", "answers"


@dataclass(frozen=True)
class PixelLogits(Head):
    """Logits of each class [B, classes, h, w] on a grid coarser than the image.

    ``processor`` converts them to masks, ``labels`` are the class names.
    """

    processor: Processor = None
    labels: tuple[str, ...] | None = None


class ImageSegmentation(Task):
    """Hugging Face `image-segmentation`, semantic: models with logits per class and position, such as SegFormer.

    Masks are single-channel images whose pixels are class ids (indices in `data.labels`); 255 is ignored.
    """

    name = "image-segmentation"
    columns = (
        Column("image", kind="image"),
        Column("mask", kind="image", label=True, within=MaskIds(), check=check_as_large),
    )
    capabilities = frozenset({READS_ROWS, TAKES_IMAGES, HAS_CLASSES, SINGLE_CALL, LOCALIZES})
    architectures = ("ForSemanticSegmentation",)
    app_steps = ("prepare-image", "segment")
    starter = starter_recipe(
        "my-segmenter",
        "a smaller, faster image segmentation model, from my own images and masks",
        "nvidia/mit-b0",
        split_files("csv", {"image": "image", "mask": "mask"}, labels=["background", "thing"]),
        {
            "finetune": {"epochs": 20, "learning_rate": 6.0e-5, "batch_size": 8},
            "onnx": {},
            "onnx_int8": {"method": "static"},
        },
        relative_limit("mean_iou", 0.98),
        baseline="finetune",
    )
    ratios = ("mean_iou", "pixel_accuracy")
    metrics = ("mean_iou", "pixel_accuracy", "iou_{label}", "agreement")
    batch_size = 16

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and image processor. A missing head is initialized randomly.

        Raises `ModelError` for files that do not load, and `DataError` for labels that a trained head lacks.
        """
        model = load_model(self.name, directory, ("SemanticSegmentation",), labels, trust_remote_code, _plain_answers)
        if not hasattr(model.processor, "post_process_semantic_segmentation"):
            raise ModelError(
                f"A {type(model.processor).__name__} does not convert outputs to masks.",
                where=str(directory),
                expected="the preprocessor_config.json of a segmenter, e.g. of SegformerImageProcessor",
            )
        return model

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Preprocess the images with the model's processor; ``labels`` [n, height, width] are class ids.

        ``max_length`` has no effect. Raises `DataError` for a broken image or mask, and for a processor that keeps the
        sizes
        of images or counts classes from 1.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """
        from PIL import Image

        from compress.data.media import content, describe, picture_size

        if getattr(processor, "do_reduce_labels", False):
            raise DataError(
                "The model's processor counts the classes of masks from 1.",
                where="preprocessor_config.json",
                expected="the first class at 0, and 255 for ignored pixels",
                hint='write the masks so, and "do_reduce_labels": false',
            )
        values = rows["image"].to_pylist()
        more: list[dict[str, np.ndarray]] = [{_SIZE: np.array(picture_size(value)[::-1])} for value in values]
        head = PixelLogits(processor, None if labels is None else tuple(labels))
        examples = replace(encode_places(values, processor, more), head=head)
        if labels is None or "mask" not in rows.column_names:
            return examples
        size = (processor.size["width"], processor.size["height"])
        known = np.full((len(values), *size[::-1]), IGNORED, np.uint8)
        for row, value in enumerate(rows["mask"].to_pylist()):
            encoded = content(value)
            ids = read_mask(encoded, describe(value))
            more[row][_MASK] = np.frombuffer(encoded, np.uint8)
            known[row] = np.asarray(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST))
        return replace(examples, labels=known)

    def targets(self, labels: torch.Tensor) -> Mapping[str, Any]:
        """Return the class id of each pixel, for the loss that the model computes."""
        return {"labels": labels.long()}

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the model's own loss: cross-entropy of valid pixels, for SegFormer after bilinear upsampling."""
        loss: torch.Tensor = outputs.loss
        return loss

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the softened KL divergence averaged over positions."""
        student_logits, theirs = (logits.movedim(1, -1).flatten(0, -2) for logits in (mine, taught))
        return losses.softened_kl(student_logits, theirs, temperature)

    def predicted_labels(self, outputs: ModelOutput, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the most likely class of each position."""
        chosen: torch.Tensor = outputs.logits.detach().argmax(dim=1)
        return chosen

    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return per image the correct, predicted and reference pixels per class [batch, classes], and the answers.

        Pixels are those of the original image. Raises `DataError` for rows without masks, and `ModelError` for answers
        that are not finite.
        """
        required(examples.labels, "masks", "mask")
        classes = required(getattr(examples.head, "labels", None), "masks", "mask")
        logits = finite(outputs[LOGITS])
        inputs = getattr(examples.inputs, "more", examples.inputs.__getitem__)
        rows = [inputs(index) for index in indices]
        sizes = [tuple(row[_SIZE].tolist()) for row in rows]
        counts = []
        for row, index, predicted in zip(
            rows, indices, masks(logits, sizes, getattr(examples.head, "processor", None)), strict=True
        ):
            reference = read_mask(row[_MASK].tobytes(), f"the mask of row {index + 1}")
            counts.append(pixel_counts(predicted, reference, len(classes)))
        collected = dict(zip((_SHARED, _FOUND, _WANTED), np.array(counts).transpose(1, 0, 2), strict=True))
        names = np.array([json.dumps(classes)] * len(rows))
        return {**collected, _NAMES: names, _ANSWERS: logits.argmax(axis=1).astype(np.uint8)}

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return mean IoU over classes, over the pixels of all images, and pixel accuracy (Everingham et al. 2015).

        Classes that are neither predicted nor in the reference do not count. Intervals are over images.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        shared, predicted, reference = (collected[name] for name in (_SHARED, _FOUND, _WANTED))
        union = predicted + reference - shared
        present = np.flatnonzero(union.sum(axis=0))
        if not len(present):
            raise DataError("All pixels of the masks are ignored.", expected=f"ids other than {IGNORED}")
        names = json.loads(collected[_NAMES][0])
        class_rows = [ratio_row(f"iou_{names[key]}", shared[:, key], union[:, key], model, target) for key in present]
        return [
            mean_row("mean_iou", np.mean([row.raw or () for row in class_rows], axis=0), model, target),
            ratio_row("pixel_accuracy", shared.sum(axis=1), reference.sum(axis=1), model, target),
            *(row.model_copy(update={"raw": None}) for row in class_rows),
        ]

    def interpret(
        self,
        answers: Sequence[Any],
        examples: Examples,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
    ) -> list[Any]:
        """Return the class id of each pixel of each image, [height, width].

        Args:
            answers: Answer to each example, as `Examples.answers` returns them, or a generated text.
            examples: The examples that `raw_examples` made of the rows.
            rows: Rows of raw inputs.
            processor: Processor of the model.
            labels: Class names of the model, if it has any.
        """
        inputs = getattr(examples.inputs, "more", examples.inputs.__getitem__)
        sizes = [tuple(inputs(index)[_SIZE].tolist()) for index in range(len(examples))]
        return list(masks(finite(np.stack(answers)), sizes, processor))

    def compare(self, collected: NamedArrays, reference: NamedArrays, model: str, target: str) -> list[Measurement]:
        """Return the share of positions for which both models predict the same class.

        Args:
            collected: Collected outputs of the model.
            reference: Collected outputs of the baseline.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        same = collected[_ANSWERS] == reference[_ANSWERS]
        return [mean_row("agreement", same.reshape(len(same), -1).mean(axis=1), model, target)]


def _plain_answers(outputs: ModelOutput, targets: torch.Tensor | None, config: PretrainedConfig) -> ModelOutput:
    """Return a plain network's logits [B, classes, h, w] (key `out` if named) with SegFormer's loss."""
    from torch.nn.functional import cross_entropy, interpolate
    from transformers.modeling_outputs import SemanticSegmenterOutput

    logits = outputs["out"] if isinstance(outputs, Mapping) and "out" in outputs else outputs
    if getattr(logits, "ndim", 0) != 4:
        raise ModelError(
            f"The module gives a {type(outputs).__name__} that is no map of classes.",
            where="module",
            expected="logits [batch, classes, height, width], alone or under `out`",
        )
    loss = None
    if targets is not None:
        enlarged = interpolate(logits, size=targets.shape[-2:], mode="bilinear", align_corners=False)
        loss = cross_entropy(enlarged, targets, ignore_index=IGNORED)
    return SemanticSegmenterOutput(loss=loss, logits=logits)


def masks(logits: np.ndarray, sizes: Sequence[tuple[int, ...]], processor: Processor) -> list[np.ndarray]:
    """Return the class of each pixel, [height, width] for each of ``sizes``, by the model's processor."""
    outputs = SimpleNamespace(logits=torch.from_numpy(logits))
    predicted = processor.post_process_semantic_segmentation(outputs, target_sizes=list(sizes))
    return [mask.numpy() for mask in predicted]


def pixel_counts(predicted: np.ndarray, reference: np.ndarray, classes: int) -> np.ndarray:
    """Return correct, predicted and reference pixels per class, [3, classes], where ``wanted`` is valid."""
    is_valid = reference != IGNORED
    predicted, reference = predicted[is_valid], reference[is_valid]
    parts = (predicted[predicted == reference], predicted, reference)
    return np.stack([np.bincount(part, minlength=classes) for part in parts])


TASK = ImageSegmentation()
