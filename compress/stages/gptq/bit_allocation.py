"""Which layer gets how many bits: the least expected divergence that a budget of bits allows, found exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path

import torch
from torch import nn

from compress.models.experts import SeparateExperts, find_separate_experts, owning_experts
from compress.numerics.bit_allocation import Option, allocate_bits
from compress.numerics.gptq import output_energy, round_to_nearest
from compress.stages.blockwise.block_pass import BlockPass
from compress.stages.blockwise.blockwise_model import BlockwiseModel
from compress.stages.blockwise.calibration import CalibrationActivations, Importance
from compress.stages.blockwise.layers import Layer, linears
from compress.stages.gptq.settings import Quantization
from compress.stages.gptq.solver import settings_for
from compress.utils.errors import StageError
from compress.utils.progress import Progress

TABLES = "tables"
"""The embedding and the head together, among the names of `Sensitivity`."""
PROBE_BITS = 3
"""At which a layer is coarse while its price is measured: coarse enough to stand out from float32's own rounding."""
STATES_BYTES = 1 << 28
"""Of all variants' hidden states; the probe text is cut to keep to it."""
_LONGEST = 128
_AT_ONCE = 16
"""Variants that pass a block together."""
_LONGEST_ROUTED = 512
"""With experts, each of which sees a few of the tokens only."""
_JUDGED = 32
"""Positions of each variant whose answers are compared, evenly spread."""


Heads = Callable[[torch.Tensor], Mapping[int, torch.Tensor]]
"""Given the Hessian of the head's inputs, what the head would be at some bits, [vocabulary, hidden]."""
Sensitivity = Mapping[str, Mapping[int, float]]
"""``[name][bits]``: the divergence that a layer at so many bits is expected to add, in nats a token."""


