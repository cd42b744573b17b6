"""Boxes and masks: where in a picture a model finds what, as numbers that an app draws by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.runtime import Batch, Session
from compress.models.json_file import read_json
from compress.plugins.apps.app_type import Answers, Numbers
from compress.plugins.apps.image import IMAGES, find_rule, sampled
from compress.plugins.apps.manifest import TensorRecord
from compress.plugins.apps.postprocess import FindBoxes, Segment
from compress.plugins.apps.preprocess import PrepareImage
from compress.plugins.apps.vectors import LABELS
from compress.tasks.object_detection import BOXES as PRED_BOXES
from compress.tasks.object_detection import is_separate
from compress.tasks.task import LOGITS
from compress.utils.errors import ModelError


def _find_uncut(folder: Path, processor: Any, max_length: int) -> PrepareImage:
    """Places are shares of the whole picture. Raises `ModelError` for a processor that cuts something off."""
    rule = find_rule(processor)
    if rule.center_crop is not None:
        raise ModelError(
            "The image processor cuts out the middle of a picture, and places would be those of the middle.",
            expected='"do_center_crop": false in preprocessor_config.json',
        )
    return rule


def _find_boxes(model: Path, outputs: Sequence[TensorRecord]) -> FindBoxes:
    """The labels are those of the config, whose model type says whether there is a last class, which is none."""
    labels = LABELS.find_end(model, outputs).labels
    chances = "sigmoid" if is_separate(read_json(model / "config.json")) else "softmax"
    return FindBoxes(chances=chances, output=LOGITS, boxes_output=PRED_BOXES, labels=labels)


def _ask_boxes(session: Session, end: FindBoxes, feed: Batch, known: Numbers) -> Numbers:
    """Some of the scores of all queries, and of their boxes behind them.

    Where the order of queries says nothing, rounding may change it: each column is sorted.
    """
    found = session.predict(feed)
    scores, boxes = found[end.output][0], found[end.boxes_output][0]
    alone = end.chances == "sigmoid"
    if scores.shape != (len(boxes), len(end.labels) + (not alone)) or boxes.shape[1:] != (4,):
        raise ModelError(
            f"The graph gives scores {list(scores.shape)} and boxes {list(boxes.shape)}.",
            expected=f"{len(end.labels)} labels{'' if alone else ' and none'} for each query, and a box",
        )
    if alone:
        scores, boxes = np.sort(scores, axis=0), np.sort(boxes, axis=0)
    return sampled(np.concatenate([scores.ravel(), boxes.ravel()]))


def _find_masks(model: Path, outputs: Sequence[TensorRecord]) -> Segment:
    """Raises `ModelError` for a graph whose grid is of no one size."""
    labels = LABELS.find_end(model, outputs).labels
    (shape,) = (entry.shape for entry in outputs if entry.name == LOGITS)
    if len(shape) != 4 or shape[1] != len(labels) or not all(isinstance(side, int) for side in shape[2:]):
        raise ModelError(
            f"The graph gives scores of shape {list(shape)}.",
            where=str(model),
            expected=f"[batch, {len(labels)}, height, width], as the config names {len(labels)} labels",
        )
    return Segment(output=LOGITS, labels=labels, height=int(shape[2]), width=int(shape[3]))


def _ask_masks(session: Session, end: Segment, feed: Batch, known: Numbers) -> Numbers:
    """Some of the scores of all classes and places."""
    return sampled(session.predict(feed)[end.output][0])


WHOLE_IMAGES = replace(IMAGES, find_rule=_find_uncut)
FOUND_BOXES = replace(
    LABELS,
    folder="boxes",
    meanings={
        LOGITS: "for each query one score a class, in the order of the labels; `chances: softmax` has one for nothing",
        PRED_BOXES: "for each query its box: centre, width and height in shares of the picture",
    },
    required=frozenset({LOGITS, PRED_BOXES}),
    find_end=_find_boxes,
    ask=_ask_boxes,
)
MASKS: Answers = replace(
    LABELS,
    folder="masks",
    meanings={LOGITS: "one score a class, in the order of the labels, for each place of a grid"},
    find_end=_find_masks,
    ask=_ask_masks,
)
