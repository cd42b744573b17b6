"""How much each layer's rounding hurts the answers: measured on text, end to end, one layer at a time.

For each layer a variant of the model in which that layer alone is coarse goes along from block to block, beside the
model as it is; at the end the Kullback-Leibler divergence of its answers is the layer's price. At other bits the
price is taken to change as the squared error of the layer's own outputs does, which is measured at each of them.
Only hidden states of a few tokens are kept for each variant, so memory grows with the number of layers and no faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from compress.errors import StageError
from compress.numerics.gptq import output_error, round_to_nearest
from compress.progress import Progress
from compress.quantization.block_pass import BlockPass
from compress.quantization.config import Quantization
from compress.quantization.layers import Layer, linears
from compress.quantization.skeleton import Skeleton
from compress.quantization.solver import settings_for
from compress.quantization.stream import Stream

TABLES = "tables"
"""The embedding and the head together, among `Sensitivity.losses`."""
PROBE_BITS = 3
"""At which a layer is coarse while its price is measured: coarse enough to stand out from float32's own rounding."""
STATES_BYTES = 1 << 28
"""Of all variants' hidden states; the probe text is cut to keep to it."""
_LONGEST = 128
_AT_ONCE = 16
"""Variants that pass a block together."""
_JUDGED = 32
"""Positions of each variant whose answers are compared, evenly spread."""


Heads = Callable[[torch.Tensor], Mapping[int, torch.Tensor]]
"""Given the Hessian of the head's inputs, what the head would be at some bits, [vocabulary, hidden]."""


@dataclass(frozen=True)
class Sensitivity:
    """``losses[name][bits]``: the divergence that a layer at so many bits is expected to add, in nats a token."""

    losses: Mapping[str, Mapping[int, float]]


@dataclass
class Survey:
    """A pass over the float model with one variant for each layer of ``plan``; ``folder`` is for states at work."""

    skeleton: Skeleton
    config: Quantization
    plan: Sequence[Sequence[Layer]]
    choices: Sequence[int]
    progress: Progress
    folder: Path

    @torch.no_grad()
    def run(self, ids: torch.Tensor, embeddings: Mapping[int, torch.Tensor], heads: Heads) -> Sensitivity:
        """Measure on token ids [windows, length]. ``embeddings``: the table at some bits, [vocabulary, hidden].

        Raises `StageError` where the model's answers are not finite.
        """
        names = [layer.name for block in self.plan for layer in block if layer.bits]
        probe = self._probe(ids, len(names) + len(embeddings) + 1)
        # Found before any layer is watched, since finding them may run a block.
        self.skeleton.calls(probe)
        states = torch.cat([self._embedded(probe, table) for table in (None, *embeddings.values())])
        errors: dict[str, dict[int, float]] = {}
        text = Stream(self.skeleton, self.config, ids, self.folder) if embeddings else None
        rest = range(len(self.plan))
        for index in self.progress.track(rest, "measuring sensitivity", len(rest)):
            self.skeleton.load(index)
            states = self._block(index, probe, states, errors)
            if text is not None:
                text.advance(index)
            self.skeleton.unload(index)
        divergences = self._divergences(states, list(heads(text.head_hessian()).values()) if text else [])
        losses = {}
        for name, divergence in zip(names, divergences[len(embeddings) :], strict=True):
            unit = divergence / max(errors[name][PROBE_BITS], 1e-30)
            losses[name] = {bits: unit * errors[name][bits] for bits in self.choices}
        if embeddings:
            losses[TABLES] = dict(zip(embeddings, divergences, strict=False)) | {16: 0.0}
        return Sensitivity(losses)

    def _probe(self, ids: torch.Tensor, variants: int) -> torch.Tensor:
        """The first tokens of one window, [1, length]."""
        width = self.skeleton.model.config.get_text_config().hidden_size
        length = min(ids.shape[1], _LONGEST, max(STATES_BYTES // (4 * width * variants), 8))
        return ids[:1, :length]

    def _embedded(self, probe: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
        before = self.skeleton.table
        self.skeleton.table = table
        try:
            return self.skeleton.embedded(probe)
        finally:
            self.skeleton.table = before

    def _block(
        self, index: int, probe: torch.Tensor, states: torch.Tensor, errors: dict[str, dict[int, float]]
    ) -> torch.Tensor:
        """All variants' states [variants, length, hidden] after a block, those of its own layers at the end."""
        prefix = f"{self.skeleton.prefix}.{index}"
        found = linears(self.skeleton.blocks[index], prefix)
        groups = {layer.name: layer.group_size for layer in self.plan[index] if layer.bits}
        modules = {name: part for name, part in found.items() if name in groups}
        coarse: dict[str, torch.Tensor] = {}

        def run(hidden: torch.Tensor) -> torch.Tensor:
            return self.skeleton.run(index, hidden, self.skeleton.calls(probe.expand(len(hidden), -1))[index])

        def measure(name: str, hessian: torch.Tensor) -> None:
            weight = modules[name].weight
            errors[name] = {}
            for bits in sorted({*self.choices, PROBE_BITS}):
                settings = settings_for(self.config, bits, groups[name] or weight.shape[1])
                rounded = round_to_nearest(weight, settings, hessian.diagonal()).dequantize()
                errors[name][bits] = output_error(weight, rounded, hessian)
                if bits == PROBE_BITS:
                    coarse[name] = rounded

        first = states[:1]
        after = list(BlockPass(prefix, modules, run, [lambda: first]).solve(measure))
        after += [run(some) for some in torch.split(states[1:], _AT_ONCE)]
        # In the order of the plan, which need not be that of the calls.
        after += [_with_weight(modules[name], coarse[name], lambda: run(first)) for name in groups]
        return torch.cat(after)

    def _divergences(self, states: torch.Tensor, heads: Sequence[torch.Tensor]) -> list[float]:
        """KL(model as it is || variant) of each variant, in nats a token, over `_JUDGED` positions."""
        places = torch.linspace(0, states.shape[1] - 1, min(_JUDGED, states.shape[1])).round().long()
        judged = states[:, places]
        original = self._answers(judged[:1])
        found = []
        for variant, hidden in enumerate(judged[1:]):
            answers = self._answers(hidden[None], heads[variant] if variant < len(heads) else None)
            divergence = torch.nn.functional.kl_div(answers, original, reduction="sum", log_target=True)
            found.append(float(divergence) / len(places))
        if not all(map(math.isfinite, found)):
            raise StageError("The model's answers to the calibration text are not finite.", expected="finite logits")
        # Rounding can leave a variant that changes nothing a hair below zero.
        return [max(value, 0.0) for value in found]

    def _answers(self, hidden: torch.Tensor, head: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probabilities [1, positions, vocabulary]."""
        return torch.log_softmax(self.skeleton.logits(hidden, head), dim=-1)


def _with_weight(linear: nn.Linear, weight: torch.Tensor, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    before = linear.weight
    linear.weight = nn.Parameter(weight, requires_grad=False)
    output = run()
    linear.weight = before
    return output
