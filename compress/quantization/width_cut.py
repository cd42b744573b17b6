"""Narrower blocks of a decoder: heads in their groups, feed-forward neurons and experts go by what passes through them.

One walk over the calibration text, one block in memory: while the block as it is makes what enters the next one, what
its parts give is summed up; then it is cut, and its tensors are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.architectures.attention_cut import keep_columns, keep_places, keep_rows
from compress.architectures.description import Attention, Block, blocks
from compress.architectures.transformer import (
    check_heads_apart,
    config_with,
    fields_of_heads,
    keep_heads,
    keep_neurons,
)
from compress.architectures.watched import given, hooked
from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.experts import SeparateExperts, experts_of, is_fused
from compress.checkpoints.hollow import hollow_decoder, stored_shapes
from compress.compute_device import current_device, within_memory
from compress.errors import StageError
from compress.numerics.pruning import most_important
from compress.quantization.build import build_skeleton
from compress.quantization.config import Quantization
from compress.quantization.cut_checkpoint import config_changes, write_cut
from compress.quantization.skeleton import Skeleton
from compress.quantization.stream import Stream

if TYPE_CHECKING:
    from compress.stage.stage import Context
    from compress.training.config import Pruning

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k")
_GROUPS = ("n_group",)


def narrow(
    checkpoint: Checkpoint, settings: Pruning, text: Quantization, ids: torch.Tensor | None, context: Context
) -> Checkpoint:
    """Each block with fewer groups of heads, neurons and experts, as ``settings`` says.

    What stays is chosen on token ``ids`` [windows, length]; without any it is the first of each. Raises `StageError`
    where none would be left, and for an architecture whose parts are not known or whose config cannot say what is left.
    """
    skeleton = build_skeleton(checkpoint, current_device())
    sizes = Sizes.of(skeleton.model, settings)
    changes = config_changes(checkpoint.folder, sizes.cut)
    stream = None
    if ids is not None:
        folder = context.scratch / "states"
        folder.mkdir(parents=True, exist_ok=True)
        stream = Stream(skeleton, text, ids, folder)
        context.remark(f"prune: {sizes}")
    work = _Work(skeleton, sizes, stream, context)
    return write_cut(checkpoint, context.scratch / "narrowed", changes, work.tensors())


@dataclass(frozen=True)
class Sizes:
    """What every block keeps: ``places`` (groups of heads, or heads), ``neurons`` and ``experts``; None: all."""

    places: int | None
    neurons: int | None
    experts: int | None
    found: tuple[int, int, int]
    """How many there are now."""

    @classmethod
    def of(cls, model: Any, settings: Pruning) -> Sizes:
        """For a model without weights. Raises `StageError` that names what cannot be cut, or of which none is left."""
        places = neurons = experts = None
        found = [0, 0, 0]
        if settings.heads:
            check_heads_apart(model)
            attention = [block.attended() for block in blocks(model)]
            found[0], size = _alike({(one.places, one.head_size) for one in attention}, "heads")
            possible = [left for left in range(1, found[0]) if _can_say(model.config, attention[0], left)]
            places = _left(found[0], settings.heads, settings.multiple, size, "heads", possible)
        if settings.feed_forward:
            found[1], _ = _alike({(one.neurons, 1) for one in map(Block.fed_forward, blocks(model))}, "feed_forward")
            neurons = _left(found[1], settings.feed_forward, settings.multiple, 1, "feed_forward")
        if settings.experts:
            found[2] = int(getattr(model.config, _count_field(model)))
            experts = _left(found[2], settings.experts, 1, 1, "experts")
            _check_chosen(model, experts)
        return cls(places, neurons, experts, (found[0], found[1], found[2]))

    def cut(self, module: Any) -> None:
        """Cut a model without weights, and its config, in place: any parts, since one is as large as another.

        Of experts the config alone says how many there are.
        """
        count = len(blocks(module)) if self.places or self.neurons else 0
        if self.places:
            keep_heads(module, [range(self.places)] * count)
        if self.neurons:
            keep_neurons(module, [torch.arange(self.neurons)] * count)
        if self.experts:
            setattr(module.config, _count_field(module), self.experts)

    def __str__(self) -> str:
        names = ("heads, or groups of them,", "neurons", "experts")
        kept = zip((self.places, self.neurons, self.experts), self.found, names, strict=True)
        return ", ".join(f"{left} of {count} {name} kept in each block" for left, count, name in kept if left)


def _alike(sizes: set[tuple[int, int]], name: str) -> tuple[int, int]:
    """The one size of all blocks. Raises `StageError` where they differ."""
    if len(sizes) > 1:
        raise StageError(
            f"The blocks differ in what {name} would cut: {', '.join(str(count) for count, _ in sorted(sizes))}.",
            where=f"prune.{name}",
            expected="blocks that are all alike",
            mend=f"leave {name} out, or cut layers instead",
        )
    return next(iter(sizes))


def _can_say(config: Any, attention: Attention, places: int) -> bool:
    """Whether a config takes so many heads: Llama's wants its hidden size to be a multiple of them, say."""
    fields = fields_of_heads(config, attention, [places])
    return not fields or config_with(config, fields) is not None


