"""Distillation of detectors whose answers are a set: queries of student and teacher are matched before they compare."""

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
    """How far a set of answers [B, Q, C + 1 + 4] is from the teacher's: logits, the last of none, and boxes.

    Each query of the teacher is given one of the student's, so that what they say costs least (the Hungarian method on
    cross-entropy, L1 and generalized overlap). Then T^2 KL of the classes, averaged over queries, and the distances of
    boxes, weighted by the probability that the teacher sees something there, by their sum (Chang et al. 2023,
    DETRDistill, section 3.2). Boxes are centre, width and height in shares of the picture.

    ``separate``: [B, Q, C + 4], each class is yes or no by itself: as many softmaxes of a logit and 0, whose sum
    counts, and something is there as likely as the likeliest class.
    """
    mine, theirs = _split(student), _split(teacher)
    with torch.no_grad():
        places = _matched(mine, theirs, box_weight, overlap_weight, separate)
    logits, boxes = (torch.gather(part, 1, places[..., None].expand_as(part)) for part in mine)
    taught, taught_boxes = theirs
    both = [_yes_or_no(part) if separate else part for part in (logits.flatten(0, 1), taught.flatten(0, 1))]
    each = taught.shape[-1] if separate else 1
    classes = each * softened_kl(both[0].flatten(0, -2), both[1].flatten(0, -2), temperature)
    seen = _seen(taught, separate)
    apart = l1_loss(boxes, taught_boxes, reduction="none").sum(dim=-1)
    gap = 1 - generalized_overlap(corners(boxes), corners(taught_boxes))
    weighted = (seen * (box_weight * apart + overlap_weight * gap)).sum()
    return classes + weighted / seen.sum().clamp(min=1)


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """Boxes [..., 4] of centre, width and height by their upper left and lower right corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def generalized_overlap(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """GIoU of boxes [..., 4] by their corners, from -1 to 1 (Rezatofighi et al. 2019, algorithm 1)."""
    shared = _area(torch.maximum(some[..., :2], others[..., :2]), torch.minimum(some[..., 2:], others[..., 2:]))
    union = _area(some[..., :2], some[..., 2:]) + _area(others[..., :2], others[..., 2:]) - shared
    hull = _area(torch.minimum(some[..., :2], others[..., :2]), torch.maximum(some[..., 2:], others[..., 2:]))
    least = torch.finfo(union.dtype).eps
    return shared / union.clamp(min=least) - (hull - union) / hull.clamp(min=least)


def _area(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    return (last - first).clamp(min=0).prod(dim=-1)


def _split(answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return answers[..., :-_COORDINATES], answers[..., -_COORDINATES:]


def _yes_or_no(logits: torch.Tensor) -> torch.Tensor:
    """Logits [...] of classes that are separate as those of two classes each, [..., 2]."""
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


def _seen(logits: torch.Tensor, separate: bool) -> torch.Tensor:
    """How likely something is there, [B, Q]."""
    return logits.sigmoid().amax(dim=-1) if separate else 1 - softmax(logits, dim=-1)[..., -1]


def _matched(
    mine: tuple[torch.Tensor, torch.Tensor],
    theirs: tuple[torch.Tensor, torch.Tensor],
    box_weight: float,
    overlap_weight: float,
    separate: bool,
) -> torch.Tensor:
    """For each query of the teacher the place of the student's, [B, Q]."""
    from scipy.optimize import linear_sum_assignment

    taught, said = (_yes_or_no(part) if separate else part for part in (theirs[0], mine[0]))
    wanted, found = softmax(taught, dim=-1).flatten(2), log_softmax(said, dim=-1).flatten(2)
    classes = -wanted @ found.transpose(1, 2)
    apart = torch.cdist(theirs[1], mine[1], p=1)
    overlap = generalized_overlap(corners(theirs[1])[:, :, None], corners(mine[1])[:, None])
    seen = _seen(theirs[0], separate)[..., None]
    cost = classes + seen * (box_weight * apart - overlap_weight * overlap)
    return torch.stack([torch.from_numpy(linear_sum_assignment(own)[1]) for own in cost.cpu().double().numpy()]).to(
        cost.device
    )
