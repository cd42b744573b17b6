"""One pass of the calibration text through a block: Hessians of layer inputs, and the block's new outputs.

Layers are quantized in the order in which the block calls them, each on inputs that have passed the quantized
layers before it ("true sequential"). Layers with the same input tensor (query, key and value; gate and up) share
one Hessian and are quantized together, unless tokens have different weights for them
(`compress.stages.gptq.token_weighting`). If all sequences fit into memory at once, one forward pass is enough:
layers are quantized when the first of them is called. Otherwise each group of layers needs a pass of its own, which
stops where the group begins.

Experts see the tokens that the router sends them, and experts with too few tokens also some of all the layer's
tokens (`ExpertCalibration`). Experts do not depend on each other, so one pass serves many of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from compress.models.experts import DOWN, ExpertCalibration, SeparateExperts, owning_experts
from compress.models.hooks import StopForward, capture_inputs, removed_on_exit
from compress.utils.errors import StageError
from compress.utils.torch_device import autocast

_PANEL = 192
"""Columns of a Hessian that are multiplied at a time: narrow enough to skip most of the other triangle."""

HESSIAN_BYTES = 1 << 30
"""Bytes of the Hessians that one pass over the text collects."""

Run = Callable[[torch.Tensor], torch.Tensor]
"""The forward pass of a block."""
Quantize = Callable[[Sequence[str], torch.Tensor], None]
"""Function that replaces the weights of layers, from their names and the Hessian of their common input."""


@dataclass(frozen=True)
class _Group:
    """Layers that share a Hessian.

    ``experts`` is the mixture that they belong to, or empty. Layers of equal ``rank`` do not depend on each other.
    """

    names: list[str]
    experts: str = ""
    rank: int = 0


@dataclass(frozen=True)
class BlockPass:
    """Forward passes of a loaded block over all calibration batches.

    Attributes:
        name: Full name of the block.
        linears: Linear layers to observe, by name.
        run: Forward pass of the block.
        batches: Functions that load the hidden states of a batch.
        experts: Mixtures of experts by name.
        expert_tokens: Minimum number of tokens for each expert.
        counts: Weight of each token [tokens of all batches] by layer; layers without an entry weight all tokens alike.
        bf16: Compute Hessians of inputs rounded to bfloat16, as the layers read them.
    """

    name: str
    linears: Mapping[str, nn.Linear]
    run: Run
    batches: Sequence[Callable[[], torch.Tensor]]
    experts: Mapping[str, SeparateExperts] = field(default_factory=dict)
    expert_tokens: int = 1
    counts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    bf16: bool = False

    def solve(self, quantize: Quantize) -> Iterator[torch.Tensor]:
        """Quantize every layer, and yield the outputs of each batch.

        Raises `StageError` for inputs that are not finite and for layers that the block never calls.
        """
        with self._rehearsing(1):
            groups = self._groups()
        if len(self.batches) == 1:
            firsts = {group.names[0]: group.names for group in groups}

            def on_input(name: str, inputs: torch.Tensor) -> None:
                if name in firsts:
                    hessian = gram(inputs, self._weights(name, slice(None)), self.bf16)
                    quantize(firsts[name], self._finite(firsts[name], hessian))

            with self._rehearsing(self.expert_tokens), capture_inputs(self.linears, on_input):
                output = self.run(self.batches[0]())
            yield output
            return
        with self._rehearsing(self.expert_tokens):
            for layer_groups in self._passes(groups):
                self._count(layer_groups[0].experts)
                for group, hessian in zip(layer_groups, self._hessians(layer_groups), strict=True):
                    quantize(group.names, hessian)
        for batch in self.batches:
            yield self.run(batch())

    def sent(self, name: str) -> int | None:
        """Return the number of tokens that the router sends to a layer's expert.

        Layers without experts have no such number.
        """
        owner, number, _ = self._seat(name)
        calibration = self.experts[owner].calibration if owner else None
        return None if calibration is None or calibration.sent is None else int(calibration.sent[number])

    def _groups(self) -> list[_Group]:
        """Return the layers in the order of their calls, grouped by input if they may share a Hessian."""
        groups: list[_Group] = []
        last: list[torch.Tensor] = []
        different = 0

        def on_input(name: str, inputs: torch.Tensor) -> None:
            nonlocal different
            is_same_input = bool(last) and inputs is last[0]
            different += not is_same_input
            if is_same_input and name not in self.counts:
                groups[-1].names.append(name)
            else:
                owner, _, rank = self._seat(name)
                groups.append(_Group([name], owner, rank if owner else different))
            last[:] = [inputs]

        with capture_inputs(self.linears, on_input):
            self.run(self.batches[0]()[:1])
        # Every layer must be called exactly once.
        counts = Counter(name for group in groups for name in group.names)
        twice = sorted(name for name, count in counts.items() if count > 1)
        never = [name for name in self.linears if name not in counts]
        if twice or never:
            problem = f"called several times: {', '.join(twice)}" if twice else f"never called: {', '.join(never)}"
            raise StageError(
                f"A layer of {self.name} is {problem}.",
                expected="layers that are each applied once to every token",
                hint="name it in `keep`",
            )
        return groups

    def _passes(self, groups: Sequence[_Group]) -> Iterator[list[_Group]]:
        """Yield groups whose Hessians one pass over the text collects: many experts, and layers of one input."""
        by_rank = attrgetter("rank")
        for _, expert_groups in groupby(groups, key=attrgetter("experts")):
            for _, same_rank in groupby(sorted(expert_groups, key=by_rank), key=by_rank):
                independent = list(same_rank)
                columns = self.linears[independent[0].names[0]].in_features
                # As many Hessians per pass as the memory limit allows.
                size = max(HESSIAN_BYTES // (4 * columns**2), 1)
                yield from (independent[start : start + size] for start in range(0, len(independent), size))

    def _hessians(self, groups: Sequence[_Group]) -> Iterator[torch.Tensor]:
        """Yield the Hessian of each group, which is freed when the next one is requested."""
        columns = {group.names[0]: self.linears[group.names[0]].in_features for group in groups}
        device = next(iter(self.linears.values())).weight.device
        totals = {name: torch.zeros(count, count, device=device) for name, count in columns.items()}
        weight_sums, tokens = dict.fromkeys(totals, 0.0), slice(0)

        def on_input(name: str, inputs: torch.Tensor) -> None:
            if name in totals:
                weights = self._weights(name, tokens)
                count = float(inputs[..., 0].numel() if weights is None else weights.sum())
                weight_sums[name] += count
                # A running mean: totals over long texts would lose their last digits in float32.
                share = count / weight_sums[name]
                totals[name].mul_(1 - share).add_(gram(inputs, weights, self.bf16), alpha=share)
            if name == groups[-1].names[0]:
                raise StopForward

        for batch in self.batches:
            hidden = batch()
            tokens = slice(tokens.stop, tokens.stop + hidden[..., 0].numel())
            with capture_inputs(self.linears, on_input), suppress(StopForward):
                self.run(hidden)
        for group in groups:
            yield self._finite(group.names, totals.pop(group.names[0]))

    def _count(self, owner: str) -> None:
        """Count the tokens that each expert of a mixture is sent, unless they were counted before."""
        if not owner:
            return
        experts = self.experts[owner]
        calibration = experts.calibration
        if calibration is None or calibration.sent is not None:
            return
        sent, tokens = torch.zeros(experts.count, dtype=torch.long), 0

        def on_call(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal tokens
            expert_ids = named["top_k_index"] if "top_k_index" in named else arguments[1]
            sent.add_(experts.routed(expert_ids).cpu())
            tokens += len(expert_ids)
            raise StopForward

        with removed_on_exit([experts.register_forward_pre_hook(on_call, with_kwargs=True)]):
            for batch in self.batches:
                with suppress(StopForward):
                    self.run(batch())
        calibration.sent, calibration.tokens = sent, tokens

    def _seat(self, name: str) -> tuple[str, int, int]:
        """Return the mixture of a layer, or an empty text, its expert, and its index within an expert."""
        owner = owning_experts(name, self.experts)
        if not owner:
            return "", 0, 0
        number, leaf = name.removeprefix(f"{owner}.").split(".")
        return owner, int(number), int(leaf == self.experts[owner].names[DOWN])

    def _weights(self, name: str, tokens: slice) -> torch.Tensor | None:
        """Return the weight of each row of a layer's input in the batch ``tokens``, or None if all count alike."""
        owner, _, _ = self._seat(name)
        if not owner:
            return self.counts[name][tokens].to(self.linears[name].weight.device) if name in self.counts else None
        calibration = self.experts[owner].calibration
        return None if calibration is None else calibration.weights

    @contextmanager
    def _rehearsing(self, minimum: int) -> Iterator[None]:
        for experts in self.experts.values():
            experts.calibration = ExpertCalibration(minimum)
        try:
            yield
        finally:
            for experts in self.experts.values():
                experts.calibration = None

    def _finite(self, group: Sequence[str], hessian: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(hessian.diagonal()).all()):
            raise StageError(
                f"The inputs of {group[0]} in {self.name} hold NaN or infinite values on the calibration text.",
                expected="finite activations",
                hint="set precision: fp32; if it stays, the model itself overflows on this text",
            )
        return hessian


