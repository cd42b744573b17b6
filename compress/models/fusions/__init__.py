"""Graph rewrites that make an exported encoder smaller and faster, each exact up to rounding."""

from __future__ import annotations

import onnx_ir as ir

from compress.models.fusions.attention import fuse_encoder_attention
from compress.models.fusions.embeddings import fold_constant_embeddings
from compress.models.fusions.first_token import select_first_token_early
from compress.models.fusions.normalization import split_skip_normalization


def optimize_encoder(model: ir.Model) -> dict[str, int]:
    """Apply every rewrite in place; returns how often each one matched."""
    return {
        "attention": fuse_encoder_attention(model),
        "constant_embeddings": fold_constant_embeddings(model),
        "first_token": select_first_token_early(model),
        "skip_normalization": split_skip_normalization(model),
    }
