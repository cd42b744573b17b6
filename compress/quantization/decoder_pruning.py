"""Pruning a language model from its checkpoint, tensor by tensor: whole blocks, their widths, or single weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.checks import refuse_quantized
from compress.quantization.block_removal import check_removal, remove_blocks
from compress.quantization.build import build_skeleton
from compress.quantization.calibration import calibration_windows
from compress.quantization.cut_checkpoint import config_changes
from compress.quantization.prediction import pruning_text
from compress.quantization.sparsify import check_pattern, sparsify
from compress.quantization.width_cut import narrow
from compress.quantization.width_sizes import Sizes
from compress.utils.storage import storage_errors

if TYPE_CHECKING:
    from compress.stage.stage import Context
    from compress.training.config import Pruning


def prune(checkpoint: Checkpoint, settings: Pruning, context: Context, blind: bool = False) -> Checkpoint:
    """The pruned checkpoint in the context's scratch folder: blocks go first, then parts of those that are left.

    ``blind``: as many parts go, but no text says which, so that the sizes alone are right. Raises `CompressError`.
    """
    refuse_quantized(checkpoint.folder)
    text, ids = pruning_text(settings), None
    if reads_text(settings) and not blind:
        ids = calibration_windows(context, checkpoint, settings.samples, settings.sequence_length)
    with storage_errors(context.scratch):
        context.scratch.mkdir(parents=True, exist_ok=True)
        if settings.zeros is not None:
            return sparsify(checkpoint, settings, text, ids, context)
        if settings.layers:
            checkpoint = remove_blocks(checkpoint, settings, text, ids, context)
        if settings.heads or settings.feed_forward or settings.experts:
            checkpoint = narrow(checkpoint, settings, text, ids, context)
        return checkpoint


def reads_text(settings: Pruning) -> bool:
    """Whether calibration text decides what goes, rather than sizes alone."""
    return settings.zeros is None or settings.method != "magnitude"


def check_cuts(checkpoint: Checkpoint, settings: Pruning) -> None:
    """Make the cuts on a model without weights. Raises `StageError` for one that cannot be made, or leaves nothing."""
    refuse_quantized(checkpoint.folder)
    skeleton = build_skeleton(checkpoint)
    if settings.layers:
        check_removal(len(skeleton.blocks), settings.layers)
    if settings.heads or settings.feed_forward or settings.experts:
        config_changes(checkpoint.folder, Sizes.of(skeleton.model, settings).cut)
    if settings.zeros is not None:
        check_pattern(skeleton, settings)
