"""Narrower blocks of a decoder: heads in their groups, feed-forward neurons and experts go, and the block is written.

One walk over the calibration text, one block in memory: what stays is chosen while the text passes the block, which is
cut then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from compress.models.attention_pruning import keep_attention_units, keep_columns, keep_rows
from compress.models.checkpoint import Checkpoint
from compress.models.meta_model import build_decoder_on_meta, stored_shapes
from compress.models.structure import TransformerBlock, blocks
from compress.stages.blockwise.blockwise_model import BlockwiseModel
from compress.stages.blockwise.build import build_blockwise_model
from compress.stages.blockwise.calibration_activations import CalibrationActivations
from compress.stages.blockwise.layers import Layer
from compress.stages.blockwise.pruned_checkpoint import config_changes, write_pruned
from compress.stages.blockwise.resume import BlockCache
from compress.stages.gptq.settings import Quantization
from compress.stages.prune_decoder.width_selection import NEURONS, PLACES, Choice
from compress.stages.prune_decoder.width_sizes import Sizes
from compress.utils.torch_device import current_device, device_memory_errors

if TYPE_CHECKING:
    from compress.stages.base import Context
    from compress.stages.prune_decoder.settings import DecoderPruning


def narrow(
    checkpoint: Checkpoint, settings: DecoderPruning, text: Quantization, ids: torch.Tensor | None, context: Context
) -> Checkpoint:
    """Each block with fewer groups of heads, neurons and experts, as ``settings`` says.

    What stays is chosen on token ``ids`` [windows, length]; without any it is the first of each. Raises `StageError`
    where none would be left, and for an architecture whose parts are not known or whose config cannot say what is left.
    A killed run goes on at the next block.
    """
    decoder = build_blockwise_model(checkpoint, current_device())
    sizes = Sizes.of(decoder.model, settings)
    changes = config_changes(checkpoint.folder, sizes.cut)
    stream = None
    if ids is not None:
        folder = context.scratch / "states"
        folder.mkdir(parents=True, exist_ok=True)
        stream = CalibrationActivations(decoder, text, ids, folder)
    choice = Choice(decoder, sizes, stream, settings.width_importance == "obs", settings.damp_percent)
    finished = BlockCache(context.scratch / "narrow")
    finished.folder.mkdir(parents=True, exist_ok=True)
    work = _Work(decoder, sizes, choice, finished, context)
    made = write_pruned(checkpoint, context.scratch / "narrowed", changes, work.tensors())
    if stream is not None:
        layers = [layer for index in range(len(decoder.blocks)) for layer in finished.layers(index) or ()]
        context.note(f"prune_decoder: {sizes}{_said(layers)}")
    return made


def _said(layers: Sequence[Layer]) -> str:
    """Return the difference that remains after fitting, in words."""
    errors = {layer.name: layer.error or 0.0 for layer in layers}
    if not errors:
        return ""
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    return f"; they give the outputs of all but for {mean:.2%}, at most {errors[worst]:.2%} in {worst}"


@dataclass
class _Work:
    decoder: BlockwiseModel
    sizes: Sizes
    choice: Choice
    finished: BlockCache
    context: Context

    @cached_property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Return the shapes of the pruned model's tensors."""
        hollow = build_decoder_on_meta(self.decoder.checkpoint.folder)
        self.sizes.cut(hollow)
        with torch.device("meta"):
            return stored_shapes(type(hollow)(hollow.config))

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the cut checkpoint, those of the blocks first."""
        described = blocks(self.decoder.model) if self.sizes.places or self.sizes.neurons else []
        count, stream = len(self.decoder.blocks), self.choice.stream
        first = 0 if stream is None else self.finished.first(count, stream)
        for index in range(first):
            yield from self._kept(index)
        for index in self.context.progress.track(range(first, count), "prune_decoder: blocks", count - first):
            with device_memory_errors(f"prune_decoder: {self.decoder.prefix}.{index}", "samples or sequence_length"):
                self.decoder.load(index)
                block = described[index] if described else None
                cut = self._cut(index, block, self.choice.of(index, block))
            if stream is None:
                yield from cut
                self.decoder.unload(index)
                continue
            tensors = {name: tensor.contiguous() for name, tensor in cut}
            self.finished.store(index, tensors, self.choice.solved)
            self.decoder.unload(index)
            stream.forget(index)
            yield from self._kept(index)
        if stream is not None:
            stream.forget(count)
        for name in self.decoder.checkpoint.files:
            if not name.startswith(f"{self.decoder.prefix}."):
                yield name, self.decoder.checkpoint.stored(name)

    def _kept(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.finished.names(index):
            yield name, self.finished.tensor(index, name)

    def _cut(
        self, index: int, block: TransformerBlock | None, stays: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the tensors of a loaded block, which is pruned in place except for its experts."""
        if block is not None and PLACES in stays:
            keep_attention_units(block.require_attention(), stays[PLACES].tolist())
        if block is not None and NEURONS in stays:
            feed_forward = block.require_feed_forward()
            for layer in feed_forward.inputs:
                keep_rows(layer, feed_forward.rows(layer, stays[NEURONS]))
            keep_columns(feed_forward.output, stays[NEURONS])
        numbers: dict[str, str | None] = {}
        experts = None
        for owner, part in self.choice.mixtures(index).items():
            experts = stays[owner]
            numbers |= dict.fromkeys(f"{owner}.{number}" for number in range(part.count))
            numbers |= {f"{owner}.{old}": f"{owner}.{new}" for new, old in enumerate(experts.tolist())}
        yield from self._stored(index, numbers, experts)

    def _stored(
        self, index: int, numbers: Mapping[str, str | None], experts: torch.Tensor | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the block's tensors in the files' dtype and orientation, experts by their new ``numbers``."""
        checkpoint, name = self.decoder.checkpoint, f"{self.decoder.prefix}.{index}"
        parameters = dict(self.decoder.blocks[index].named_parameters(prefix=name))
        for path in (path for path in checkpoint.files if path.startswith(f"{name}.")):
            owner = next((owner for owner in numbers if path.startswith(f"{owner}.")), None)
            if owner is not None:
                new = numbers[owner]
                if new is not None:
                    yield path.replace(owner, new, 1), checkpoint.stored(path)
                continue
            stored = checkpoint.stored(path)
            if path in parameters:
                turned = path.removesuffix(".weight") in self.decoder.transposed
                cut = parameters[path].data
                stored = (cut.T if turned else cut).to(stored)
            yield path, self._routed(path, stored, experts)

    def _routed(self, path: str, tensor: torch.Tensor, experts: torch.Tensor | None) -> torch.Tensor:
        """Return a tensor with its entries for the ``experts`` that remain, if it has one for each of them."""
        wanted = self.shapes.get(path)
        if experts is None or wanted is None:
            return tensor
        sizes = zip(tensor.shape, wanted, strict=True)
        axis = next((axis for axis, size in enumerate(sizes) if size == (self.sizes.found[2], len(experts))), None)
        return tensor if axis is None else tensor.index_select(axis, experts)
