"""Pictures that a model drew, as an image classifier sees them: their classes, and how near they are to real ones."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compress.data.media import Media, media
from compress.evaluation.evaluate import artifact_labels
from compress.numerics.calibration import mean_interval
from compress.numerics.generated_images import (
    diversity,
    frechet_distance,
    frechet_interval,
    frechet_shares,
    in_manifold,
)
from compress.numerics.image_similarity import perceptual_distance
from compress.results.measurement import Measurement
from compress.results.metrics import describe_metric
from compress.tasks.classes import outcome_row
from compress.tasks.registry import get_task
from compress.utils.errors import DataError, ModelError

_TASK = "image-classification"
_BATCH = 32
_SEED = 0
_NEIGHBOURS = 3
"""As Kynkäänniemi et al. (2019) take them."""


class Sight(NamedTuple):
    """What a classifier makes of n pictures.

    ``features`` [n, d] are what its last layer is given, ``classes`` the names that it finds likeliest, ``layers`` what
    each of its stages gives, [n, channels, ...places]; of a network of another library the features alone.
    """

    features: np.ndarray
    classes: Sequence[str]
    layers: Sequence[np.ndarray]


class Judge:
    """An image classifier in Hugging Face layout."""

    def __init__(self, folder: Path) -> None:
        """Open it. Raises `ModelError`."""
        from torch import nn

        self._task = get_task(_TASK)
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

    def look(self, levels: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Features [n, d] and classes of pictures [n, height, width, channels] uint8.

        The classifier's own processor prepares them.
        """
        seen = list(self.sights(levels))
        return np.concatenate([one.features for one in seen]), [name for one in seen for name in one.classes]

    def distances(self, levels: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """How far each picture is from its reference in every stage of the classifier, [n]."""
        pairs = zip(self.sights(levels), self.sights(reference), strict=True)
        return np.concatenate([perceptual_distance(one.layers, other.layers) for one, other in pairs])

    def sights(self, levels: np.ndarray) -> Iterator[Sight]:
        """A few pictures at a time, since what all stages make of many would fill the memory."""
        import torch

        examples = self._task.encode(_rows(levels), self._model.processor, None, 0)
        for start in range(0, len(levels), _BATCH):
            batch = examples.batch(range(start, min(start + _BATCH, len(levels))))
            given: list[torch.Tensor] = []
            hook = self._last.register_forward_pre_hook(lambda _, inputs, kept=given: kept.append(inputs[0].flatten(1)))
            try:
                outputs = self._answer({name: torch.from_numpy(array) for name, array in batch.items()})
            finally:
                hook.remove()
            states = getattr(outputs, "hidden_states", None) or (given[0],)
            chosen = outputs.logits.argmax(dim=-1).tolist()
            layers = [_channels_first(state).numpy() for state in states]
            yield Sight(given[0].numpy(), [self.classes[place] for place in chosen], layers)

    def _answer(self, batch: dict[str, Any]) -> Any:
        import torch
        from transformers import PreTrainedModel

        module = self._model.module
        more = {"output_hidden_states": True} if isinstance(module, PreTrainedModel) else {}
        with torch.no_grad():
            return module(**batch, **more)


def judge_classes(folder: Path) -> tuple[str, ...]:
    """The classes that a judge knows, in the order of their ids. Raises `ModelError` where its config names none."""
    names = artifact_labels(folder)
    if names is None:
        raise ModelError("The judge's config names no classes.", where=str(folder), expected="an image classifier")
    return names


def check_classes(folder: Path, classes: Iterable[str]) -> None:
    """Raises `DataError` for a class of the rows that the judge in ``folder`` doesn't know."""
    known = judge_classes(folder)
    unknown = sorted(set(classes) - set(known))
    if unknown:
        raise DataError(
            f"The judge knows no class {unknown[0]!r}.",
            where="evaluation.judge",
            expected=f"a classifier of the rows' labels; it knows {', '.join(known)}",
            hint="train it on rows with the same labels, or leave the column `label` out",
        )


def _channels_first(state: Any) -> Any:
    """Of tokens [n, tokens, width], [n, width, tokens]."""
    return state.transpose(1, 2) if state.ndim == 3 else state


def _rows(levels: np.ndarray) -> Any:
    """A table of images, stored without compression."""
    import pyarrow as pa

    from compress.data.media import media_type

    return pa.table({"image": pa.array([_stored(picture) for picture in levels], media_type())})


def _stored(levels: np.ndarray) -> Media:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).save(file, "PPM")
    found = media(file.getvalue(), None)
    assert found is not None, "a file that was just written"
    return found


@dataclass(frozen=True, eq=False)
class Asked:
    """What n pictures were to show, and who judges them: an opened `Judge` is made of ``folder`` when it is needed.

    ``classes`` are the labels of the rows, ``real`` their own pictures [n, height, width, channels] uint8, where they
    have any; ``usual`` are those that the baseline drew for the same prompts from the same noise.
    """

    folder: Path
    prompts: Sequence[str]
    classes: Sequence[str] | None
    real: np.ndarray | None
    usual: np.ndarray | None

    @cached_property
    def judge(self) -> Judge:
        """Opened once."""
        return Judge(self.folder)

    @cached_property
    def real_features(self) -> np.ndarray | None:
        """Those of the rows' own pictures, looked at once."""
        return None if self.real is None else self.judge.look(self.real)[0]

    def rows(self, pictures: np.ndarray) -> list[Measurement]:
        """What the judge sees in ``pictures`` [n, height, width, channels] uint8, of no model and no target yet."""
        features, seen = self.judge.look(pictures)
        found = []
        if self.classes is not None:
            right = np.array([one == wanted for one, wanted in zip(seen, self.classes, strict=True)])
            found.append(outcome_row("prompt_accuracy", right, "", ""))
        if self.real_features is not None:
            found += _distances(features, self.real_features)
        apart = diversity(features, self.prompts)
        if np.isfinite(apart).any():
            found.append(_mean_row("prompt_diversity", apart[np.isfinite(apart)]))
        if self.usual is not None:
            found.append(_mean_row("perceptual_distance_to_baseline", self.judge.distances(pictures, self.usual)))
        return found


def _distances(features: np.ndarray, real: np.ndarray) -> list[Measurement]:
    """Fréchet distance, and precision and recall, of drawn and real pictures."""
    rows = []
    count, width = features.shape
    if count > width:
        found = frechet_interval(features, real, _SEED)
        raw = tuple(frechet_shares(features, real).tolist())
        rows.append(_row("frechet_distance", count, **found._asdict(), raw=raw))
    elif count > 1:
        rows.append(_row("frechet_distance", count, value=frechet_distance(features, real)))
    if count > _NEIGHBOURS:
        rows.append(outcome_row("picture_precision", in_manifold(features, real, _NEIGHBOURS), "", ""))
        rows.append(outcome_row("picture_recall", in_manifold(real, features, _NEIGHBOURS), "", ""))
    return rows


def _mean_row(metric: str, values: np.ndarray) -> Measurement:
    value, low, high = mean_interval(values, _SEED)
    bounds = {"low": low, "high": high} if len(values) > 1 else {}
    return _row(metric, len(values), value=value, raw=tuple(values.tolist()), **bounds)


def _row(metric: str, count: int, **found: Any) -> Measurement:
    return Measurement(model="", metric=metric, target="", unit=describe_metric(metric).unit, n=count, **found)