@torch.no_grad()
def gram(inputs: torch.Tensor, weights: torch.Tensor | None = None, bf16: bool = False) -> torch.Tensor:
    """Return X^T X / n of inputs [..., columns] with n rows, in float32; only one triangle is computed.

    With ``weights`` [n] it is X^T diag(weights) X over their sum. With ``bf16`` the factors may be rounded to bfloat16,
    while products are still summed in float32.
    """
    precision = torch.get_float32_matmul_precision()
    with autocast(False, inputs.device.type), ExitStack() as restored:
        if bf16:
            # Let oneDNN round the factors of float32 products to bfloat16.
            torch.set_float32_matmul_precision("medium")
            restored.callback(torch.set_float32_matmul_precision, precision)
        tokens = inputs.reshape(-1, inputs.shape[-1]).float()
        if weights is not None:
            tokens = tokens * weights.sqrt()[:, None]
        columns = tokens.shape[1]
        product = torch.empty(columns, columns, device=tokens.device)
        for start in range(0, columns, _PANEL):
            stop = min(start + _PANEL, columns)
            torch.mm(tokens[:, start:].T, tokens[:, start:stop], out=product[start:, start:stop])
            # Mirror the panel into the other triangle.
            product[start:stop, stop:] = product[stop:, start:stop].T
        return product.div_(float(len(tokens) if weights is None else weights.sum()))
