"""Drawn pictures as an image classifier sees them: what they show, how near they are to real ones and to each other."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import ModelError
from compress.evaluation.evaluate import share_row
from compress.formats.safetensors.folder import load_folder
from compress.measurement import Measurement
from compress.numerics.calibration import mean_interval
from compress.numerics.generated_pictures import diversity, frechet_interval, frechet_shares, in_manifold
from compress.numerics.picture_similarity import perceptual_distance
from compress.tasks.capability import HAS_CLASSES, TAKES_IMAGES
from compress.tasks.forward import tensors
from compress.tasks.images import encode_images

_SEED = 0
_BATCH = 64
_NEIGHBOURS = 3
_FEWEST = 4
"""Pictures without which nothing is said of where others lie."""


@dataclass(frozen=True)
class Seen:
    """What a classifier makes of pictures: the input of its last layer [n, d], what each layer before gives
    [n, channels, ...], and the name of the likeliest class [n].
    """

    features: np.ndarray
    layers: Sequence[np.ndarray] = field(repr=False)
    classes: Sequence[str] = ()


class PictureJudge:
    """An image classifier that was trained on real pictures."""

    def __init__(self, folder: Path) -> None:
        """Load it. Raises `ModelError` for a folder that holds something else."""
        task, self._model = load_folder(folder)
        if not {HAS_CLASSES, TAKES_IMAGES} <= task.capabilities:
            raise ModelError(
                f"Pictures cannot be judged by a model for {task.name}.",
                where=f"evaluation.judge, {folder}",
                expected="an image classifier",
            )
        self._last = _last_linear(self._model.module, folder)

    @property
    def names(self) -> tuple[str, ...]:
        """Its classes."""
        return self._model.labels()

    def look(self, pictures: np.ndarray) -> Seen:
        """What it makes of pictures [n, height, width, channels] in levels, prepared by its own processor."""
        import torch

        examples = encode_images([_as_media(one) for one in pictures], self._model.processor)
        features, layers, classes = list[np.ndarray](), list[list[np.ndarray]](), list[str]()

        def keep(_: Any, given: Any) -> None:
            features.append(given[0].flatten(1).numpy())

        hook = self._last.register_forward_pre_hook(keep)
        try:
            for start in range(0, len(examples), _BATCH):
                batch = tensors(examples, list(range(start, min(start + _BATCH, len(examples)))))
                with torch.inference_mode():
                    found = self._model.module(pixel_values=batch["pixel_values"], output_hidden_states=True)
                layers.append([_channels_first(one.numpy()) for one in found.hidden_states])
                classes += [self.names[place] for place in found.logits.argmax(dim=-1).tolist()]
        finally:
            hook.remove()
        return Seen(np.concatenate(features), [np.concatenate(parts) for parts in zip(*layers, strict=True)], classes)


def judged_rows(
    seen: Seen,
    real: Seen | None,
    baseline: Seen | None,
    wanted: Sequence[str] | None,
    prompts: Sequence[str],
    model: str,
    target: str,
) -> list[Measurement]:
    """How often a picture shows what is ``wanted``; Fréchet distance, precision and recall to ``real`` pictures;
    how far each is from the ``baseline``'s of the same prompt and noise, and from others of its own prompt.

    Raw outcomes are by picture, so that two models' can be paired.
    """
    rows = []
    if wanted is not None:
        right = [float(found == one) for found, one in zip(seen.classes, wanted, strict=True)]
        rows.append(share_row("class_seen", right, model, target))
    if real is not None and min(len(seen.features), len(real.features)) >= _FEWEST:
        rows += _distribution_rows(seen, real, model, target)
    if baseline is not None:
        apart = perceptual_distance(seen.layers, baseline.layers)
        rows.append(_mean_row("perceptual_distance_to_baseline", apart, model, target))
    spread = diversity(seen.features, prompts)
    if np.isfinite(spread).any():
        rows.append(_mean_row("picture_diversity", spread[np.isfinite(spread)], model, target))
    return rows


def _distribution_rows(seen: Seen, real: Seen, model: str, target: str) -> Iterable[Measurement]:
    found = frechet_interval(seen.features, real.features, _SEED)
    known = seen.features.shape[0] > seen.features.shape[1]
    raw = {"raw": tuple(frechet_shares(seen.features, real.features).tolist())} if known else {}
    yield Measurement(
        model=model,
        metric="frechet_distance",
        target=target,
        value=found.value,
        unit="squared distance",
        low=found.low,
        high=found.high,
        n=len(seen.features),
        **raw,
    )
    count = min(len(seen.features), len(real.features))
    drawn, there = seen.features[:count], real.features[:count]
    yield share_row("picture_precision", in_manifold(drawn, there, _NEIGHBOURS).astype(float).tolist(), model, target)
    yield share_row("picture_recall", in_manifold(there, drawn, _NEIGHBOURS).astype(float).tolist(), model, target)


def _mean_row(metric: str, values: np.ndarray, model: str, target: str) -> Measurement:
    value, low, high = mean_interval(values, _SEED)
    interval = {"low": low, "high": high} if len(values) > 1 else {}
    raw = tuple(values.tolist())
    return Measurement(
        model=model, metric=metric, target=target, value=value, unit="distance", n=len(raw), raw=raw, **interval
    )


def _last_linear(module: Any, folder: Path) -> Any:
    import torch

    found = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    if not found:
        raise ModelError("The judge has no last linear layer.", where=str(folder), expected="an image classifier")
    return found[-1]


def _channels_first(layer: np.ndarray) -> np.ndarray:
    """[n, channels, ...], of tokens [n, tokens, width] too."""
    return layer.transpose(0, 2, 1) if layer.ndim == 3 else layer


def _as_media(picture: np.ndarray) -> dict[str, Any]:
    """A picture [height, width, channels] in levels as a value of an image column."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None, "sha256": ""}
