"""Rotating a checkpoint block by block: the same function in other coordinates, which few bits may hold better.

QuaRot's R1 and R2 (Ashkboos et al. 2024, section 4). What reads and what writes the hidden states is found as for
`compress.stages.equalize.equalization`, by watching a block and by sizes, and proven on the block itself: rotated, it has to
give the rotated output for the rotated input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.models.checkpoint import Checkpoint
from compress.models.folder_checks import refuse_quantized
from compress.models.structure import Attention, blocks
from compress.numerics.rotation import rotation
from compress.stages.blockwise.blockwise_model import Skeleton
from compress.stages.blockwise.build import build_skeleton, logits
from compress.stages.blockwise.write import write_floats
from compress.stages.equalize.equalization import TOKENS, find_folds, probe
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from compress.stages.base import Context

_TOLERANCE = 1e-4
"""Of a block's outputs and of the logits, relative to their size."""
_HALF_BYTES = 2


def rotate_checkpoint(
    checkpoint: Checkpoint, hidden: bool, heads: bool, hadamard: bool, context: Context
) -> Checkpoint:
    """The rotated checkpoint, in the context's scratch folder; what was changed is stored in float32.

    Raises `StageError` for a model whose function would change, with the reason, and `ModelError`.
    """
    refuse_quantized(checkpoint.folder)
    skeleton = build_skeleton(checkpoint)
    generator = torch.Generator().manual_seed(context.seed)
    turn = rotation(skeleton.hidden_size, hadamard, generator) if hidden else None
    work = _Work(skeleton, turn, heads, hadamard, generator, context)
    config = {"tie_word_embeddings": False} if hidden and skeleton.tied else {}
    made = write_floats(checkpoint, context.scratch / "rotated", work.tensors(), **config)
    ids = torch.arange(TOKENS)[None] % skeleton.vocabulary
    _prove(logits(made, ids), logits(checkpoint, ids), f"The logits of {type(skeleton.model).__name__}")
    if config:
        added = skeleton.vocabulary * skeleton.hidden_size
        context.note(
            f"rotate: the head has weights of its own now, {added:,} more, {_HALF_BYTES * added:,} bytes in float16"
        )
    return made


