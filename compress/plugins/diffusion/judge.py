"""Quality of generated images by an image classifier: their classes, and their distance to real images."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compress.data.media import Media, media, media_type
from compress.evaluation.evaluate import artifact_labels
from compress.plugins.diffusion.image_metrics import (
    frechet_contributions,
    frechet_distance,
    frechet_interval,
    mean_measurement,
    perceptual_distance,
)
from compress.results.metrics import describe_metric
from compress.results.report import Measurement
from compress.tasks.classes import outcome_row
from compress.tasks.registry import TASKS
from compress.utils.errors import DataError, ModelError

_BATCH = 32
_SEED = 0


class ClassifierOutputs(NamedTuple):
    """Outputs of a classifier for n images.

    ``features`` [n, d] are the inputs of its last layer, ``classes`` the likeliest class names, ``layers`` the outputs
    of its stages, [n, channels, ...]. Networks of other libraries have their features as the only layer.
    """

    features: np.ndarray
    classes: Sequence[str]
    layers: Sequence[np.ndarray]


class ImageClassifier:
    """Image classifier in Hugging Face layout."""

    def __init__(self, folder: Path) -> None:
        """Open it. Raises `ModelError`."""
        from torch import nn

        self._task = TASKS["image-classification"]
        self._model = self._task.load(folder, None, trust_remote_code=False)
        linear = [module for module in self._model.module.modules() if isinstance(module, nn.Linear)]
        self.classes = judge_classes(folder)
        if not linear or linear[-1].out_features != len(self.classes):
            raise ModelError(
                "The judge does not end in a linear layer of its classes, whose input would be its features.",
                where=str(folder),
                expected="an image classifier such as ResNet, RegNet, ConvNeXT or ViT",
            )
        self._last = linear[-1]

    def features_and_classes(self, levels: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Return features [n, d] and classes of images [n, height, width, channels] uint8.

        The classifier's own processor prepares the images.
        """
        batches = list(self.outputs(levels))
        classes = [name for batch in batches for name in batch.classes]
        return np.concatenate([batch.features for batch in batches]), classes

    def distances(self, levels: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """Return the distance of each image to its reference over all stages of the classifier, [n]."""
        pairs = zip(self.outputs(levels), self.outputs(reference), strict=True)
        return np.concatenate([perceptual_distance(outputs.layers, other.layers) for outputs, other in pairs])

    def outputs(self, levels: np.ndarray) -> Iterator[ClassifierOutputs]:
        """Yield the outputs for a few images at a time, because the outputs of all stages are large."""
        import pyarrow as pa
        import torch
        from transformers import PreTrainedModel

        from compress.models.hooks import capture_inputs

        module = self._model.module
        options = {"output_hidden_states": True} if isinstance(module, PreTrainedModel) else {}
        table = pa.table({"image": pa.array([_stored(picture) for picture in levels], media_type())})
        examples = self._task.encode(table, self._model.processor, None, 0)
        captured: list[torch.Tensor] = []
        for start in range(0, len(levels), _BATCH):
            batch = examples.batch(range(start, min(start + _BATCH, len(levels))))
            inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
            with torch.no_grad(), capture_inputs({"last": self._last}, lambda _, value: captured.append(value)):
                outputs = module(**inputs, **options)
            features = captured.pop().flatten(1)
            states = getattr(outputs, "hidden_states", None) or (features,)
            classes = [self.classes[index] for index in outputs.logits.argmax(dim=-1).tolist()]
            # Tokens [n, tokens, width] as [n, width, tokens], and other states unchanged.
            layers = [(state.transpose(1, 2) if state.ndim == 3 else state).numpy() for state in states]
            yield ClassifierOutputs(features.numpy(), classes, layers)


def judge_classes(folder: Path) -> tuple[str, ...]:
    """Return the classes of a classifier in the order of their ids. Raises `ModelError` if its config names none."""
    names = artifact_labels(folder)
    if names is None:
        raise ModelError("The judge's config names no classes.", where=str(folder), expected="an image classifier")
    return names


def check_classes(folder: Path, classes: Iterable[str]) -> None:
    """Raise `DataError` for a class of the rows that the classifier in ``folder`` doesn't have."""
    classes_of_judge = judge_classes(folder)
    unknown = sorted(set(classes) - set(classes_of_judge))
    if unknown:
        raise DataError(
            f"The judge knows no class {unknown[0]!r}.",
            where="evaluation.judge",
            expected=f"a classifier of the rows' labels; it knows {', '.join(classes_of_judge)}",
            hint="train it on rows with the same labels, or leave the column `label` out",
        )


def _stored(levels: np.ndarray) -> Media:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).save(file, "PPM")
    image = media(file.getvalue(), None)
    assert image is not None, "a file that was just written"
    return image


@dataclass(frozen=True, eq=False)
class ImageEvaluation:
    """Evaluation of n generated images by the classifier in ``folder``.

    ``classes`` are the labels of the rows, and ``real`` their own images [n, height, width, channels] uint8, if they
    have any. ``baseline_images`` are the baseline's images for the same prompts and noise.
    """

    folder: Path
    classes: Sequence[str] | None
    real: np.ndarray | None
    baseline_images: np.ndarray | None

    @cached_property
    def judge(self) -> ImageClassifier:
        """Return the classifier, opened once."""
        return ImageClassifier(self.folder)

    @cached_property
    def real_features(self) -> np.ndarray | None:
        """Return the features of the rows' own images, computed once."""
        return None if self.real is None else self.judge.features_and_classes(self.real)[0]

    def measurements(self, pictures: np.ndarray) -> list[Measurement]:
        """Return measurements of images [n, height, width, channels] uint8, without a model and a target."""
        features, classes = self.judge.features_and_classes(pictures)
        results = []
        if self.classes is not None:
            is_right = np.array([seen == label for seen, label in zip(classes, self.classes, strict=True)])
            results.append(outcome_row("prompt_accuracy", is_right, "", ""))
        if self.real_features is not None:
            real = self.real_features
            count, width = features.shape
            unit = describe_metric("frechet_distance").unit
            row = partial(Measurement, model="", metric="frechet_distance", target="", unit=unit, n=count)
            if count > width:
                raw = tuple(frechet_contributions(features, real).tolist())
                results.append(row(**frechet_interval(features, real, _SEED)._asdict(), raw=raw))
            elif count > 1:
                results.append(row(value=frechet_distance(features, real)))
        if self.baseline_images is not None:
            distances = self.judge.distances(pictures, self.baseline_images)
            results.append(mean_measurement("perceptual_distance_to_baseline", distances))
        return results
