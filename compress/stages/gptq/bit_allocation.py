"""Choice of the bits of each layer under a budget for the whole model (`target_bits` or `max_bytes`).

Some layers tolerate coarse rounding better than others, so a model of a given size is more accurate if its sensitive
layers get more bits. The bits are chosen in two steps:

1. `Survey` measures the sensitivity of each layer: the KL divergence of the next-token probabilities of a model in
   which only this layer is rounded, at `PROBE_BITS`, from those of the float model. For other numbers of bits it is
   scaled by the layer's squared output error tr(E H Eᵀ), E = W - Q, to which small divergences are proportional.
2. `allocate` minimizes the sum of these divergences within the budget. This is a multiple-choice knapsack problem,
   which `compress.numerics.bit_allocation` solves exactly.
"""

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
from compress.stages.gptq.settings import FLOAT_BITS, Quantization
from compress.stages.gptq.solver import settings_for
from compress.utils.errors import StageError
from compress.utils.progress import Progress

TABLES = "tables"
"""Key of `Sensitivity` for the tables, which are the input embeddings and the output head."""
PROBE_BITS = 3
"""Bits of a layer while its sensitivity is measured: few enough that the effect exceeds rounding in float32."""
STATES_BYTES = 1 << 28
"""Largest size of the hidden states of all variants. The probe text is shortened to keep to it."""
_PROBE_TOKENS = 128
_BATCH_SIZE = 16
"""Variants that pass through a block in one batch."""
_PROBE_TOKENS_WITH_EXPERTS = 512
"""Mixtures of experts need a longer probe text, since each expert receives only a few of its tokens."""
_COMPARED_POSITIONS = 32
"""Evenly spaced positions at which the probabilities of a variant are compared with those of the float model."""


Heads = Callable[[torch.Tensor], Mapping[int, torch.Tensor]]
"""Function from the Hessian of the head's inputs to the dequantized heads [vocabulary, hidden] by bits."""
Sensitivity = Mapping[str, Mapping[int, float]]
"""``[name][bits]``: the divergence that rounding a layer to this number of bits adds, in nats per token."""