@dataclass
class Survey:
    """A pass over the float model with a variant for each layer of ``plan``, or for one matrix of all experts.

    ``folder`` is for states at work.
    """

    decoder: BlockwiseModel
    config: Quantization
    plan: Sequence[Sequence[Layer]]
    choices: Sequence[int]
    progress: Progress
    folder: Path
    importance: Importance | None = None

    @torch.no_grad()
    def run(self, ids: torch.Tensor, embeddings: Mapping[int, torch.Tensor], heads: Heads) -> Sensitivity:
        """Measure on token ids [windows, length]. ``embeddings``: the table at some bits, [vocabulary, hidden].

        Raises `StageError` where the model's answers are not finite.
        """
        decoder, block_indices = self.decoder, range(len(self.plan))
        variants = [variant for index in block_indices for variant in self._variants(index)]
        # The probe: the first tokens of one sequence, [1, length].
        longest = _LONGEST_ROUTED if any(map(self._experts, block_indices)) else _LONGEST
        state_count = len(variants) + len(embeddings) + 1
        probe = ids[:1, : min(longest, max(STATES_BYTES // (4 * decoder.hidden_size * state_count), 8))]
        # Found before any layer is watched, since finding them may run a block.
        decoder.calls(probe)
        embedded, original_table = [], decoder.table
        for table in (None, *embeddings.values()):
            decoder.table = table
            embedded.append(decoder.embedded(probe))
        decoder.table = original_table
        states = torch.cat(embedded)
        errors: dict[str, dict[int, float]] = {}
        shares: dict[str, float] = {}
        text = CalibrationActivations(decoder, self.config, ids, self.folder, self.importance) if embeddings else None
        for index in self.progress.track(block_indices, "measuring sensitivity", len(block_indices)):
            decoder.load(index)
            states = self._block(index, probe, states, errors, shares)
            if text is not None:
                text.advance(index)
            decoder.unload(index)
        divergences = self._divergences(states, list(heads(text.table_hessian()).values()) if text else [])
        losses: dict[str, Mapping[int, float]] = {}
        for variant, divergence in zip(variants, divergences[len(embeddings) :], strict=True):
            for name in variant:
                unit = shares.get(name, 1.0) * divergence / max(errors[name][PROBE_BITS], 1e-30)
                losses[name] = {bits: unit * errors[name][bits] for bits in self.choices}
        if embeddings:
            losses[TABLES] = dict(zip(embeddings, divergences, strict=False)) | {16: 0.0}
        return losses

    def _experts(self, index: int) -> dict[str, SeparateExperts]:
        return find_separate_experts(self.decoder.blocks[index], f"{self.decoder.prefix}.{index}")

    def _variants(self, index: int) -> list[tuple[str, ...]]:
        """Return the layers of a block that are coarse together: each alone, but the same matrix of all experts."""
        variants: dict[str, tuple[str, ...]] = {}
        experts = self._experts(index)
        for name in (layer.name for layer in self.plan[index] if layer.bits):
            owner = owning_experts(name, experts)
            shared = f"{owner}.*.{name.rpartition('.')[2]}" if owner else name
            variants[shared] = (*variants.get(shared, ()), name)
        return list(variants.values())

    def _block(
        self,
        index: int,
        probe: torch.Tensor,
        states: torch.Tensor,
        errors: dict[str, dict[int, float]],
        shares: dict[str, float],
    ) -> torch.Tensor:
        """Return all variants' states [variants, length, hidden] after a block, its own layers' variants last."""
        prefix = f"{self.decoder.prefix}.{index}"
        layers_by_name = linears(self.decoder.blocks[index], prefix)
        groups = {layer.name: layer.group_size for layer in self.plan[index] if layer.bits}
        modules = {name: part for name, part in layers_by_name.items() if name in groups}
        coarse: dict[str, torch.Tensor] = {}

        def run(hidden: torch.Tensor) -> torch.Tensor:
            return self.decoder.run(index, hidden, self.decoder.calls(probe.expand(len(hidden), -1))[index])

        def measure(names: Sequence[str], hessian: torch.Tensor) -> None:
            for name in names:
                weight = modules[name].weight
                whole, relative_errors = max(output_energy(weight, hessian), 1e-30), errors.setdefault(name, {})
                for bits in sorted({*self.choices, PROBE_BITS}):
                    settings = settings_for(self.config, bits, groups[name] or weight.shape[1])
                    rounded = round_to_nearest(weight, settings, hessian.diagonal()).dequantize()
                    relative_errors[bits] = output_energy(weight - rounded, hessian) / whole
                    if bits == PROBE_BITS:
                        coarse[name] = rounded

        first, experts = states[:1], self._experts(index)
        work = BlockPass(prefix, modules, run, [lambda: first], experts, self.config.expert_tokens)
        after = [*work.solve(measure), *(run(some) for some in torch.split(states[1:], _AT_ONCE) if len(some))]
        parts = _parts(experts, lambda: run(first)) if experts else {}
        # In the order of the plan, which need not be that of the calls.
        for variant in self._variants(index):
            with _replaced({modules[name]: coarse[name] for name in variant}):
                changed = _parts(experts, lambda: after.append(run(first)))
            shares.update(_shares(variant, parts, changed))
        return torch.cat(after)

    def _divergences(self, states: torch.Tensor, heads: Sequence[torch.Tensor]) -> list[float]:
        """KL(model as it is || variant) of each variant, in nats a token, over `_JUDGED` positions."""
        places = torch.linspace(0, states.shape[1] - 1, min(_JUDGED, states.shape[1])).round().long()
        judged = states[:, places]
        original = self._answers(judged[:1])
        divergences = []
        for variant, hidden in enumerate(judged[1:]):
            answers = self._answers(hidden[None], heads[variant] if variant < len(heads) else None)
            divergence = torch.nn.functional.kl_div(answers, original, reduction="sum", log_target=True)
            divergences.append(float(divergence) / len(places))
        if not all(map(math.isfinite, divergences)):
            raise StageError("The model's answers to the calibration text are not finite.", expected="finite logits")
        # Rounding can leave a variant that changes nothing a hair below zero.
        return [max(value, 0.0) for value in divergences]

    def _answers(self, hidden: torch.Tensor, head: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probabilities [1, positions, vocabulary]."""
        return torch.log_softmax(self.decoder.logits(hidden, head), dim=-1)


@contextmanager
def _replaced(changed: Mapping[nn.Linear, torch.Tensor]) -> Iterator[None]:
    """Let layers have other weights for a while."""
    original_weights = {linear: linear.weight for linear in changed}
    for linear, weight in changed.items():
        linear.weight = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        for linear, weight in original_weights.items():
            linear.weight = weight


def _parts(experts: Mapping[str, SeparateExperts], run: Callable[[], object]) -> dict[str, torch.Tensor]:
    """Return each expert's contribution to its block's output, [its tokens, hidden] by name, for one ``run``."""
    outputs_by_expert: dict[str, torch.Tensor] = {}

    def note(owner: str, number: int, part: torch.Tensor) -> None:
        outputs_by_expert[f"{owner}.{number}"] = part

    for owner, module in experts.items():
        module.on_output = partial(note, owner)
    try:
        run()
    finally:
        for module in experts.values():
            module.on_output = None
    return outputs_by_expert


def _shares(
    variant: Sequence[str], parts: Mapping[str, torch.Tensor], changed: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Return the part of a variant's price that falls to each of its layers.

    It goes by the squared change of what an expert adds, with one token more for each, of an average change: that the
    probe missed an expert doesn't mean that it is never needed.
    """
    owners = [name.rpartition(".")[0] for name in variant]
    if len(variant) == 1:
        return {}
    changes = {owner: float((changed[owner] - parts[owner]).square().sum()) for owner in owners if owner in parts}
    tokens = sum(len(parts[owner]) for owner in changes)
    average = sum(changes.values()) / max(tokens, 1)
    whole = sum(changes.values()) + average * len(owners)
    return {
        name: (changes.get(owner, 0.0) + average) / whole if whole else 1 / len(owners)
        for name, owner in zip(variant, owners, strict=True)
    }


FLOAT_BITS = 16
_SCALE_BITS = 16


@dataclass(frozen=True)
class Allocation:
    """The bits of each layer by name, and of the tables; ``average`` counts every parameter and every scale."""

    bits: Mapping[str, int]
    tables: int
    average: float
    divergence: float


def stored_bits(layer: Layer, bits: int | None, symmetric: bool) -> int:
    """Return the bits a layer takes at ``bits``: integers, scales and, if needed, zero points."""
    elements = layer.rows * layer.columns
    if bits is None or bits == FLOAT_BITS:
        return FLOAT_BITS * elements
    assert layer.group_size is not None
    groups = layer.rows * ceil(layer.columns / layer.group_size)
    return bits * elements + groups * (_SCALE_BITS + (0 if symmetric else bits))


def average_bits(plan: Sequence[Sequence[Layer]], tables: Sequence[Layer], parameters: int, symmetric: bool) -> float:
    """Bits of a parameter, on average over all of the model's ``parameters``, those that stay float16 included."""
    layers = [*tables, *(layer for block in plan for layer in block)]
    counted = sum(stored_bits(layer, layer.bits, symmetric) for layer in layers)
    other_parameters = parameters - sum(layer.rows * layer.columns for layer in layers)
    return (counted + FLOAT_BITS * other_parameters) / parameters


def allocate(
    config: Quantization,
    plan: Sequence[Sequence[Layer]],
    tables: Sequence[Layer],
    parameters: int,
    sensitivity: Sensitivity,
    table_choices: Sequence[int],
) -> Allocation:
    """Choose the bits of each layer with the least predicted loss within ``target_bits`` or ``max_bytes``.

    Args:
        config: Budget and choices of bits.
        plan: Layers of each block.
        tables: Embedding tables, with the group size that they would have. All get the same bits.
        parameters: Parameters of the whole model.
        sensitivity: Measured loss of each layer and number of bits.
        table_choices: Bits that the tables may get.

    Raises:
        StageError: Nothing fits the budget.
    """
    layers = [layer for block in plan for layer in block if layer.bits]
    choices = [*(sorted(sensitivity[layer.name]) for layer in layers), list(table_choices)]
    units = [
        [Option(stored_bits(layer, bits, config.sym), sensitivity[layer.name][bits]) for bits in options]
        for layer, options in zip(layers, choices[:-1], strict=True)
    ]
    table_losses = sensitivity.get(TABLES, {})
    units.append(
        [
            Option(sum(stored_bits(table, bits, config.sym) for table in tables), table_losses.get(bits, 0.0))
            for bits in table_choices
        ]
    )
    alone = parameters - sum(layer.rows * layer.columns for layer in (*layers, *tables))
    if config.max_bytes is not None:
        budget, goal = 8 * config.max_bytes, f"max_bytes: {config.max_bytes:,}"
    else:
        assert config.target_bits is not None
        budget, goal = int(config.target_bits * parameters), f"target_bits: {config.target_bits:g}"
    try:
        chosen = allocate_bits(units, budget - FLOAT_BITS * alone)
    except ValueError as error:
        least = sum(min(option.size_bits for option in unit) for unit in units) + FLOAT_BITS * alone
        raise StageError(
            f"No choice of bits keeps to {goal}: the least possible is {least / parameters:.2f} bits on "
            f"average, {ceil(least / 8):,} bytes.",
            hint="raise target_bits or max_bytes, allow fewer bits in `choices`, or widen group_size",
        ) from error
    options = [unit[index] for unit, index in zip(units, chosen, strict=True)]
    size = sum(option.size_bits for option in options) + FLOAT_BITS * alone
    bits = [allowed[index] for allowed, index in zip(choices, chosen, strict=True)]
    layer_bits = {layer.name: chosen_bits for layer, chosen_bits in zip(layers, bits[:-1], strict=True)}
    return Allocation(layer_bits, bits[-1], size / parameters, sum(option.loss for option in options))
