"""One block over the calibration text: the Hessian of each linear layer's input, and the block's new outputs.

Layers are quantized in the order in which the block calls them, each on inputs that have passed the quantized layers
before it ("true sequential"). Layers that are given the same tensor (query, key and value; gate and up) share one
Hessian. Where all windows fit into memory at once, one forward pass does everything: a layer is quantized in the moment
in which it is called. Otherwise there is a pass for each group of layers, which ends where that group begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from compress.errors import StageError

_PANEL = 192
"""Columns of a Hessian that are multiplied out together: narrow enough to spare most of the other triangle."""

Run = Callable[[torch.Tensor], torch.Tensor]
"""The forward pass of a block."""
Quantize = Callable[[str, torch.Tensor], None]
"""Given a layer's name and the Hessian of its input, replace its weight."""


class _Seen(Exception):  # noqa: N818 - it ends a forward pass early and is no error
    """The inputs of the layers asked for have been seen."""


@dataclass(frozen=True)
class BlockPass:
    """A loaded block with its ``linears`` by name, and the hidden states that enter it, in batches."""

    name: str
    linears: Mapping[str, nn.Linear]
    run: Run
    batches: Sequence[Callable[[], torch.Tensor]]

    def solve(self, quantize: Quantize) -> Iterator[torch.Tensor]:
        """Quantize every layer; then, or meanwhile, yield the outputs of each batch.

        Raises `StageError` for inputs that are not finite and for layers that the block never calls.
        """
        if len(self.batches) == 1:
            yield self._solve_at_once(self.batches[0](), quantize)
            return
        for group in self._groups():
            hessian = self._hessian(group)
            for name in group:
                quantize(name, hessian)
            del hessian
        for batch in self.batches:
            yield self.run(batch())

    def _solve_at_once(self, hidden: torch.Tensor, quantize: Quantize) -> torch.Tensor:
        done: list[str] = []
        last: list[torch.Tensor] = []
        hessian: list[torch.Tensor] = []

        def before(name: str, inputs: torch.Tensor) -> None:
            if not last or inputs is not last[0]:
                last[:], hessian[:] = [inputs], []
                hessian[:] = [self._finite([name], gram(inputs))]
            quantize(name, hessian[0])
            done.append(name)

        with self._watched(before):
            output = self.run(hidden)
        self._all_called(done)
        return output

    def _groups(self) -> list[list[str]]:
        """The layers in the order of their calls, those with the same input together."""
        groups: list[list[str]] = []
        last: list[torch.Tensor] = []

        def before(name: str, inputs: torch.Tensor) -> None:
            if last and inputs is last[0]:
                groups[-1].append(name)
            else:
                groups.append([name])
            last[:] = [inputs]

        with self._watched(before):
            self.run(self.batches[0]()[:1])
        self._all_called([name for group in groups for name in group])
        return groups

    def _hessian(self, group: list[str]) -> torch.Tensor:
        columns = self.linears[group[0]].in_features
        total = torch.zeros(columns, columns)
        tokens = 0

        def before(name: str, inputs: torch.Tensor) -> None:
            nonlocal tokens
            if name == group[0]:
                count = inputs[..., 0].numel()
                # A running mean: totals over long texts would lose their last digits in float32.
                total.mul_(tokens / (tokens + count)).add_(gram(inputs), alpha=count / (tokens + count))
                tokens += count
                raise _Seen

        for batch in self.batches:
            with self._watched(before):
                try:
                    self.run(batch())
                except _Seen:
                    continue
        return self._finite(group, total)

    @contextmanager
    def _watched(self, before: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
        """Call ``before`` with a layer's name and inputs whenever one is about to be applied."""

        def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            return lambda module, arguments: before(name, arguments[0])

        handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in self.linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _finite(self, group: Sequence[str], hessian: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(hessian.diagonal()).all()):
            raise StageError(
                f"The inputs of {group[0]} in {self.name} hold NaN or infinite values on the calibration text.",
                expected="finite activations",
                mend="set precision: fp32; if it stays, the model itself overflows on this text",
            )
        return hessian

    def _all_called(self, called: Sequence[str]) -> None:
        twice = sorted({name for name in called if called.count(name) > 1})
        never = [name for name in self.linears if name not in called]
        if twice or never:
            what = f"is called several times: {', '.join(twice)}" if twice else f"is never called: {', '.join(never)}"
            raise StageError(
                f"A layer of {self.name} {what}.",
                expected="layers that are each applied once to every token",
                mend="name it in `keep`",
            )


@torch.no_grad()
def gram(inputs: torch.Tensor) -> torch.Tensor:
    """X^T X / n of inputs [..., columns] as [n, columns], in float32; only one triangle is multiplied out."""
    with torch.autocast("cpu", enabled=False):
        tokens = inputs.reshape(-1, inputs.shape[-1]).float()
        columns = tokens.shape[1]
        product = torch.empty(columns, columns)
        for start in range(0, columns, _PANEL):
            stop = min(start + _PANEL, columns)
            torch.mm(tokens[:, start:].T, tokens[:, start:stop], out=product[start:, start:stop])
            product[start:stop, stop:] = product[stop:, start:stop].T
        return product.div_(len(tokens))
