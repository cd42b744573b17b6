"""Graph rewrites that make an exported model smaller and faster, each exact up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx_ir as ir

from compress.formats.onnx.fusions.average_pool import pool_globally
from compress.formats.onnx.fusions.embeddings import fold_constant_embeddings
from compress.formats.onnx.fusions.first_token import select_first_token_early
from compress.formats.onnx.fusions.normalization import split_skip_normalization

REWRITES: dict[str, Callable[[ir.Model], int]] = {
    "constant_embeddings": fold_constant_embeddings,
    "skip_normalization": split_skip_normalization,
    "first_token": select_first_token_early,
    "average_pool": pool_globally,
}
"""In the order in which they are applied; each works without the others."""


def optimize_graph(model: ir.Model, leave_out: Collection[str] = ()) -> dict[str, int]:
    """Apply every rewrite but those in ``leave_out``, in place; returns how often each one matched."""
    return {name: rewrite(model) for name, rewrite in REWRITES.items() if name not in leave_out}
