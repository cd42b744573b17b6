"""Zeros among the weights of a decoder's blocks, by size, Wanda or SparseGPT, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compress.models.checkpoint import Checkpoint
from compress.models.experts import router_layers
from compress.models.folder_checks import refuse_quantized
from compress.numerics.gptq import output_error
from compress.numerics.pruning import magnitude_masks, sparsegpt, wanda
from compress.numerics.sparsity_pattern import Pattern
from compress.stages.base import Context
from compress.stages.blockwise.blockwise_model import BlockwiseModel, build_blockwise_model
from compress.stages.blockwise.calibration import CalibrationActivations, calibration_sequences
from compress.stages.blockwise.layers import Layer, linears
from compress.stages.blockwise.resume import BlockCache
from compress.stages.blockwise.write import write_pruned
from compress.stages.prune_decoder.settings import calibration_settings
from compress.stages.sparsify.settings import DecoderSparsity
from compress.utils.errors import StageError
from compress.utils.storage import storage_errors
from compress.utils.torch_device import autocast, current_device, device_memory_errors


def sparsify_checkpoint(checkpoint: Checkpoint, settings: DecoderSparsity, context: Context) -> Checkpoint:
    """Return the model with zeros in the linear layers of its blocks, except routers; a killed run is resumed.

    Layers are solved in the order of their calls, each on the outputs of the sparse layers before it for the
    calibration text, unless magnitudes alone decide. Raises `StageError` for layers that the pattern does not fit, and
    for Hessians that no damping makes invertible.
    """
    refuse_quantized(checkpoint.folder)
    ids = None
    if settings.method != "magnitude":
        ids = calibration_sequences(context, checkpoint, settings.samples, settings.sequence_length)
    with storage_errors(context.scratch):
        context.scratch.mkdir(parents=True, exist_ok=True)
        decoder = build_blockwise_model(checkpoint, current_device())
        pattern = check_pattern(decoder, settings)
        finished = BlockCache(context.scratch)
        text = calibration_settings(settings)
        stream = None if ids is None else CalibrationActivations(decoder, text, ids, context.scratch)
        _Walk(decoder, settings, pattern, finished, stream).run(context)
        changed = {name: index for index in range(len(decoder.blocks)) for name in finished.names(index)}
        tensors = (
            (name, finished.tensor(changed[name], name) if name in changed else checkpoint.stored(name))
            for name in checkpoint.files
        )
        sparse = write_pruned(checkpoint, context.scratch / "sparse", {}, tensors)
    layers = [layer for index in range(len(decoder.blocks)) for layer in finished.layers(index) or ()]
    zeros = sum(int((sparse.stored(f"{layer.name}.weight") == 0).sum()) for layer in layers)
    share = zeros / sum(layer.rows * layer.columns for layer in layers)
    shape = "" if settings.pattern is None else f" in the pattern {settings.pattern}"
    worst = max(layers, key=lambda layer: layer.error or 0.0)
    error = "" if worst.error is None else f"; the largest error {worst.error:.2%} in {worst.name}"
    of = f"of the weights of {len(layers)} layers are zero{shape} by {settings.method}{error}"
    context.note(f"sparsify_decoder: {share:.2%} {of}")
    return sparse


def check_sparsifiable(checkpoint: Checkpoint, settings: DecoderSparsity) -> None:
    """Raise `StageError` for a model with layers that the pattern does not fit, or without layers to prune."""
    refuse_quantized(checkpoint.folder)
    check_pattern(build_blockwise_model(checkpoint), settings)


def check_pattern(decoder: BlockwiseModel, settings: DecoderSparsity) -> Pattern | None:
    """Return the pattern of the zeros, if any. Raises `StageError` for layers that it does not fit."""
    pattern = None if settings.pattern is None else Pattern.read(settings.pattern)
    if not sum(len(_layers(decoder, index, pattern)) for index in range(len(decoder.blocks))):
        raise StageError("No layer is left to prune.", expected="torch.nn.Linear layers in the model's blocks")
    return pattern


def _layers(decoder: BlockwiseModel, index: int, pattern: Pattern | None) -> dict[str, nn.Linear]:
    """Return the layers of a block that get zeros. Raises `StageError` for one that does not hold the pattern."""
    block, prefix = decoder.blocks[index], f"{decoder.prefix}.{index}"
    routing = router_layers(block, prefix)
    layers_by_name = {name: part for name, part in linears(block, prefix).items() if name not in routing}
    misfit = next(
        (name for name, part in layers_by_name.items() if pattern and not pattern.fits(part.in_features)), None
    )
    if misfit is not None:
        raise StageError(
            f"{misfit} cannot hold the pattern {pattern}: it has {layers_by_name[misfit].in_features} inputs.",
            where="sparsify_decoder.pattern",
            hint="choose a pattern that divides them, or omit it",
        )
    return layers_by_name


@dataclass
class _Walk:
    decoder: BlockwiseModel
    settings: DecoderSparsity
    pattern: Pattern | None
    finished: BlockCache
    stream: CalibrationActivations | None

    @torch.no_grad()
    def run(self, context: Context) -> None:
        """Every block that isn't done yet."""
        count = len(self.decoder.blocks)
        first = self.finished.first(count, self.stream)
        for index in context.progress.track(range(first, count), "sparsify_decoder: blocks", count - first):
            with device_memory_errors(f"sparsify_decoder: {self.decoder.prefix}.{index}", "samples or sequence_length"):
                self._block(index)
        if self.stream is not None:
            self.stream.forget(count)

    def _block(self, index: int) -> None:
        self.decoder.load(index)
        modules, solved = _layers(self.decoder, index, self.pattern), dict[str, Layer]()

        def solve(names: Sequence[str], hessian: torch.Tensor | None) -> None:
            for name in names:
                dense = modules[name].weight
                with autocast(False, self.decoder.device):  # the block's own pass, which this is within, may be in bf16
                    sparse = self._solve(name, dense, hessian)
                # As it will be stored, so that what follows is solved on what readers will compute.
                sparse = self.decoder.rounded(name, sparse)
                error = None if hessian is None else output_error(dense, sparse, hessian)
                solved[name] = Layer(name, len(dense), dense.shape[1], bits=None, error=error)
                modules[name].weight = nn.Parameter(sparse, requires_grad=False)

        if self.stream is None:
            for name in modules:
                solve([name], None)
        else:
            self.stream.leave(index, self.stream.pass_through(index, modules).solve(solve))
        checkpoint, tensors = self.decoder.checkpoint, dict[str, torch.Tensor]()
        for name, part in modules.items():
            weight, full_name = part.weight.data, f"{name}.weight"
            weight = weight.T.contiguous() if name in self.decoder.transposed else weight
            tensors[full_name] = weight.to(checkpoint.stored(full_name).dtype)
        self.decoder.unload(index)
        self.finished.store(index, tensors, [solved[name] for name in modules])
        if self.stream is not None:
            self.stream.forget(index)

    def _solve(self, name: str, weight: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
        sparsity, method = self.settings.zeros, self.settings.method
        if hessian is None:
            return weight * magnitude_masks([weight], sparsity, self.pattern)[0]
        try:
            if method == "wanda":
                return wanda(weight, hessian, sparsity, self.pattern)
            return sparsegpt(weight, hessian, sparsity, self.pattern, self.settings.damp_percent)
        except ValueError as error:
            raise StageError(
                f"The layer {name} cannot be pruned: {error}.",
                hint="give more calibration text (samples), or raise damp_percent",
            ) from error
