"""From block to block: load one, quantize it on what the quantized blocks before it give, keep it, let it go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compress.progress import Progress
from compress.quantization.config import Quantization
from compress.quantization.finished import Finished
from compress.quantization.layers import Layer, linears
from compress.quantization.skeleton import Skeleton
from compress.quantization.solver import solve_layers
from compress.quantization.stream import Stream


@dataclass(frozen=True)
class Walk:
    """Over the blocks of ``skeleton``, of which ``plan`` says the layers.

    ``text`` is what the layers are solved on; without it all of them are rounded to nearest.
    """

    skeleton: Skeleton
    config: Quantization
    plan: Sequence[Sequence[Layer]]
    text: Stream | None
    finished: Finished
    progress: Progress

    @torch.no_grad()
    def run(self) -> None:
        """Quantize every block that is not done yet. Raises `StageError`."""
        first = self._first()
        if first:
            self.progress.note(f"quantize: {first} of {len(self.plan)} blocks were done before")
        rest = range(first, len(self.plan))
        for index in self.progress.track(rest, "quantizing blocks", len(rest)):
            self._block(index)

    def _first(self) -> int:
        """The first block to do: the one after those done, if the states that enter it are here."""
        done = self.finished.count(len(self.plan))
        return done if self.text is None or done == 0 or self.text.is_at(done) else 0

    def _block(self, index: int) -> None:
        block = self.skeleton.load(index)
        name = f"{self.skeleton.prefix}.{index}"
        layers = {layer.name: layer for layer in self.plan[index]}
        modules = {name: part for name, part in linears(block, name).items() if layers[name].bits}
        tensors: dict[str, torch.Tensor] = {}
        work = None if self.text is None else self.text.pass_through(index, modules)

        def quantize(names: Sequence[str], hessian: torch.Tensor | None) -> None:
            given, weights = [layers[name] for name in names], [modules[name].weight for name in names]
            with torch.autocast("cpu", enabled=False):
                found = solve_layers(self.config, given, weights, hessian)
            for name, solved in zip(names, found, strict=True):
                sent = None if work is None else work.sent(name)
                layers[name] = solved.layer if sent is None else solved.layer.sent(sent, self.config.expert_tokens)
                tensors.update(solved.packed(stored_less_one=self.config.sym))
                modules[name].weight = nn.Parameter(solved.weight.dequantize(), requires_grad=False)

        if self.text is None or work is None:
            for layer in modules:
                quantize([layer], None)
        else:
            self.text.leave(index, work.solve(quantize))
        self.skeleton.unload(index)
        self.finished.store(index, tensors, list(layers.values()))
        if self.text is not None:
            self.text.forget(index)
        self.progress.note(_line(name, list(layers.values())))


def _line(name: str, layers: Sequence[Layer]) -> str:
    found = []
    for layer in layers:
        short = layer.name.removeprefix(f"{name}.")
        if layer.bits is None:
            found.append(f"{short} left alone ({layer.why})")
        else:
            found.append(f"{short} {layer.bits} bits {layer.error:.2%}")
    return f"{name}: {', '.join(found)}"
