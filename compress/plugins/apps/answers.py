"""Answers that are numbers: scores, one a label, and embeddings, as the model's folder says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from compress.evaluation.evaluate import artifact_labels
from compress.formats.runtime import Batch, Session
from compress.models.sentence_modules import MODULES, Normalize, SentenceModules, has_modules, read_modules
from compress.plugins.apps.app_type import Answers, Numbers, Rounding, round_to_float32
from compress.plugins.apps.manifest import TensorRecord
from compress.plugins.apps.postprocess import POOLED, Embed, Softmax
from compress.tasks.image_feature_extraction import POOLED as POOLER_OUTPUT
from compress.tasks.task import LAST_HIDDEN_STATE, LOGITS, SENTENCE_EMBEDDING
from compress.utils.errors import ModelError


def _find_pooling(model: Path, outputs: Sequence[TensorRecord]) -> Embed:
    """Return the step with the pooling and normalisation of `modules.json`, unless the graph contains them.

    Raises:
        ModelError: The modules are missing or unsupported.
    """
    if not has_modules(model):
        raise ModelError(
            f"There is no {MODULES}, which says how the vectors of a text's tokens become one.",
            where=str(model),
            hint="export the model with `compress`, or save it with sentence-transformers",
        )
    modules, names = read_modules(model), [entry.name for entry in outputs]
    if not {SENTENCE_EMBEDDING, LAST_HIDDEN_STATE} & set(names):
        raise ModelError(
            f"The model gives {', '.join(names)}.",
            where=str(model),
            expected=f"{SENTENCE_EMBEDDING} or {LAST_HIDDEN_STATE}",
        )
    fields = {"output": SENTENCE_EMBEDDING, "pooling": None, "normalize": False, "dimensions": modules.dimensions}
    if SENTENCE_EMBEDDING not in names:
        mode, normalize = _simple(modules, model)
        fields |= {"output": LAST_HIDDEN_STATE, "pooling": mode, "normalize": normalize}
    return Embed.model_validate(fields)


def _predict_embedding(session: Session, step: Embed, feed: Batch, known: Numbers) -> Numbers:
    """Return the embedding of one input."""
    embedding = _pooled(session.predict(feed)[step.output][0], step)
    if embedding.shape != (step.dimensions,):
        raise ModelError(
            f"The graph gives an embedding of shape {list(embedding.shape)}.",
            expected=f"{step.dimensions} values",
        )
    return round_to_float32(embedding / np.linalg.norm(embedding) if step.normalize else embedding)


def _simple(modules: SentenceModules, model: Path) -> tuple[str, bool]:
    """Return the pooling mode, and True if a normalisation follows. Raises `ModelError` for other modules."""
    [mode, *more] = modules.modes
    kinds = [type(step) for step in modules.steps]
    if more or mode not in POOLED or kinds not in ([], [Normalize]):
        steps = ", ".join((f"pooling by {' and '.join(modules.modes)}", *(kind.__name__ for kind in kinds)))
        raise ModelError(
            f"An app would have to compute what follows the graph: {steps}.",
            where=str(model / MODULES),
            expected=f"pooling by one of {', '.join(POOLED)}, then perhaps Normalize",
            hint="onnx: {sentence_embedding: true} has the graph compute it, for a mean or the first token",
        )
    return mode, bool(kinds)


def _pooled(values: np.ndarray, step: Embed) -> np.ndarray:
    """Pool vectors [tokens, dimensions], or flatten a finished embedding."""
    if step.pooling is None:
        return values.reshape(-1)
    if step.pooling == "mean":
        return cast(np.ndarray, values.mean(axis=0))
    return cast(np.ndarray, values.max(axis=0) if step.pooling == "max" else values[0 if step.pooling == "cls" else -1])


EMBEDDINGS = Answers(
    plural="embeddings",
    field="embedding",
    folder="embedding",
    meanings={LAST_HIDDEN_STATE: "one vector a token", SENTENCE_EMBEDDING: "the finished embedding"},
    # With integers, a text of two tokens came out with a cosine of 0.985 in a page.
    rounding=(Rounding(1e-3, 0.9999), Rounding(0.1, 0.97)),
    find_postprocessing=_find_pooling,
    predict=_predict_embedding,
)


def _find_pooled(model: Path, outputs: Sequence[TensorRecord]) -> Embed:
    """Return the step for an image embedding, which the graph pools."""
    shapes = {entry.name: entry.shape for entry in outputs}
    sizes = [side for side in shapes[POOLER_OUTPUT][1:] if isinstance(side, int)]
    return Embed(output=POOLER_OUTPUT, pooling=None, normalize=False, dimensions=math.prod(sizes))


IMAGE_EMBEDDINGS = replace(
    EMBEDDINGS,
    meanings={POOLER_OUTPUT: "the picture's embedding", LAST_HIDDEN_STATE: "one vector a place of the picture"},
    required=frozenset({POOLER_OUTPUT}),
    find_postprocessing=_find_pooled,
)


def _find_labels(model: Path, outputs: Sequence[TensorRecord]) -> Softmax:
    """Return the step with the labels of the config."""
    labels = artifact_labels(model)
    if not labels:
        raise ModelError(
            "The model's config names no labels.",
            where=str(model / "config.json"),
            expected="an id2label with a name for each score",
        )
    return Softmax(output=LOGITS, labels=labels)


def _predict_scores(session: Session, step: Softmax, feed: Batch, known: Numbers) -> Numbers:
    """Return one score for each label."""
    scores: np.ndarray = session.predict(feed)[step.output][0]
    if len(scores) != len(step.labels):
        raise ModelError(
            f"The model's config names {len(step.labels)} labels, and the graph gives {len(scores)} scores.",
            expected="an id2label in config.json with a name for each score",
        )
    return round_to_float32(scores)


LABELS = Answers(
    plural="scores",
    field="logits",
    folder="labels",
    meanings={LOGITS: "one score a class, in the order of the labels"},
    required=frozenset({LOGITS}),
    rounding=(Rounding(1e-3), Rounding(0.05)),
    find_postprocessing=_find_labels,
    predict=_predict_scores,
)
