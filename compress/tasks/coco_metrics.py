"""Detections against what is there: COCO's figures by its own library, with intervals over pictures. No torch."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from compress.numerics.average_precision import precision_influence
from compress.numerics.calibration import mean_interval
from compress.results.measurement import Measurement
from compress.utils.errors import DataError, MissingExtraError

SCORE, CLASS, BOX = 0, 1, slice(2, 6)
"""Columns of a detection: its score, the id of its class, and [x, y, width, height] in pixels."""
_SEED = 0
_ALL, _MOST = 0, 2
"""COCO's places of objects of every size and of 100 detections a picture."""
_SIZES = {"small": 1, "medium": 2, "large": 3}
"""Below 32 x 32 pixels, up to 96 x 96, and above."""
_SHOWN_FROM, _SAME_PLACE = 0.5, 0.5


class Gold(NamedTuple):
    """What is there in a picture: ids and names of classes, and boxes as [x, y, width, height] in pixels."""

    ids: list[int]
    names: list[str]
    boxes: list[list[float]]


class Figures(NamedTuple):
    """COCO's figures by name, and what each picture adds to those that have influences, [n]."""

    values: dict[str, float]
    influences: dict[str, np.ndarray]


def figures(found: np.ndarray, gold: Sequence[Gold]) -> Figures:
    """Of detections [n, d, 6] and what is there. Raises `DataError` without objects, `MissingExtraError`.

    AP is the mean precision at 101 recalls, mAP its mean over classes and IoU of 0.5, 0.55 to 0.95 (Lin et al. 2014, as
    pycocotools computes it).
    """
    names = dict(sorted({pair for one in gold for pair in zip(one.ids, one.names, strict=True)}))
    if not names:
        raise DataError("The split has no objects, so nothing can be found in it.", expected="boxes in some pictures")
    judged = _evaluated(found, gold, names)
    precision = judged.eval["precision"][..., _MOST]
    values = {
        "map": _mean(precision[..., _ALL]),
        "map_50": _mean(precision[0, ..., _ALL]),
        "map_75": _mean(precision[5, ..., _ALL]),
        **{f"map_{size}": _mean(precision[..., place]) for size, place in _SIZES.items()},
        "mar_100": _mean(judged.eval["recall"][..., _ALL, _MOST]),
    }
    each = np.stack([_influences(judged, place, gold, key) for place, key in enumerate(names)])
    influences = {"map": each.mean(axis=(0, 1)), "map_50": each[:, 0].mean(axis=0)}
    for place, name in enumerate(names.values()) if len(names) > 1 else ():
        values[f"ap_{name}"] = _mean(precision[:, :, place, _ALL])
        influences[f"ap_{name}"] = each[place].mean(axis=0)
    return Figures({name: value for name, value in values.items() if value >= 0}, influences)


def rows(kept: Mapping[str, np.ndarray], model: str, target: str) -> list[Measurement]:
    """A row for each figure, with an interval where it is known what each picture adds."""
    found = figures(kept["found"], [read_gold(one) for one in kept["gold"].tolist()])
    count = len(kept["gold"])
    measured = []
    for name, value in found.values.items():
        row = Measurement(model=model, metric=name, target=target, value=value, unit="ratio", n=count)
        if name in found.influences:
            raw = value + found.influences[name]
            _, low, high = mean_interval(raw, _SEED)
            bounds = {"low": max(0.0, min(value, low)), "high": min(1.0, max(value, high))}
            row = row.model_copy(update={**bounds, "raw": None if name.startswith("ap_") else tuple(raw.tolist())})
        measured.append(row)
    return measured


def same_objects(kept: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> np.ndarray:
    """In which pictures both find the same, [n] bool: of each class as many, in pairs that overlap by half.

    What is found scores above 0.5, as transformers' pipeline shows it.
    """
    pairs = zip(kept["found"], reference["found"], strict=True)
    return np.array([_same(*(one[one[:, SCORE] > _SHOWN_FROM] for one in pair)) for pair in pairs])


def write_gold(gold: Gold) -> str:
    """As one string."""
    return json.dumps(gold)


def read_gold(text: str) -> Gold:
    """Of that string."""
    return Gold(*json.loads(text))


def overlaps(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of boxes [a, 4] and [b, 4] of x, y, width and height, [a, b]."""
    first = np.maximum(some[:, None, :2], others[None, :, :2])
    last = np.minimum(some[:, None, :2] + some[:, None, 2:], others[None, :, :2] + others[None, :, 2:])
    shared = np.clip(last - first, 0, None).prod(axis=-1)
    found: np.ndarray = shared / np.maximum(_areas(some)[:, None] + _areas(others) - shared, np.finfo(float).tiny)
    return found


def _areas(boxes: np.ndarray) -> np.ndarray:
    areas: np.ndarray = boxes[:, 2] * boxes[:, 3]
    return areas


def _same(some: np.ndarray, others: np.ndarray) -> bool:
    from scipy.optimize import linear_sum_assignment

    if Counter(some[:, CLASS].tolist()) != Counter(others[:, CLASS].tolist()):
        return False
    near = overlaps(some[:, BOX], others[:, BOX]) >= _SAME_PLACE
    allowed = near & (some[:, None, CLASS] == others[None, :, CLASS])
    places = linear_sum_assignment(~allowed)
    return bool(allowed[places].all())


def _evaluated(found: np.ndarray, gold: Sequence[Gold], names: Mapping[int, str]) -> Any:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ModuleNotFoundError as error:
        raise MissingExtraError("pycocotools", "metrics", "COCO's average precision") from error
    there = [
        {"category_id": kind, "image_id": picture, "bbox": box}
        for picture, one in enumerate(gold)
        for kind, box in zip(one.ids, one.boxes, strict=True)
    ]
    given = [
        {"category_id": int(one[CLASS]), "image_id": picture, "bbox": one[BOX].tolist(), "score": float(one[SCORE])}
        for picture, own in enumerate(found)
        for one in own
    ]
    # Its progress goes to stdout, where results are.
    with contextlib.redirect_stdout(io.StringIO()):
        judged = COCOeval(*(_data_set(COCO(), part, len(gold), names) for part in (there, given)), "bbox")
        judged.evaluate()
        judged.accumulate()
    return judged


def _data_set(made: Any, boxes: Sequence[dict[str, Any]], pictures: int, names: Mapping[int, str]) -> Any:
    for place, one in enumerate(boxes, start=1):  # 0 would be no match
        one |= {"id": place, "iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3]}
    made.dataset = {
        "images": [{"id": picture} for picture in range(pictures)],
        "annotations": list(boxes),
        "categories": [{"id": key, "name": name} for key, name in names.items()],
    }
    made.createIndex()
    return made


def _mean(values: np.ndarray) -> float:
    """Of those that there are; -1 where there are none, as COCO has it."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _influences(judged: Any, place: int, gold: Sequence[Gold], key: int) -> np.ndarray:
    """What each picture adds to the AP of a class at each IoU, [thresholds, n]."""
    sizes = len(judged.params.areaRng)
    own = judged.evalImgs[place * sizes * len(gold) :][: len(gold)]
    seen = [(picture, one) for picture, one in enumerate(own) if one is not None]
    owners = np.concatenate([np.full(len(one["dtScores"]), picture) for picture, one in seen]).astype(np.int64)
    scores = np.concatenate([one["dtScores"] for _, one in seen]).astype(np.float64)
    matches = np.concatenate([one["dtMatches"] for _, one in seen], axis=1) > 0
    objects = np.array([one.ids.count(key) for one in gold])
    return np.stack([precision_influence(scores, right, owners, objects)[1] for right in matches])