@dataclass
class Survey:
    """Measurement of the sensitivity of each layer in one pass over the float model, block by block.

    A variant of the model has a single layer rounded to `PROBE_BITS`, or the same matrix of all experts of a block.
    The hidden states of all variants go through the model together. A variant begins at the block of its layer, since
    it equals the float model before.

    Attributes:
        decoder: Model whose blocks are loaded one at a time.
        config: Settings of the quantization.
        plan: Layers of each block.
        choices: Numbers of bits that a layer may get.
        progress: Receives the number of finished blocks.
        folder: Folder for temporary hidden states.
        importance: Weight of each token of the calibration text; None if all count alike.
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
        """Return the sensitivity of each layer and, unless ``embeddings`` is empty, of the tables.

        Args:
            ids: Token ids of the calibration text, [windows, length]. The first window is the probe text.
            embeddings: Dequantized embeddings [vocabulary, hidden] by bits.
            heads: Returns the dequantized heads by bits.

        Raises:
            StageError: The model's logits are not finite.
        """
        decoder, block_indices = self.decoder, range(len(self.plan))
        variants = [variant for index in block_indices for variant in self._variants(index)]
        # The probe: the first tokens of one sequence, [1, length].
        max_tokens = _PROBE_TOKENS_WITH_EXPERTS if any(map(self._experts, block_indices)) else _PROBE_TOKENS
        state_count = len(variants) + len(embeddings) + 1
        probe = ids[:1, : min(max_tokens, max(STATES_BYTES // (4 * decoder.hidden_size * state_count), 8))]
        # Cache the arguments of the blocks now. It may run a block, which must not happen while inputs are captured.
        decoder.calls(probe)
        embedded, original_table = [], decoder.table
        for table in (None, *embeddings.values()):
            decoder.table = table
            embedded.append(decoder.embedded(probe))
        decoder.table = original_table
        # States of the float model come first, then those of coarse tables, then those of each block's variants.
        states = torch.cat(embedded)
        errors: dict[str, dict[int, float]] = {}
        shares: dict[str, float] = {}
        # The whole text passes through the model as well, because the heads are rounded under its Hessian.
        text = CalibrationActivations(decoder, self.config, ids, self.folder, self.importance) if embeddings else None
        for index in self.progress.track(block_indices, "measuring sensitivity", len(block_indices)):
            decoder.load(index)
            states = self._run_block(index, probe, states, errors, shares)
            if text is not None:
                text.advance(index)
            decoder.unload(index)
        divergences = self._divergences(states, list(heads(text.table_hessian()).values()) if text else [])
        losses: dict[str, Mapping[int, float]] = {}
        for variant, divergence in zip(variants, divergences[len(embeddings) :], strict=True):
            for name in variant:
                # A divergence grows in proportion to the squared output error while both are small.
                ratio = shares.get(name, 1.0) * divergence / max(errors[name][PROBE_BITS], 1e-30)
                losses[name] = {bits: ratio * errors[name][bits] for bits in self.choices}
        if embeddings:
            losses[TABLES] = dict(zip(embeddings, divergences, strict=False)) | {FLOAT_BITS: 0.0}
        return losses

    def _experts(self, index: int) -> dict[str, SeparateExperts]:
        return find_separate_experts(self.decoder.blocks[index], f"{self.decoder.prefix}.{index}")

    def _variants(self, index: int) -> list[tuple[str, ...]]:
        """Return the layers that are rounded in each variant of a block: one, or the same matrix of all experts."""
        variants: dict[str, tuple[str, ...]] = {}
        experts = self._experts(index)
        for name in (layer.name for layer in self.plan[index] if layer.bits):
            owner = owning_experts(name, experts)
            key = f"{owner}.*.{name.rpartition('.')[2]}" if owner else name
            variants[key] = (*variants.get(key, ()), name)
        return list(variants.values())

    def _run_block(
        self,
        index: int,
        probe: torch.Tensor,
        states: torch.Tensor,
        errors: dict[str, dict[int, float]],
        shares: dict[str, float],
    ) -> torch.Tensor:
        """Return all states [1 + variants, length, hidden] after a block, with the variants of the block's layers last.

        Args:
            index: Index of the block, which is loaded.
            probe: Token ids of the probe text, [1, length].
            states: States before the block. The first are those of the float model.
            errors: Receives the relative squared output error of each layer of the block by bits.
            shares: Receives the share of each expert's layer in the divergence of its variant.
        """
        prefix = f"{self.decoder.prefix}.{index}"
        layers_by_name = linears(self.decoder.blocks[index], prefix)
        groups = {layer.name: layer.group_size for layer in self.plan[index] if layer.bits}
        modules = {name: linear for name, linear in layers_by_name.items() if name in groups}
        coarse: dict[str, torch.Tensor] = {}

        def run(hidden: torch.Tensor) -> torch.Tensor:
            return self.decoder.run(index, hidden, self.decoder.calls(probe.expand(len(hidden), -1))[index])

        def measure(names: Sequence[str], hessian: torch.Tensor) -> None:
            for name in names:
                weight = modules[name].weight
                energy, relative_errors = max(output_energy(weight, hessian), 1e-30), errors.setdefault(name, {})
                for bits in sorted({*self.choices, PROBE_BITS}):
                    settings = settings_for(self.config, bits, groups[name] or weight.shape[1])
                    rounded = round_to_nearest(weight, settings, hessian.diagonal()).dequantize()
                    relative_errors[bits] = output_energy(weight - rounded, hessian) / energy
                    if bits == PROBE_BITS:
                        coarse[name] = rounded

        original, experts = states[:1], self._experts(index)
        # `solve` calls `measure` with the Hessians of the float model's inputs, and yields the float model's states.
        passes = BlockPass(prefix, modules, run, [lambda: original], experts, self.config.expert_tokens)
        outputs = [*passes.solve(measure), *(run(rows) for rows in torch.split(states[1:], _BATCH_SIZE) if len(rows))]
        expert_outputs = _expert_outputs(experts, lambda: run(original)) if experts else {}
        # In the order of the plan, which need not be that of the calls.
        for variant in self._variants(index):
            with _replaced_weights({modules[name]: coarse[name] for name in variant}):
                changed = _expert_outputs(experts, lambda: outputs.append(run(original)))
            shares.update(_shares_of_experts(variant, expert_outputs, changed))
        return torch.cat(outputs)

    def _divergences(self, states: torch.Tensor, heads: Sequence[torch.Tensor]) -> list[float]:
        """Return KL(float model || variant) of each variant in nats per token, over `_COMPARED_POSITIONS` positions.

        Variants with coarse embeddings come first in ``states``. Their heads are ``heads``.
        """
        count = min(_COMPARED_POSITIONS, states.shape[1])
        compared = states[:, torch.linspace(0, states.shape[1] - 1, count).round().long()]
        original = self._log_probabilities(compared[:1])
        divergences = []
        for variant, hidden in enumerate(compared[1:]):
            log_probabilities = self._log_probabilities(hidden[None], heads[variant] if variant < len(heads) else None)
            divergence = torch.nn.functional.kl_div(log_probabilities, original, reduction="sum", log_target=True)
            divergences.append(float(divergence) / count)
        if not all(map(math.isfinite, divergences)):
            raise StageError("The model's answers to the calibration text are not finite.", expected="finite logits")
        # Rounding can make the divergence of a variant that changes nothing slightly negative.
        return [max(value, 0.0) for value in divergences]

    def _log_probabilities(self, hidden: torch.Tensor, head: torch.Tensor | None = None) -> torch.Tensor:
        """Return the log-probabilities [1, positions, vocabulary] of the next tokens."""
        return torch.log_softmax(self.decoder.logits(hidden, head), dim=-1)


@contextmanager
def _replaced_weights(changed: Mapping[nn.Linear, torch.Tensor]) -> Iterator[None]:
    """Give layers other weights within a `with` block."""
    original_weights = {linear: linear.weight for linear in changed}
    for linear, weight in changed.items():
        linear.weight = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        for linear, weight in original_weights.items():
            linear.weight = weight


def _expert_outputs(experts: Mapping[str, SeparateExperts], run: Callable[[], object]) -> dict[str, torch.Tensor]:
    """Call ``run`` and return the part [its tokens, hidden] of the block's output that each expert adds, by name."""
    outputs_by_expert: dict[str, torch.Tensor] = {}

    def record(owner: str, number: int, output: torch.Tensor) -> None:
        outputs_by_expert[f"{owner}.{number}"] = output

    for owner, module in experts.items():
        module.on_output = partial(record, owner)
    try:
        run()
    finally:
        for module in experts.values():
            module.on_output = None
    return outputs_by_expert


