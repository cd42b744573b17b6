"""COCO detection metrics by pycocotools, with intervals over images. Imports no torch.

pycocotools is the reference implementation of these metrics. Only its input is made here.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.results.report import Measurement
from compress.tasks.lazy_modules import calibration, np
from compress.tasks.task import NamedArrays
from compress.utils.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval


SCORE, CLASS, BOX = 0, 1, slice(2, 6)
"""Columns of a detection: score, class id, and [x, y, width, height] in pixels."""
_SEED = 0
_ALL, _MOST = 0, 2
"""COCO's indices of objects of every size and of at most 100 detections per image."""
_SIZES = {"small": 1, "medium": 2, "large": 3}
"""Objects below 32 x 32 pixels, up to 96 x 96, and above."""
_SHOWN_FROM, _SAME_PLACE = 0.5, 0.5


class Gold(NamedTuple):
    """Reference objects of an image: ids and names of classes, and boxes as [x, y, width, height] in pixels."""

    ids: list[int]
    names: list[str]
    boxes: list[list[float]]


class Figures(NamedTuple):
    """COCO metrics by name, and the influence of each image on some of them, [n]."""

    values: dict[str, float]
    influences: dict[str, np.ndarray]


def figures(detections: np.ndarray, gold: Sequence[Gold]) -> Figures:
    """Return the metrics of detections [n, d, 6]. Raises `DataError` without objects, `MissingExtraError`.

    AP is the mean precision at 101 recalls; mAP is its mean over classes and IoU thresholds 0.5, 0.55, ... 0.95 (Lin et
    al. 2014, as computed by pycocotools).
    """
    names = dict(sorted({pair for reference in gold for pair in zip(reference.ids, reference.names, strict=True)}))
    if not names:
        raise DataError("The split has no objects to evaluate on.", expected="boxes in some pictures")
    judged = _evaluated(detections, gold, names)
    precision = judged.eval["precision"][..., _MOST]
    values = {
        "map": _mean(precision[..., _ALL]),
        "map_50": _mean(precision[0, ..., _ALL]),
        "map_75": _mean(precision[5, ..., _ALL]),
        **{f"map_{size}": _mean(precision[..., index]) for size, index in _SIZES.items()},
        "mar_100": _mean(judged.eval["recall"][..., _ALL, _MOST]),
    }
    stacked = np.stack([_influences(judged, index, gold, key) for index, key in enumerate(names)])
    influences = {"map": stacked.mean(axis=(0, 1)), "map_50": stacked[:, 0].mean(axis=0)}
    for index, name in enumerate(names.values()) if len(names) > 1 else ():
        values[f"ap_{name}"] = _mean(precision[:, :, index, _ALL])
        influences[f"ap_{name}"] = stacked[index].mean(axis=0)
    return Figures({name: value for name, value in values.items() if value >= 0}, influences)


def rows(collected: NamedArrays, model: str, target: str) -> list[Measurement]:
    """Return a row for each metric, with an interval if the influence of each image is known."""
    metrics = figures(collected["found"], [read_gold(text) for text in collected["gold"].tolist()])
    count = len(collected["gold"])
    measured = []
    for name, value in metrics.values.items():
        row = Measurement(model=model, metric=name, target=target, value=value, unit="ratio", n=count)
        if name in metrics.influences:
            raw = value + metrics.influences[name]
            _, low, high = calibration.mean_interval(raw, _SEED)
            bounds = {"low": max(0.0, min(value, low)), "high": min(1.0, max(value, high))}
            row = row.model_copy(update={**bounds, "raw": None if name.startswith("ap_") else tuple(raw.tolist())})
        measured.append(row)
    return measured


def same_objects(collected: NamedArrays, reference: NamedArrays) -> np.ndarray:
    """Return for each image whether both models detect the same objects, [n] bool.

    Both must have as many detections of each class, in pairs with IoU of at least 0.5. Detections count from a score of
    0.5, as in transformers' pipeline.
    """
    from scipy.optimize import linear_sum_assignment

    outcomes = []
    for pair in zip(collected["found"], reference["found"], strict=True):
        some, others = (boxes[boxes[:, SCORE] > _SHOWN_FROM] for boxes in pair)
        near = overlaps(some[:, BOX], others[:, BOX]) >= _SAME_PLACE
        allowed = near & (some[:, None, CLASS] == others[None, :, CLASS])
        alike = Counter(some[:, CLASS].tolist()) == Counter(others[:, CLASS].tolist())
        outcomes.append(alike and bool(allowed[linear_sum_assignment(~allowed)].all()))
    return np.array(outcomes)


def write_gold(gold: Gold) -> str:
    """Return the reference objects as a string."""
    return json.dumps(gold)


def read_gold(text: str) -> Gold:
    """Return the reference objects of such a string."""
    return Gold(*json.loads(text))


