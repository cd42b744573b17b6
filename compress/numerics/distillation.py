"""Distillation losses as defined in their papers. B: batch, L: length, H: heads, D: head size, C: classes."""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity, kl_div, log_softmax, softmax


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


def hidden_cosine(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of 1 - cos(student, teacher) over real tokens of hidden states [B, L, W].

    Sanh et al. 2019 (DistilBERT), section 2.
    """
    distance = 1 - cosine_similarity(student, teacher, dim=-1)
    return (distance * mask).sum() / mask.sum()


def hidden_mse(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error over real tokens of hidden states [B, L, W] (TinyBERT, equation 8)."""
    error = (student - teacher).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()


def attention_mse(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of unnormalised attention scores [B, H, L, L] over pairs of real tokens.

    TinyBERT, equation 7. ``mask`` is [B, L]. Both sides have the same number of heads.
    """
    # A pair counts if both tokens are real.
    pairs = (mask[:, :, None] * mask[:, None, :])[:, None]
    error = (student - teacher).square() * pairs
    return error.sum() / (pairs.sum() * student.shape[1])


def relation_kl(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, epsilon: float = 1e-9
) -> torch.Tensor:
    """Return KL(teacher || student) of relation scores over key tokens, averaged over heads and real queries.

    MiniLM, equations 5 and 8: with scores Q K^T / sqrt(D) it is the attention loss, with V V^T / sqrt(D) the
    value-relation loss.

    Args:
        student: Scores of the student [B, H, L, L].
        teacher: Scores of the teacher [B, H, L, L].
        mask: 1 for real tokens [B, L].
        epsilon: Added to probabilities before the logarithm.
    """
    # Padding keys get no probability.
    hidden = (1 - mask)[:, None, None, :].bool()
    log_student = log_softmax(student.masked_fill(hidden, float("-inf")), dim=-1).masked_fill(hidden, 0.0)
    teacher = softmax(teacher.masked_fill(hidden, float("-inf")), dim=-1)
    divergence = (teacher * ((teacher + epsilon).log() - log_student)).masked_fill(hidden, 0.0).sum(dim=-1)
    # Padding queries do not count.
    queries = mask[:, None, :].expand_as(divergence)
    return (divergence * queries).sum() / queries.sum()


def scaled_scores(left: torch.Tensor, right: torch.Tensor, heads: int) -> torch.Tensor:
    """Return per-head scores left right^T / sqrt(D), [B, H, L, L], of projections [B, L, H * D]."""
    batch, length, width = left.shape
    size = width // heads
    a = left.view(batch, length, heads, size).transpose(1, 2)
    b = right.view(batch, length, heads, size).transpose(1, 2)
    scores: torch.Tensor = a @ b.transpose(2, 3) / size**0.5
    return scores


def uniform_layer_map(student_layers: int, teacher_layers: int) -> list[int]:
    """Return the teacher layer (counted from 1) for each student layer: g(m) = m N / M (TinyBERT, section 3)."""
    return [round((m + 1) * teacher_layers / student_layers) for m in range(student_layers)]


def affinity_kl(
    student: tuple[torch.Tensor, torch.Tensor], teacher: tuple[torch.Tensor, torch.Tensor], temperature: float
) -> torch.Tensor:
    """Return the KL divergence of image-text affinities from the teacher's, averaged over both directions.

    Each side has embeddings of images and texts [B, D] of length 1 and any D. The softmax of rows and of columns of
    their affinities I Tᵀ / ``temperature`` is compared (Wu et al. 2023, TinyCLIP, section 3.1).
    """
    mine, theirs = (images @ texts.T / temperature for images, texts in (student, teacher))
    return (softened_kl(mine, theirs, 1.0) + softened_kl(mine.T, theirs.T, 1.0)) / 2


def relative_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return |student - teacher|^2 / |teacher|^2 of the states [B, L, W] of each token, [B, L].

    It is the squared error of TinyBERT's equation 8 divided by the mean square of the target, since the states of a
    decoder grow by orders of magnitude from block to block.
    """
    return (student - teacher).square().sum(dim=-1) / teacher.square().sum(dim=-1).clamp(min=1e-12)


def feature_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared distance of features [B, C, H, W] whose channels are normalised at each position.

    Zhang et al. 2018 (LPIPS), equation 1, with equal weights of all channels.
    """
    mine, taught = (torch.nn.functional.normalize(features, dim=1) for features in (student, teacher))
    return (mine - taught).square().sum(1).mean()