def _left(count: int, share: float, multiple: int, width: int, name: str, possible: Sequence[int] | None = None) -> int:
    """How many of ``count`` parts of ``width`` features stay, so that all features are a multiple of ``multiple``.

    The nearest such number below ``count``, of those ``possible``. Raises `StageError` where there is none.
    """
    wanted = count * (1 - share)
    if round(wanted) < 1:
        raise StageError(
            f"Removing {share:.0%} of {count} {name} leaves none.", where=f"prune.{name}", mend="remove a smaller share"
        )
    even = [left for left in possible or range(1, count) if left * width % multiple == 0]
    if not even:
        raise StageError(
            f"No cut of {count} {name} leaves a multiple of {multiple} features.",
            where=f"prune.{name}",
            expected=f"more than {multiple} features to begin with",
            mend="lower `multiple`, or leave the field out",
        )
    return min(even, key=lambda left: (abs(left - wanted), -left))


def _count_field(model: Any) -> str:
    """The config's field that says how many experts each mixture has. Raises `StageError` for a model without."""
    config = model.config
    field = next((config.attribute_map.get(name, name) for name in _COUNTS if getattr(config, name, None)), None)
    mixtures = [part for part in model.modules() if isinstance(part, SeparateExperts) or is_fused(part)]
    if field is None or not mixtures:
        raise StageError(
            f"A {config.model_type!r} model has no experts that are known.",
            where="prune.experts",
            expected="a mixture of experts whose config says how many there are",
            mend="leave experts out",
        )
    return str(field)


def _check_chosen(model: Any, left: int) -> None:
    config = model.config
    chosen = next((int(getattr(config, name)) for name in _CHOSEN if getattr(config, name, None)), 1)
    if chosen > left:
        raise StageError(
            f"Each token passes {chosen} experts, and {left} would be left.",
            where="prune.experts",
            expected=f"at least {chosen}, the config's experts for a token",
            mend="remove a smaller share",
        )
    if any((getattr(config, name, None) or 1) > 1 for name in _GROUPS):
        raise StageError(
            f"The router of a {config.model_type!r} model chooses among groups of experts, which would differ in size.",
            where="prune.experts",
            mend="leave experts out",
        )


