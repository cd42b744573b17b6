"""Pictures that a model drew, as an image classifier sees them: their classes, and how near they are to real ones."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.media import Media, media
from compress.errors import DataError, ModelError
from compress.measurement import Measurement
from compress.metrics import describe_metric
from compress.numerics.calibration import mean_interval
from compress.numerics.generated_pictures import (
    diversity,
    frechet_distance,
    frechet_interval,
    frechet_shares,
    in_manifold,
)
from compress.numerics.picture_similarity import perceptual_distance
from compress.progress import Progress
from compress.tasks.classes import outcome_row
from compress.tasks.registry import get_task

_TASK = "image-classification"
_BATCH = 64
_SEED = 0
_NEIGHBOURS = 3
"""As Kynkäänniemi et al. (2019) take them."""


@dataclass(frozen=True, eq=False)
class Sight:
    """What a classifier makes of n pictures.

    ``features`` [n, d] are what its last layer is given, ``classes`` the names that it finds likeliest, ``layers`` what
    each of its stages gives, [n, channels, ...places].
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
        if not linear or linear[-1].out_features != self._model.module.config.num_labels:
            raise ModelError(
                "The judge does not end in a linear layer of its classes, whose input would be its features.",
                where=str(folder),
                expected="an image classifier such as ResNet, RegNet, ConvNeXT or ViT",
            )
        self._last = linear[-1]
        names = self._model.module.config.id2label
        self.classes = tuple(str(names[place]) for place in range(len(names)))

    def look(self, levels: np.ndarray) -> Sight:
        """At pictures [n, height, width, channels] uint8, as the classifier's processor prepares them."""
        import torch

        examples = self._task.encode(_rows(levels), self._model.processor, None, 0)
        given: list[torch.Tensor] = []
        hook = self._last.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].flatten(1)))
        logits, layers = [], []
        try:
            with torch.inference_mode():
                for start in range(0, len(levels), _BATCH):
                    batch = examples.batch(range(start, min(start + _BATCH, len(levels))))
                    outputs = self._answer({name: torch.from_numpy(array) for name, array in batch.items()})
                    logits.append(outputs.logits)
                    layers.append([_channels_first(state) for state in getattr(outputs, "hidden_states", None) or ()])
        finally:
            hook.remove()
        features = torch.cat(given)
        found = [torch.cat(parts).numpy() for parts in zip(*layers, strict=True)] or [features.numpy()]
        chosen = torch.cat(logits).argmax(dim=-1).tolist()
        return Sight(features.numpy(), [self.classes[place] for place in chosen], found)

    def _answer(self, batch: dict[str, Any]) -> Any:
        from transformers import PreTrainedModel

        module = self._model.module
        return module(**batch, output_hidden_states=True) if isinstance(module, PreTrainedModel) else module(**batch)


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
    """What n pictures were to show: the prompts, their classes where rows have one, and real pictures of them."""

    prompts: Sequence[str]
    classes: Sequence[str] | None
    real: np.ndarray | None

    def check(self, judge: Judge) -> None:
        """Raises `DataError` for a class that the judge doesn't know."""
        unknown = sorted(set(self.classes or ()) - set(judge.classes))
        if unknown:
            raise DataError(
                f"The judge knows no class {unknown[0]!r}.",
                where="evaluation.judge",
                expected=f"a classifier of the rows' labels; it knows {', '.join(judge.classes)}",
                mend="train it on rows with the same labels, or leave the column `label` out",
            )


def judged(
    judge: Judge, asked: Asked, pictures: np.ndarray, reference: np.ndarray, progress: Progress, description: str
) -> list[dict[str, Any]]:
    """Rows of what the judge sees in ``pictures`` [n, height, width, channels] uint8, without model and target.

    ``reference`` are the baseline's of the same prompts and noise. Raises `DataError` for classes unknown to the judge.
    """
    asked.check(judge)
    sets = {"drawn": pictures, "baseline": reference} | ({} if asked.real is None else {"real": asked.real})
    seen = {name: judge.look(one) for name, one in progress.track(sets.items(), description, len(sets))}
    drawn = seen["drawn"]
    rows = []
    if asked.classes is not None:
        right = np.array([one == wanted for one, wanted in zip(drawn.classes, asked.classes, strict=True)])
        rows.append(outcome_row("prompt_accuracy", right, "", ""))
    if "real" in seen:
        rows += _distances(drawn.features, seen["real"].features)
    apart = diversity(drawn.features, asked.prompts)
    if np.isfinite(apart).any():
        rows.append(_mean_row("prompt_diversity", apart[np.isfinite(apart)]))
    near = perceptual_distance(drawn.layers, seen["baseline"].layers)
    rows.append(_mean_row("perceptual_distance_to_baseline", near))
    return [row.model_dump() for row in rows]


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