def overlaps(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the IoU of boxes [a, 4] and [b, 4] (x, y, width, height), [a, b]."""
    first = np.maximum(some[:, None, :2], others[None, :, :2])
    last = np.minimum(some[:, None, :2] + some[:, None, 2:], others[None, :, :2] + others[None, :, 2:])
    shared = np.clip(last - first, 0, None).prod(axis=-1)
    areas, other_areas = (boxes[:, 2] * boxes[:, 3] for boxes in (some, others))
    iou: np.ndarray = shared / np.maximum(areas[:, None] + other_areas - shared, np.finfo(float).tiny)
    return iou


def _evaluated(detections: np.ndarray, gold: Sequence[Gold], names: Mapping[int, str]) -> COCOeval:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ModuleNotFoundError as error:
        raise MissingExtraError("pycocotools", "metrics", "COCO's average precision") from error
    annotations = [
        {"category_id": kind, "image_id": picture, "bbox": box}
        for picture, detection in enumerate(gold)
        for kind, box in zip(detection.ids, detection.boxes, strict=True)
    ]
    given = [
        {"category_id": int(row[CLASS]), "image_id": picture, "bbox": row[BOX].tolist(), "score": float(row[SCORE])}
        for picture, rows in enumerate(detections)
        for row in rows
    ]
    # Its progress goes to stdout, where results are.
    with contextlib.redirect_stdout(io.StringIO()):
        judged = COCOeval(*(_data_set(COCO(), part, len(gold), names) for part in (annotations, given)), "bbox")
        judged.evaluate()
        judged.accumulate()
    return judged


def _data_set(coco: Any, boxes: Sequence[dict[str, Any]], pictures: int, names: Mapping[int, str]) -> COCO:
    for box_id, box in enumerate(boxes, start=1):  # 0 would be no match
        box |= {"id": box_id, "iscrowd": 0, "area": box["bbox"][2] * box["bbox"][3]}
    coco.dataset = {
        "images": [{"id": picture} for picture in range(pictures)],
        "annotations": list(boxes),
        "categories": [{"id": key, "name": name} for key, name in names.items()],
    }
    coco.createIndex()
    return coco


def _mean(values: np.ndarray) -> float:
    """Return the mean of the valid values, or -1 if there are none, as in COCO."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _influences(judged: Any, class_index: int, gold: Sequence[Gold], key: int) -> np.ndarray:
    """Return what each image adds to the AP of a class at each IoU threshold, [thresholds, n]."""
    sizes = len(judged.params.areaRng)
    class_images = judged.evalImgs[class_index * sizes * len(gold) :][: len(gold)]
    seen = [(picture, image_result) for picture, image_result in enumerate(class_images) if image_result is not None]
    owners = np.concatenate([np.full(len(result["dtScores"]), picture) for picture, result in seen]).astype(np.int64)
    scores = np.concatenate([image_result["dtScores"] for _, image_result in seen]).astype(np.float64)
    matches = np.concatenate([image_result["dtMatches"] for _, image_result in seen], axis=1) > 0
    objects = np.array([image_result.ids.count(key) for image_result in gold])
    return np.stack([precision_influence(scores, right, owners, objects)[1] for right in matches])


def precision_influence(
    scores: np.ndarray, right: np.ndarray, owners: np.ndarray, objects: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the average precision A of one class, and n dA/dw of each image's weight w at 1, [n].

    A is the area below precision as a function of recall, made monotonically decreasing: A = sum over correct
    detections k of max over j >= k of P_j, divided by the number of objects, with P_j = C_j / (C_j + F_j) and C and F
    the correct and wrong detections up to j. A weight applies to all objects and detections of an image. A does not
    change when all weights are scaled, so the influences sum to 0 (Euler). A + influence has the mean A and, to first
    order, the variance of A (infinitesimal jackknife: Jaeckel 1972; Efron 1982, chapter 6).

    Args:
        scores: Scores of all detections [d].
        right: Correctness of the detections [d].
        owners: Index of the image of each detection [d].
        objects: Number of objects in each image [n].

    Raises:
        ValueError: If there are no objects.
    """
    total, pictures = objects.sum(), len(objects)
    if not total > 0:
        raise ValueError("expected at least one object")
    if not len(scores):
        return 0.0, np.zeros(pictures)
    # Rank detections by score.
    order = np.argsort(-scores, kind="stable")
    hit, owner = right[order].astype(np.float64), owners[order]
    correct, ranks = np.cumsum(hit), np.arange(1, len(hit) + 1, dtype=np.float64)
    precision = correct / ranks
    # The place of the best precision from each rank on; of equal ones the last, whatever lies between.
    # For each position the latest position up to it that set a new maximum.
    values = precision[::-1]
    highest = np.maximum.accumulate(values)
    new = np.r_[True, highest[1:] > highest[:-1]]
    positions: np.ndarray = np.maximum.accumulate(np.where(new, np.arange(len(values)), 0))
    reached = len(hit) - 1 - positions[::-1]
    # Interpolated precision at each rank.
    best = precision[reached]
    area = float((hit * best).sum() / total)
    # How often the area uses the precision of each rank.
    reads = np.bincount(reached, weights=hit / total, minlength=len(hit)) / ranks**2
    # A right detection up to j raises P_j by F_j / (C_j + F_j)^2, a wrong one lowers it by C_j / (C_j + F_j)^2.
    gain = np.cumsum((reads * (ranks - correct))[::-1])[::-1]
    loss = np.cumsum((reads * correct)[::-1])[::-1]
    contributions = hit * best / total + hit * gain - (1 - hit) * loss
    # Sum the contributions of each image and subtract its share of the objects.
    sums = np.bincount(owner, weights=contributions, minlength=pictures)
    influence: np.ndarray = pictures * (sums - area * objects / total)
    return area, influence
