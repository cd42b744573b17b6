"""Losses that draw together the embeddings that belong together. B: batch, D: dimensions."""

from __future__ import annotations

import torch
from torch.nn.functional import log_softmax, logsigmoid, normalize


def supervised_contrastive(embeddings: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of embeddings [B, D], how unlikely the others of the same label [B] are among all others.

    Khosla et al. 2020, equation 2: the mean over the anchors that have another of their label. 0 where none has.
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
    """Of logits [B, B] of images and texts, how unlikely what ``belongs`` [B, B] together is, both ways.

    The mean over the texts of each image and over the images of each text (Yang et al. 2022, UniCL, section 3.2);
    where each image has a text of its own it is the loss of CLIP (Radford et al. 2021, figure 3).
    """
    share = belongs.to(logits.dtype)
    rows = (log_softmax(logits, dim=1) * share).sum(dim=1) / share.sum(dim=1)
    columns = (log_softmax(logits, dim=0) * share).sum(dim=0) / share.sum(dim=0)
    return -(rows.mean() + columns.mean()) / 2


def sigmoid_contrastive(logits: torch.Tensor, belongs: torch.Tensor) -> torch.Tensor:
    """Of logits [B, B] of images and texts, each a question of its own whether both belong together.

    Zhai et al. 2023 (SigLIP), equation 1, with every pair that ``belongs`` [B, B] together for a positive one.
    """
    signs = 2 * belongs.to(logits.dtype) - 1
    return -logsigmoid(signs * logits).sum(dim=1).mean()
