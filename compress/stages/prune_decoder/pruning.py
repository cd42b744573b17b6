"""Structured pruning of a language model from its checkpoint: whole layers, then the widths of those that remain."""

from __future__ import annotations

from compress.models.checkpoint import Checkpoint
from compress.models.folder_checks import refuse_quantized
from compress.stages.base import Context
from compress.stages.blockwise.blockwise_model import build_blockwise_model
from compress.stages.blockwise.calibration import calibration_sequences
from compress.stages.blockwise.write import config_changes
from compress.stages.prune_decoder.depth import check_removal, remove_blocks
from compress.stages.prune_decoder.settings import DecoderPruning, calibration_settings
from compress.stages.prune_decoder.width import narrow
from compress.stages.prune_decoder.width_sizes import Sizes
from compress.utils.storage import storage_errors


def prune(checkpoint: Checkpoint, settings: DecoderPruning, context: Context, blind: bool = False) -> Checkpoint:
    """Return the pruned checkpoint in the context's scratch folder.

    Layers are removed first, then parts of the remaining layers.

    Args:
        checkpoint: the model.
        settings: which parts are removed.
        context: data and folders of the stage.
        blind: remove parts without reading text that says which, so that only the sizes are right.

    Raises:
        CompressError: a part cannot be removed, or the text is too short.
    """
    refuse_quantized(checkpoint.folder)
    text, ids = calibration_settings(settings), None
    if not blind:
        ids = calibration_sequences(context, checkpoint, settings.samples, settings.sequence_length)
    with storage_errors(context.scratch):
        context.scratch.mkdir(parents=True, exist_ok=True)
        if settings.layers:
            checkpoint = remove_blocks(checkpoint, settings, text, ids, context)
        if settings.removes_width:
            checkpoint = narrow(checkpoint, settings, text, ids, context)
        return checkpoint


def check_prunable(checkpoint: Checkpoint, settings: DecoderPruning) -> None:
    """Prune a model without weights. Raises `StageError` if a part cannot be removed, or nothing would be left."""
    refuse_quantized(checkpoint.folder)
    decoder = build_blockwise_model(checkpoint)
    if settings.layers:
        check_removal(len(decoder.blocks), settings.layers)
    if settings.removes_width:
        config_changes(checkpoint.folder, Sizes.of(decoder.model, settings).cut)
