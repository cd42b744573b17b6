"""Distillation losses as defined in their papers. B: batch, L: length, H: heads, D: head size, C: classes."""

from __future__ import annotations

import torch
from torch.nn.functional import kl_div, l1_loss, log_softmax, logsigmoid, normalize, softmax


def softened_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits [B, C], averaged over the batch.

    Hinton et al. 2015, section 2; the factor T^2 keeps gradients of the same size for any temperature.
    """
    log_student = log_softmax(student / temperature, dim=-1)
    log_teacher = log_softmax(teacher / temperature, dim=-1)
    return kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def embedding_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of embeddings [B, D], averaged over the batch.

    Reimers and Gurevych 2020, equation 1. For embeddings of length 1 it is 2 - 2 cos(student, teacher).
    """
    return (student - teacher).square().sum(dim=-1).mean()


def affinity_kl(
    student: tuple[torch.Tensor, torch.Tensor], teacher: tuple[torch.Tensor, torch.Tensor], temperature: float
) -> torch.Tensor:
    """Return the KL divergence of image-text affinities from the teacher's, averaged over both directions.

    Each side has embeddings of images and texts [B, D] of length 1 and any D. The softmax of rows and of columns of
    their affinities I Tᵀ / ``temperature`` is compared (Wu et al. 2023, TinyCLIP, section 3.1).
    """
    mine, theirs = (images @ texts.T / temperature for images, texts in (student, teacher))
    return (softened_kl(mine, theirs, 1.0) + softened_kl(mine.T, theirs.T, 1.0)) / 2


def feature_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared distance of features [B, C, H, W] whose channels are normalised at each position.

    Zhang et al. 2018 (LPIPS), equation 1, with equal weights of all channels.
    """
    mine, taught = (normalize(features, dim=1) for features in (student, teacher))
    return (mine - taught).square().sum(1).mean()


def supervised_contrastive(embeddings: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the supervised contrastive loss of embeddings [B, D] with labels [B].

    Khosla et al. 2020, equation 2: the mean over the anchors with another example of their label; 0 if there is none.
    """
    unit = normalize(embeddings, dim=-1)
    others = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    positive = (labels[:, None] == labels[None, :]) & others
    logits = (unit @ unit.T / temperature).masked_fill(~others, float("-inf"))
    likely = log_softmax(logits, dim=-1).masked_fill(~positive, 0.0).sum(dim=-1)
    counts = positive.sum(dim=-1)
    anchors = counts > 0
    return -(likely[anchors] / counts[anchors]).sum() / anchors.sum().clamp(min=1)


def paired_contrastive(logits: torch.Tensor, belongs: torch.Tensor) -> torch.Tensor:
    """Return the symmetric contrastive loss of image-text logits [B, B]; ``belongs`` [B, B] marks matching pairs.

    The mean over the texts of each image and over the images of each text (Yang et al. 2022, UniCL, section 3.2). If
    each image has exactly one text, it is the loss of CLIP (Radford et al. 2021, figure 3).
    """
    share = belongs.to(logits.dtype)
    rows = (log_softmax(logits, dim=1) * share).sum(dim=1) / share.sum(dim=1)
    columns = (log_softmax(logits, dim=0) * share).sum(dim=0) / share.sum(dim=0)
    return -(rows.mean() + columns.mean()) / 2


def sigmoid_contrastive(logits: torch.Tensor, belongs: torch.Tensor) -> torch.Tensor:
    """Return the sigmoid loss of image-text logits [B, B]: each pair is a separate binary classification.

    Zhai et al. 2023 (SigLIP), equation 1, with every pair marked in ``belongs`` [B, B] as positive.
    """
    signs = 2 * belongs.to(logits.dtype) - 1
    return -logsigmoid(signs * logits).sum(dim=1).mean()


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
    mine_logits, their_logits = (
        (_yes_or_no(part) if separate else part).flatten(0, -2) for part in (logits, teacher_logits)
    )
    factor = teacher_logits.shape[-1] if separate else 1
    classes = factor * softened_kl(mine_logits, their_logits, temperature)
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
    teacher_probabilities = softmax(teacher_logits, dim=-1).flatten(2)
    student_logs = log_softmax(student_logits, dim=-1).flatten(2)
    # Cross-entropy between every pair of queries.
    classes = -teacher_probabilities @ student_logs.transpose(1, 2)
    l1_distance = torch.cdist(theirs[1], mine[1], p=1)
    overlap = generalized_overlap(corners(theirs[1])[:, :, None], corners(mine[1])[:, None])
    object_probability = _seen(theirs[0], separate)[..., None]
    # Boxes count only where the teacher sees an object.
    cost = classes + object_probability * (box_weight * l1_distance - overlap_weight * overlap)
    matches = [torch.from_numpy(linear_sum_assignment(costs)[1]) for costs in cost.cpu().double().numpy()]
    return torch.stack(matches).to(cost.device)
