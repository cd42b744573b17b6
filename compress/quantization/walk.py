"""From block to block: load one, quantize it on what the quantized blocks before it give, keep it, let it go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from compress.environment import has_bf16
from compress.progress import Progress
from compress.quantization.block_pass import BlockPass, gram
from compress.quantization.config import Quantization
from compress.quantization.finished import Finished
from compress.quantization.layers import Layer, linears
from compress.quantization.skeleton import Call, Skeleton
from compress.quantization.solver import solve_layer
from compress.quantization.states import States, open_states, write_states

ACTIVATION_BYTES = 1 << 30
"""How much of a block's activations may be in memory; the calibration text is cut into batches that keep to it."""
_WIDE_TENSORS = 4
"""Tensors as wide as a block's widest layer that are alive at once: gate, its activation, up, and their product."""


@dataclass(frozen=True)
class Walk:
    """Over the blocks of ``skeleton``, of which ``plan`` says the layers, with token ids [windows, length]."""

    skeleton: Skeleton
    config: Quantization
    plan: Sequence[Sequence[Layer]]
    ids: torch.Tensor | None
    scratch: Path
    progress: Progress

    @property
    def finished(self) -> Finished:
        """The blocks that are done."""
        return Finished(self.scratch)

    @torch.no_grad()
    def run(self) -> Finished:
        """Quantize every block that is not done yet. Raises `StageError`."""
        first = self._first()
        if first:
            self.progress.note(f"quantize: {first} of {len(self.plan)} blocks were done before")
        states = self._states(first)
        rest = range(first, len(self.plan))
        for index in self.progress.track(rest, "quantizing blocks", len(rest)):
            states = self._block(index, states)
        return self.finished

    def _first(self) -> int:
        """The first block to do: the one after those done whose inputs are here."""
        done = self.finished.count(len(self.plan))
        if self.ids is None or done == 0 or States.is_whole(self._path(done), self._shape):
            return done
        return 0

    @torch.no_grad()
    def head_hessian(self) -> torch.Tensor:
        """The Hessian of the head's inputs, [hidden, hidden], once every block is done."""
        states = open_states(self._path(len(self.plan)), self._shape)
        count, _, width = self._shape
        total = torch.zeros(width, width)
        for at in range(count):
            total.add_(gram(self.skeleton.normed(states[at : at + 1])), alpha=1 / count)
        return total

    @property
    def _shape(self) -> tuple[int, int, int]:
        assert self.ids is not None
        width = self.skeleton.model.config.get_text_config().hidden_size
        return (*self.ids.shape, width)

    def _path(self, index: int) -> Path:
        return self.scratch / f"states-{index:05}.bin"

    def _states(self, first: int) -> States | None:
        if self.ids is None:
            return None
        if first:
            return open_states(self._path(first), self._shape)
        batches = (self.skeleton.embedded(rows) for rows in torch.split(self.ids, 1))
        return write_states(self._path(0), self._shape, batches)

    def _block(self, index: int, states: States | None) -> States | None:
        block = self.skeleton.load(index)
        name = f"{self.skeleton.prefix}.{index}"
        layers = {layer.name: layer for layer in self.plan[index]}
        modules = {name: part for name, part in linears(block, name).items() if layers[name].bits}
        tensors: dict[str, torch.Tensor] = {}

        def quantize(name: str, hessian: torch.Tensor | None) -> None:
            with torch.autocast("cpu", enabled=False):
                solved = solve_layer(self.config, layers[name], modules[name].weight, hessian)
            layers[name] = solved.layer
            tensors.update(solved.packed(stored_less_one=self.config.sym))
            modules[name].weight = nn.Parameter(solved.weight.dequantize(), requires_grad=False)

        after = None
        if states is None:
            for layer in modules:
                quantize(layer, None)
        else:
            work = self._pass(index, modules, states)
            with torch.autocast("cpu", torch.bfloat16, enabled=uses_bf16(self.config)):
                after = write_states(self._path(index + 1), self._shape, work.solve(quantize))
        self.skeleton.unload(index)
        self.finished.store(index, tensors, list(layers.values()))
        self._path(index).unlink(missing_ok=True)
        self.progress.note(_line(name, list(layers.values())))
        return after

    def _pass(self, index: int, modules: dict[str, nn.Linear], states: States) -> BlockPass:
        assert self.ids is not None
        size = batch_size(self.skeleton.blocks[index], self.ids)

        # Found before any layer is watched, since finding them may run a block.
        calls = {count: self._call(index, count) for count in {1, size, len(self.ids) % size} - {0}}

        def run(hidden: torch.Tensor) -> torch.Tensor:
            return self.skeleton.run(index, hidden, calls[len(hidden)])

        batches = [partial(states.__getitem__, slice(at, at + size)) for at in range(0, len(self.ids), size)]
        return BlockPass(f"{self.skeleton.prefix}.{index}", modules, run, batches)

    def _call(self, index: int, windows: int) -> Call:
        assert self.ids is not None
        return self.skeleton.calls(self.ids[:windows])[index]


def uses_bf16(config: Quantization) -> bool:
    """Whether matrix products run in bfloat16: asked for, or `auto` on a processor with bf16 arithmetic."""
    return config.precision == "bf16" or (config.precision == "auto" and has_bf16())


def batch_size(block: nn.Module, ids: torch.Tensor) -> int:
    """Windows at a time, so that a block's activations keep to `ACTIVATION_BYTES`."""
    widest = max(max(part.in_features, part.out_features) for part in linears(block, "").values())
    window = 4 * _WIDE_TENSORS * ids.shape[1] * widest
    return int(min(max(ACTIVATION_BYTES // window, 1), len(ids)))


def _line(name: str, layers: Sequence[Layer]) -> str:
    found = []
    for layer in layers:
        short = layer.name.removeprefix(f"{name}.")
        if layer.bits is None:
            found.append(f"{short} left alone ({layer.why})")
        else:
            found.append(f"{short} {layer.bits} bits {layer.error:.2%}")
    return f"{name}: {', '.join(found)}"
