"""Distillation of detectors that predict sets: queries of student and teacher are matched before comparison."""

from __future__ import annotations

import torch
from torch.nn.functional import l1_loss, log_softmax, softmax

from compress.numerics.distillation import softened_kl

_COORDINATES = 4


def matched_distance(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    box_weight: float,
    overlap_weight: float,
    separate: bool = False,
) -> torch.Tensor:
    """Return the distance of predictions [B, Q, C + 1 + 4] from the teacher's: logits (the last is "no object"), boxes.

    Each query of the teacher is matched with one of the student's at least cost (the Hungarian method on
    cross-entropy, L1 and generalized overlap). The loss is T^2 KL of the classes, averaged over queries, plus the
    distances of boxes, weighted by the teacher's probability of an object and divided by its sum (Chang et al. 2023,
    DETRDistill, section 3.2). Boxes are centre, width and height as shares of the image.

    Args:
        student: Predictions of the student [B, Q, C + 1 + 4], or [B, Q, C + 4] with ``separate``.
        teacher: Predictions of the teacher, of the same shape.
        temperature: Temperature T of the softmax.
        box_weight: Weight of the L1 distance of boxes.
        overlap_weight: Weight of 1 - GIoU.
        separate: Classes are independent binary decisions: their losses are summed, and the probability of an object is
            the one of the likeliest class.
    """
    mine, theirs = _split(student), _split(teacher)
    # The assignment is not differentiable.
    with torch.no_grad():
        matches = _matched(mine, theirs, box_weight, overlap_weight, separate)
    # Reorder the student's queries to match the teacher's.
    logits, boxes = (torch.gather(part, 1, matches[..., None].expand_as(part)) for part in mine)
    teacher_logits, teacher_boxes = theirs
    class_logits = [
        _yes_or_no(part) if separate else part for part in (logits.flatten(0, 1), teacher_logits.flatten(0, 1))
    ]
    factor = teacher_logits.shape[-1] if separate else 1
    classes = factor * softened_kl(class_logits[0].flatten(0, -2), class_logits[1].flatten(0, -2), temperature)
    object_probability = _seen(teacher_logits, separate)
    l1_distance = l1_loss(boxes, teacher_boxes, reduction="none").sum(dim=-1)
    gap = 1 - generalized_overlap(corners(boxes), corners(teacher_boxes))
    weighted = (object_probability * (box_weight * l1_distance + overlap_weight * gap)).sum()
    return classes + weighted / object_probability.sum().clamp(min=1)


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """Convert boxes [..., 4] of centre, width and height to upper left and lower right corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def generalized_overlap(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the GIoU of boxes [..., 4] given by corners, from -1 to 1 (Rezatofighi et al. 2019, algorithm 1)."""
    shared = _area(torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:]))
    union = _area(first[..., :2], first[..., 2:]) + _area(second[..., :2], second[..., 2:]) - shared
    # Smallest box that encloses both.
    hull = _area(torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:]))
    least = torch.finfo(union.dtype).eps
    return shared / union.clamp(min=least) - (hull - union) / hull.clamp(min=least)


def _area(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    return (last - first).clamp(min=0).prod(dim=-1)


def _split(answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return answers[..., :-_COORDINATES], answers[..., -_COORDINATES:]


def _yes_or_no(logits: torch.Tensor) -> torch.Tensor:
    """Return logits [...] of independent classes as logits of two classes each, [..., 2]."""
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


def _seen(logits: torch.Tensor, separate: bool) -> torch.Tensor:
    """Return the probability of an object, [B, Q]."""
    return logits.sigmoid().amax(dim=-1) if separate else 1 - softmax(logits, dim=-1)[..., -1]


def _matched(
    mine: tuple[torch.Tensor, torch.Tensor],
    theirs: tuple[torch.Tensor, torch.Tensor],
    box_weight: float,
    overlap_weight: float,
    separate: bool,
) -> torch.Tensor:
    """Return for each query of the teacher the index of the student's query, [B, Q].

    Args:
        mine: Logits and boxes of the student.
        theirs: Logits and boxes of the teacher.
        box_weight: Weight of the L1 distance of boxes.
        overlap_weight: Weight of the generalized overlap.
        separate: Classes are independent binary decisions.
    """
    from scipy.optimize import linear_sum_assignment

    teacher_logits, student_logits = (_yes_or_no(part) if separate else part for part in (theirs[0], mine[0]))
    teacher_probabilities, student_logs = (
        softmax(teacher_logits, dim=-1).flatten(2),
        log_softmax(student_logits, dim=-1).flatten(2),
    )
    # Cross-entropy between every pair of queries.
    classes = -teacher_probabilities @ student_logs.transpose(1, 2)
    l1_distance = torch.cdist(theirs[1], mine[1], p=1)
    overlap = generalized_overlap(corners(theirs[1])[:, :, None], corners(mine[1])[:, None])
    object_probability = _seen(theirs[0], separate)[..., None]
    # Boxes count only where the teacher sees an object.
    cost = classes + object_probability * (box_weight * l1_distance - overlap_weight * overlap)
    return torch.stack([torch.from_numpy(linear_sum_assignment(costs)[1]) for costs in cost.cpu().double().numpy()]).to(
        cost.device
    )
