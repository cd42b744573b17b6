"""Pruning a language model from its checkpoint, tensor by tensor: whole blocks, their widths, or single weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.models.checkpoint import Checkpoint
from compress.models.folder_checks import refuse_quantized
from compress.stages.blockwise.build import build_skeleton
from compress.stages.blockwise.calibration import calibration_windows
from compress.stages.blockwise.cost import pruning_text
from compress.stages.blockwise.pruned_checkpoint import config_changes
from compress.stages.prune_decoder.depth import check_removal, remove_blocks
from compress.stages.prune_decoder.width import narrow
from compress.stages.prune_decoder.width_sizes import Sizes
from compress.stages.sparsify.decoder import check_pattern, sparsify
from compress.utils.storage import storage_errors

if TYPE_CHECKING:
    from compress.stages.base import Context
    from compress.stages.training.settings import Pruning


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
