"""Narrower blocks of a decoder: heads in their groups, feed-forward neurons and experts go, and the block is written.

One walk over the calibration text, one block in memory: what stays is chosen while the text passes the block, which is
cut then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from compress.models.attention_pruning import keep_attention_units, keep_columns, keep_rows
from compress.models.checkpoint import Checkpoint
from compress.models.experts import SeparateExperts, find_separate_experts, is_fused
from compress.models.hooks import removed_on_exit
from compress.models.meta_model import build_decoder_on_meta, stored_shapes
from compress.models.structure import TransformerBlock, blocks
from compress.numerics.gptq import output_error
from compress.numerics.pruning import most_important, remove_parts
from compress.stages.base import Context
from compress.stages.blockwise.blockwise_model import BlockwiseModel, build_blockwise_model
from compress.stages.blockwise.calibration import CalibrationActivations
from compress.stages.blockwise.layers import Layer
from compress.stages.blockwise.resume import BlockCache
from compress.stages.blockwise.write import config_changes, write_pruned
from compress.stages.gptq.settings import Quantization
from compress.stages.prune_decoder.settings import DecoderPruning
from compress.stages.prune_decoder.width_sizes import Sizes
from compress.utils.errors import StageError
from compress.utils.torch_device import autocast, current_device, device_memory_errors

PLACES, NEURONS = "places", "neurons"


@dataclass(frozen=True)
class PrunablePart:
    """Parts of a block that are pruned together: the layer that reads its ``count`` parts, of which ``left`` remain."""

    layer: nn.Linear
    name: str
    count: int
    left: int


@dataclass
class PartSelection:
    """Selection of the parts that remain in one block after the other; without a ``stream`` the first ones."""

    decoder: BlockwiseModel
    sizes: Sizes
    stream: CalibrationActivations | None
    damping: float
    solved: list[Layer] = field(default_factory=list)
    """Layers of the last block that were fitted, with the relative error of what they give."""

    def mixtures(self, index: int) -> dict[str, SeparateExperts]:
        """Return the mixtures of a block whose experts become fewer. Raises `StageError` if they are one tensor."""
        if not self.sizes.experts:
            return {}
        name = f"{self.decoder.prefix}.{index}"
        mixtures = find_separate_experts(self.decoder.blocks[index], name)
        # Experts in one fused tensor cannot be removed one by one.
        fused = [path for path, part in self.decoder.blocks[index].named_modules(prefix=name) if is_fused(part)]
        if fused:
            raise StageError(
                f"The experts of {fused[0]} cannot be told apart: the checkpoint keeps them in one tensor.",
                where="prune_decoder.experts",
                hint="leave experts out",
            )
        return mixtures

    def of(self, index: int, block: TransformerBlock | None) -> dict[str, torch.Tensor]:
        """Return the remaining parts of a loaded block: of `PLACES`, `NEURONS`, and mixtures by name, ascending."""
        read: dict[str, tuple[Any, int, int]] = {}
        if block is not None and self.sizes.places:
            read[PLACES] = block.require_attention().output, block.prunable_units, self.sizes.places
        if block is not None and self.sizes.neurons:
            read[NEURONS] = block.require_feed_forward().output, block.neurons, self.sizes.neurons
        named = self.decoder.name
        parts = {kind: PrunablePart(layer, named(layer), count, left) for kind, (layer, count, left) in read.items()}
        mixtures = self.mixtures(index)
        counts = {name: (part.count, part.left) for name, part in parts.items()}
        counts |= {name: (mixture.count, self.sizes.experts or 0) for name, mixture in mixtures.items()}
        self.solved = []
        # Without text, as in a dry run, any parts of the right number will do.
        if self.stream is None:
            return {name: torch.arange(left) for name, (_, left) in counts.items()}
        selection: dict[str, torch.Tensor] = {}
        if mixtures or not parts:
            # The experts that the router chooses most often remain.
            chosen = self._count_choices(self.stream, index, mixtures)
            selection = {name: most_important(choices, counts[name][1]) for name, choices in chosen.items()}
        return selection | self._solved(self.stream, index, parts) if parts else selection

    def _count_choices(
        self, stream: CalibrationActivations, index: int, mixtures: dict[str, SeparateExperts]
    ) -> dict[str, torch.Tensor]:
        """Return how often each expert of each mixture is chosen while all sequences pass the block as it is."""
        totals = {name: torch.zeros(part.count) for name, part in mixtures.items()}

        def count(name: str, part: SeparateExperts, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            chosen = named["top_k_index"] if "top_k_index" in named else arguments[1]
            totals[name] += part.routed(chosen).cpu()

        work = stream.pass_through(index, {})
        hooks = (
            part.register_forward_pre_hook(
                lambda _, arguments, named, name=name, part=part: count(name, part, arguments, named), with_kwargs=True
            )
            for name, part in mixtures.items()
        )
        with removed_on_exit(hooks):
            stream.leave(index, (work.run(batch()) for batch in work.batches))
        return totals

    def _solved(
        self, stream: CalibrationActivations, index: int, parts: dict[str, PrunablePart]
    ) -> dict[str, torch.Tensor]:
        """Return the remaining parts; update in place the layers that read them: zeros, and the rest compensates."""
        kinds, selection = {part.name: kind for kind, part in parts.items()}, dict[str, torch.Tensor]()

        def solve(names: Sequence[str], hessian: torch.Tensor) -> None:
            for name in names:
                part = parts[kinds[name]]
                with autocast(False, self.decoder.device):  # the block's own pass may be in bf16
                    selection[kinds[name]] = self._solve(part, hessian).cpu()

        modules = {part.name: part.layer for part in parts.values()}
        stream.leave(index, stream.pass_through(index, modules).solve(solve))
        return selection

    def _solve(self, part: PrunablePart, hessian: torch.Tensor) -> torch.Tensor:
        whole = part.layer.weight
        size = whole.shape[1] // part.count
        try:
            # Optimal brain surgeon: remove the part with the smallest error, and let the rest compensate.
            stays, fitted = remove_parts(whole, hessian, size, part.left, self.damping)
        except ValueError as error:
            raise StageError(
                f"The layer {part.name} cannot be cut: {error}.",
                hint="give more calibration text (samples), or raise damp_percent",
            ) from error
        fitted = self.decoder.rounded(part.name, fitted)
        rows, columns = whole.shape
        self.solved.append(Layer(part.name, rows, columns, None, error=output_error(whole, fitted, hessian)))
        part.layer.weight = nn.Parameter(fitted, requires_grad=False)
        return stays


def narrow(
    checkpoint: Checkpoint, settings: DecoderPruning, text: Quantization, ids: torch.Tensor | None, context: Context
) -> Checkpoint:
    """Remove groups of heads, neurons and experts from each block and write the narrower checkpoint.

    A killed run continues at the next block.

    Args:
        checkpoint: Model to prune.
        settings: Shares to remove, and how the parts are chosen.
        text: Settings of the calibration text.
        ids: Tokens of the calibration text, [windows, length]. Without them the first parts are kept.
        context: Data and folders of the stage.

    Raises:
        StageError: Nothing would be left, parts of the architecture are unknown, or the config cannot describe the
            remaining ones.
    """
    decoder = build_blockwise_model(checkpoint, current_device())
    sizes = Sizes.of(decoder.model, settings)
    changes = config_changes(checkpoint.folder, sizes.cut)
    stream = None
    if ids is not None:
        folder = context.scratch / "states"
        folder.mkdir(parents=True, exist_ok=True)
        stream = CalibrationActivations(decoder, text, ids, folder)
    choice = PartSelection(decoder, sizes, stream, settings.damp_percent)
    finished = BlockCache(context.scratch / "narrow")
    finished.folder.mkdir(parents=True, exist_ok=True)
    work = _Work(decoder, sizes, choice, finished, context)
    narrowed = write_pruned(checkpoint, context.scratch / "narrowed", changes, work.tensors())
    if stream is not None:
        layers = [layer for index in range(len(decoder.blocks)) for layer in finished.layers(index) or ()]
        errors, left = {layer.name: layer.error or 0.0 for layer in layers}, ""
        if errors:
            # The difference that remains after fitting.
            worst, mean = max(errors, key=errors.__getitem__), sum(errors.values()) / len(errors)
            left = f"; their outputs differ from those of all by {mean:.2%}, at most {errors[worst]:.2%} in {worst}"
        context.note(f"prune_decoder: {sizes}{left}")
    return narrowed


@dataclass
class _Work:
    decoder: BlockwiseModel
    sizes: Sizes
    choice: PartSelection
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
                cut = parameters[path].data
                stored = (cut.T if path.removesuffix(".weight") in self.decoder.transposed else cut).to(stored)
            if experts is not None and path in self.shapes:
                # Such as a router's: keep the entries of the experts that remain.
                sizes = list(zip(stored.shape, self.shapes[path], strict=True))
                changed = (self.sizes.found[2], len(experts))
                stored = stored.index_select(sizes.index(changed), experts) if changed in sizes else stored
            yield path, stored
