"""Contrastive losses, which pull matching embeddings together. B: batch, D: dimensions."""

from __future__ import annotations

import torch
from torch.nn.functional import log_softmax, logsigmoid, normalize


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