@dataclass
class _Scores:
    """Sums over calibration text of what each part of one block gave."""

    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    sent: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, inputs: torch.Tensor, count: int) -> None:
        """Of features [windows, length, width] in ``count`` parts (Muralidharan et al. 2024, section 2.2).

        The norm of a part at each token, its mean over a window's tokens, the sum of squares of that over windows.
        """
        windows = inputs.float().reshape(-1, inputs.shape[-2], count, inputs.shape[-1] // count)
        norms = torch.linalg.vector_norm(windows, dim=-1)
        self.parts[name] = self.parts.get(name, norms.new_zeros(count)) + norms.mean(dim=-2).square().sum(dim=0)


@dataclass
class _Work:
    skeleton: Skeleton
    sizes: Sizes
    stream: Stream | None
    context: Context

    @cached_property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Of the tensors of the cut model."""
        hollow = hollow_decoder(self.skeleton.checkpoint.folder)
        self.sizes.cut(hollow)
        with torch.device("meta"):
            return stored_shapes(type(hollow)(hollow.config))

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the cut checkpoint, those of the blocks first."""
        inside = f"{self.skeleton.prefix}."
        described = blocks(self.skeleton.model) if self.sizes.places or self.sizes.neurons else []
        rest = range(len(self.skeleton.blocks))
        for index in self.context.progress.track(rest, "prune: blocks", len(rest)):
            with within_memory(f"prune: {inside}{index}", "samples or sequence_length"):
                self.skeleton.load(index)
                scores = self._scores(index, described[index] if described else None)
            yield from self._cut(index, described[index] if described else None, scores)
            self.skeleton.unload(index)
        for name in self.skeleton.checkpoint.files:
            if not name.startswith(inside):
                yield name, self.skeleton.checkpoint.stored(name)

    def _scores(self, index: int, block: Block | None) -> _Scores:
        """Summed up while all windows pass the block as it is."""
        scores = _Scores()
        if self.stream is None:
            return scores
        read: dict[str, tuple[nn.Module, int]] = {}
        if block is not None and self.sizes.places:
            read["places"] = block.attended().output, block.places
        if block is not None and self.sizes.neurons:
            read["neurons"] = block.fed_forward().output, block.neurons
        work = self.stream.pass_through(index, {})
        with ExitStack() as watched:
            layers = {name: layer for name, (layer, _) in read.items()}
            watched.enter_context(given(layers, lambda name, inputs: scores.add(name, inputs, read[name][1])))
            watched.enter_context(
                hooked(
                    part.register_forward_pre_hook(_counting(scores, name, part), with_kwargs=True)
                    for name, part in self._experts(index).items()
                )
            )
            self.stream.leave(index, (work.run(batch()) for batch in work.batches))
        self.stream.forget(index)
        return scores

    def _experts(self, index: int) -> dict[str, SeparateExperts]:
        """The mixtures of a block whose experts are to be fewer."""
        if not self.sizes.experts:
            return {}
        name = f"{self.skeleton.prefix}.{index}"
        found = experts_of(self.skeleton.blocks[index], name)
        fused = [path for path, part in self.skeleton.blocks[index].named_modules(prefix=name) if is_fused(part)]
        if fused:
            raise StageError(
                f"The experts of {fused[0]} cannot be told apart: the checkpoint keeps them in one tensor.",
                where="prune.experts",
                mend="leave experts out",
            )
        return found

    def _cut(self, index: int, block: Block | None, scores: _Scores) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a loaded block, which is cut in place but for its experts."""
        if block is not None and self.sizes.places:
            places = self._kept(scores.parts.get("places", torch.zeros(block.places)), self.sizes.places)
            keep_places(block.attended(), places.tolist())
        if block is not None and self.sizes.neurons:
            feed_forward = block.fed_forward()
            neurons = self._kept(scores.parts.get("neurons", torch.zeros(block.neurons)), self.sizes.neurons)
            for layer in feed_forward.inputs:
                keep_rows(layer, feed_forward.rows(layer, neurons))
            keep_columns(feed_forward.output, neurons)
        numbers: dict[str, str | None] = {}
        experts = None
        for owner, part in self._experts(index).items():
            experts = self._kept(scores.sent.get(owner, torch.zeros(part.count)), self.sizes.experts or 0)
            numbers |= dict.fromkeys(f"{owner}.{number}" for number in range(part.count))
            numbers |= {f"{owner}.{old}": f"{owner}.{new}" for new, old in enumerate(experts.tolist())}
        yield from self._stored(index, numbers, experts)

    def _kept(self, scores: torch.Tensor, count: int) -> torch.Tensor:
        if not bool(torch.isfinite(scores).all()):
            raise StageError(
                "What passes through a block on the calibration text is not finite.",
                expected="a model that computes finite numbers there",
                mend="set precision: fp32",
            )
        return most_important(scores.cpu(), count)

    def _stored(
        self, index: int, numbers: Mapping[str, str | None], experts: torch.Tensor | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The block's tensors in the files' dtype and orientation, experts by their new ``numbers``."""
        checkpoint, name = self.skeleton.checkpoint, f"{self.skeleton.prefix}.{index}"
        parameters = dict(self.skeleton.blocks[index].named_parameters(prefix=name))
        for path in (path for path in checkpoint.files if path.startswith(f"{name}.")):
            owner = next((owner for owner in numbers if path.startswith(f"{owner}.")), None)
            if owner is not None:
                new = numbers[owner]
                if new is not None:
                    yield path.replace(owner, new, 1), checkpoint.stored(path)
                continue
            stored = checkpoint.stored(path)
            if path in parameters:
                turned = path.removesuffix(".weight") in self.skeleton.transposed
                cut = parameters[path].data
                stored = (cut.T if turned else cut).to(stored)
            yield path, self._routed(path, stored, experts)

    def _routed(self, path: str, tensor: torch.Tensor, experts: torch.Tensor | None) -> torch.Tensor:
        """A tensor of a block with its entries for the ``experts`` that stay, where it has one for each of them."""
        wanted = self.shapes.get(path)
        if experts is None or wanted is None:
            return tensor
        sizes = zip(tensor.shape, wanted, strict=True)
        axis = next((axis for axis, size in enumerate(sizes) if size == (self.sizes.found[2], len(experts))), None)
        return tensor if axis is None else tensor.index_select(axis, experts)


def _counting(scores: _Scores, name: str, part: SeparateExperts) -> Callable[..., None]:
    def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        chosen = named["top_k_index"] if "top_k_index" in named else arguments[1]
        scores.sent[name] = scores.sent.get(name, torch.zeros(part.count)) + part.routed(chosen).cpu()

    return before