@dataclass
class _Work:
    skeleton: Skeleton
    turn: torch.Tensor | None
    heads: bool
    hadamard: bool
    generator: torch.Generator
    context: Context
    around_one: bool = False
    """Whether norms multiply by 1 + weight."""
    norms: set[str] = field(default_factory=set)

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that changes."""
        found = blocks(self.skeleton.model) if self.heads else []
        count = len(self.skeleton.blocks)
        for index in self.context.progress.track(range(count), "rotating blocks", count):
            yield from self._block(index, found[index].attention if found else None)
        if self.turn is not None:
            yield from self._surroundings(self.turn)

    def _block(self, index: int, attention: Attention | None) -> Iterator[tuple[str, torch.Tensor]]:
        block, prefix = self.skeleton.load(index), f"{self.skeleton.prefix}.{index}"
        modules = {name: part for name, part in block.named_modules() if name}
        names = {part: name for name, part in modules.items()}
        hidden, run = probe(self.skeleton, index)
        before, changed = run(hidden), set[str]()
        if self.heads:
            changed |= {names[part] for part in self._turn_heads(prefix, attention)}
            _prove(run(hidden), before, f"With rotated heads {prefix}")
        if self.turn is not None:
            changed |= self._turn_hidden(modules, lambda: run(hidden))
            norms = ", ".join(sorted({type(part).__name__ for part in _others(modules.values())}))
            why = f"With rotated hidden states {prefix} ({norms})"
            _prove(run(_times(hidden, self.turn)), _times(before, self.turn), why)
        for name in sorted(changed):
            yield from self.skeleton.as_stored(f"{prefix}.{name}", modules[name])
        self.skeleton.unload(index)

    def _turn_heads(self, name: str, attention: Attention | None) -> tuple[nn.Module, nn.Module]:
        """Rotate values as they are made, and back as they are read, in place; returns both layers."""
        if attention is None:
            raise StageError(
                f"The heads of {name} cannot be rotated: its attention was not found.",
                expected="projections of queries, keys and values, and one back",
                hint="set heads: false",
            )
        size, value, output = attention.head_size, attention.value, attention.output
        turn = rotation(size, self.hadamard, self.generator)
        for rows in attention.rows["value"]:
            value.weight.data[rows] = _times(value.weight.data[rows].T, turn).T
            if value.bias is not None:
                value.bias.data[rows] = _times(value.bias.data[rows], turn)
        output.weight.data = _times(output.weight.data.unflatten(1, (-1, size)), turn).flatten(1)
        return value, output

    def _turn_hidden(self, modules: Mapping[str, nn.Module], output: Callable[[], torch.Tensor]) -> set[str]:
        """Fold the weights of norms into the layers behind them, and rotate what these read and others write."""
        assert self.turn is not None
        width = self.skeleton.hidden_size
        folds, _ = find_folds(modules, output, width)
        folds = [fold for fold in folds if not isinstance(modules[fold.source], nn.Linear)]
        read = {name for fold in folds for name in fold.consumers}
        for fold in folds:
            self.around_one = fold.around_one
            self.norms.add(type(modules[fold.source]).__name__)
            norm = modules[fold.source].get_parameter("weight")
            fold.scale(modules, norm.data + float(fold.around_one))
            norm.data.fill_(float(not fold.around_one))
        linears = {name: part for name, part in modules.items() if isinstance(part, nn.Linear)}
        for name in read:
            linears[name].weight.data = _times(linears[name].weight.data, self.turn)
        written = {name for name, part in linears.items() if name not in read and part.out_features == width}
        for name in written:
            part = linears[name]
            part.weight.data = _times(part.weight.data.T, self.turn).T.contiguous()
            if part.bias is not None:
                part.bias.data = _times(part.bias.data, self.turn)
        return {*read, *written, *(fold.source for fold in folds)}

    def _surroundings(self, turn: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The embedding table, the last norm, and the head with that norm's weights in it."""
        skeleton = self.skeleton
        embedding, head = skeleton.name(skeleton.embedding), skeleton.name(skeleton.model.get_output_embeddings())
        inside = {*(part for block in skeleton.blocks for part in block.modules()), skeleton.embedding}
        outside = {skeleton.name(part): part for part in _others(skeleton.model.modules()) if part not in inside}
        names = [f"{name}.{leaf}" for name, part in outside.items() for leaf, _ in part.named_parameters(recurse=False)]
        if len(names) != 1 or {type(part).__name__ for part in outside.values()} - self.norms:
            raise StageError(
                f"The hidden states of {type(skeleton.model).__name__} cannot be rotated.",
                expected=f"one norm after the blocks, as within them, and no other weights; found {', '.join(names)}",
                hint="set hidden: false",
            )
        (norm,) = outside.values()
        weight = norm.get_parameter("weight").data
        rows = skeleton.checkpoint.stored(skeleton.head_weight).float() * (weight + float(self.around_one))
        yield f"{head}.weight", _times(rows, turn)
        del rows
        yield f"{embedding}.weight", _times(skeleton.checkpoint.stored(f"{embedding}.weight").float(), turn)
        yield names[0], torch.full_like(weight, float(not self.around_one))


def _others(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those with weights that are no linear layer: norms, as a rule."""
    return [
        part
        for part in modules
        if not isinstance(part, nn.Linear) and any(True for _ in part.parameters(recurse=False))
    ]


def _times(values: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """``values`` [..., n] times ``turn`` [n, n], summed in float64."""
    return (values.double() @ turn).float()


def _prove(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    difference = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    if not difference < _TOLERANCE:
        raise StageError(
            f"{what} would not compute the same function: its outputs differ by {difference:.2%}.",
            expected="norms that divide by the root mean square alone, whose outputs go into linear layers, and layers "
            "that write into the hidden states with nothing behind them",
            hint="set hidden: false, heads: false, or leave the stage out for such a model",
        )
