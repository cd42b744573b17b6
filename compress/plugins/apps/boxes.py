"""Answers of object detection and image segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.formats.runtime import Batch, Session
from compress.models.json_file import read_json
from compress.plugins.apps.app_type import Answers, Numbers
from compress.plugins.apps.image import sampled
from compress.plugins.apps.manifest import TensorRecord
from compress.plugins.apps.postprocess import FindBoxes, Segment
from compress.plugins.apps.answers import LABELS
from compress.tasks.object_detection import BOXES as BOXES_OUTPUT
from compress.tasks.object_detection import is_separate
from compress.tasks.task import LOGITS
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    pass


def _find_boxes(model: Path, outputs: Sequence[TensorRecord]) -> FindBoxes:
    """Return the step with the labels of the config. The model type decides whether a last class means no object."""
    labels = LABELS.find_postprocessing(model, outputs).labels
    activation = "sigmoid" if is_separate(read_json(model / "config.json")) else "softmax"
    return FindBoxes(chances=activation, output=LOGITS, boxes_output=BOXES_OUTPUT, labels=labels)


def _predict_boxes(session: Session, step: FindBoxes, feed: Batch, known: Numbers) -> Numbers:
    """Return some of the scores and boxes of all queries.

    Independent queries have no order, and rounding may exchange them. Each column is sorted for this reason.
    """
    outputs = session.predict(feed)
    scores, boxes = outputs[step.output][0], outputs[step.boxes_output][0]
    independent = step.chances == "sigmoid"
    if scores.shape != (len(boxes), len(step.labels) + (not independent)) or boxes.shape[1:] != (4,):
        raise ModelError(
            f"The graph gives scores {list(scores.shape)} and boxes {list(boxes.shape)}.",
            expected=f"{len(step.labels)} labels{'' if independent else ' and none'} for each query, and a box",
        )
    if independent:
        scores, boxes = np.sort(scores, axis=0), np.sort(boxes, axis=0)
    return sampled(np.concatenate([scores.ravel(), boxes.ravel()]))


def _find_masks(model: Path, outputs: Sequence[TensorRecord]) -> Segment:
    """Return the step with the size of the output grid.

    Raises:
        ModelError: The graph's grid has no fixed size.
    """
    labels = LABELS.find_postprocessing(model, outputs).labels
    (shape,) = (entry.shape for entry in outputs if entry.name == LOGITS)
    if len(shape) != 4 or shape[1] != len(labels) or not all(isinstance(side, int) for side in shape[2:]):
        raise ModelError(
            f"The graph gives scores of shape {list(shape)}.",
            where=str(model),
            expected=f"[batch, {len(labels)}, height, width], as the config names {len(labels)} labels",
        )
    return Segment(output=LOGITS, labels=labels, height=int(shape[2]), width=int(shape[3]))


def _predict_masks(session: Session, step: Segment, feed: Batch, known: Numbers) -> Numbers:
    """Return some of the scores of all classes and positions."""
    return sampled(session.predict(feed)[step.output][0])


BOXES = replace(
    LABELS,
    folder="boxes",
    meanings={
        LOGITS: "for each query one score a class, in the order of the labels; `chances: softmax` has one for nothing",
        BOXES_OUTPUT: "for each query its box: centre, width and height in shares of the picture",
    },
    required=frozenset({LOGITS, BOXES_OUTPUT}),
    find_postprocessing=_find_boxes,
    predict=_predict_boxes,
)
MASKS: Answers = replace(
    LABELS,
    folder="masks",
    meanings={LOGITS: "one score a class, in the order of the labels, for each place of a grid"},
    find_postprocessing=_find_masks,
    predict=_predict_masks,
)