def _shares_of_experts(
    variant: Sequence[str], outputs: Mapping[str, torch.Tensor], changed: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Return the share of each layer in the divergence of a variant that rounds a layer of several experts.

    The share is proportional to the squared change of the expert's outputs. To each expert, the average change of one
    token is added, because an expert that received no token of the probe text may still be needed.
    """
    experts = [name.rpartition(".")[0] for name in variant]
    if len(variant) == 1:
        return {}
    changes = {name: float((changed[name] - outputs[name]).square().sum()) for name in experts if name in outputs}
    tokens = sum(len(outputs[name]) for name in changes)
    average = sum(changes.values()) / max(tokens, 1)
    total = sum(changes.values()) + average * len(experts)
    return {
        layer: (changes.get(expert, 0.0) + average) / total if total else 1 / len(experts)
        for layer, expert in zip(variant, experts, strict=True)
    }


_SCALE_BITS = 16


@dataclass(frozen=True)
class Allocation:
    """Chosen bits of each layer by name, and of the tables, with the sum of the predicted divergences.

    ``average`` is the number of bits per parameter over the whole model, scales and zero points included.
    """

    bits: Mapping[str, int]
    tables: int
    average: float
    divergence: float


def stored_bits(layer: Layer, bits: int | None, symmetric: bool) -> int:
    """Return the stored size of a layer in bits: integers of ``bits`` bits, scales and, unless symmetric, zero points.

    ``bits`` None is a layer that stays float16.
    """
    elements = layer.rows * layer.columns
    if bits is None or bits == FLOAT_BITS:
        return FLOAT_BITS * elements
    assert layer.group_size is not None
    groups = layer.rows * ceil(layer.columns / layer.group_size)
    return bits * elements + groups * (_SCALE_BITS + (0 if symmetric else bits))


def average_bits(plan: Sequence[Sequence[Layer]], tables: Sequence[Layer], parameters: int, symmetric: bool) -> float:
    """Return the bits per parameter, on average over all ``parameters`` of the model, including those left float16."""
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
    """Choose the bits of each layer so that the sum of predicted divergences is least within the budget.

    A layer is one unit of the knapsack problem, all tables together are another. An option of a unit is a number of
    bits, with its size and its predicted divergence. Parameters outside these layers take `FLOAT_BITS` each.

    Args:
        config: Budget: ``max_bytes``, or else ``target_bits`` per parameter.
        plan: Layers of each block.
        tables: Embedding tables, with the group size that they would have. All get the same bits.
        parameters: Parameters of the whole model.
        sensitivity: Predicted divergence of each layer and number of bits.
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
    other_parameters = parameters - sum(layer.rows * layer.columns for layer in (*layers, *tables))
    if config.max_bytes is not None:
        budget, budget_name = 8 * config.max_bytes, f"max_bytes: {config.max_bytes:,}"
    else:
        assert config.target_bits is not None
        budget, budget_name = int(config.target_bits * parameters), f"target_bits: {config.target_bits:g}"
    try:
        chosen = allocate_bits(units, budget - FLOAT_BITS * other_parameters)
    except ValueError as error:
        least = sum(min(option.size_bits for option in unit) for unit in units) + FLOAT_BITS * other_parameters
        raise StageError(
            f"No choice of bits keeps to {budget_name}: the least possible is {least / parameters:.2f} bits on "
            f"average, {ceil(least / 8):,} bytes.",
            hint="raise target_bits or max_bytes, allow fewer bits in `choices`, or widen group_size",
        ) from error
    options = [unit[index] for unit, index in zip(units, chosen, strict=True)]
    size = sum(option.size_bits for option in options) + FLOAT_BITS * other_parameters
    bits = [allowed[index] for allowed, index in zip(choices, chosen, strict=True)]
    layer_bits = {layer.name: chosen_bits for layer, chosen_bits in zip(layers, bits[:-1], strict=True)}
    return Allocation(layer_bits, bits[-1], size / parameters, sum(option.loss for option in options))
