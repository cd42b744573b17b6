"""Cut channels of convolutions and linear layers whose importance, measured on data, is least."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from compress.models.channel_coupling import (
    Coupling,
    Cut,
    Side,
    channel_axis,
    find_couplings,
    least_common_places,
    masked,
    remove_channels,
)
from compress.models.custom_module import CustomModule
from compress.models.hooks import capture_inputs, capture_outputs
from compress.models.model import TorchModel
from compress.models.pruned_layer_sizes import layer_sizes, record
from compress.numerics.pruning import channel_products, most_important
from compress.stages.base import Context
from compress.stages.prune.settings import Pruning
from compress.tasks.inference import answers, forward, loss_of, tensors
from compress.tasks.task import Examples
from compress.utils.errors import StageError

Figure = Literal["multiplications", "parameters"]


def layer_costs(
    network: nn.Module, couplings: Sequence[Coupling], run: Callable[[], torch.Tensor], figure: Figure
) -> list[Cost]:
    """Return the cost of every layer in ``figure``: multiplications an image, or parameters.

    Multiplications are those of convolutions and linear layers, each time that they are called; ``run`` calls the
    network on two images. Places of couplings count as `Coupling.prunable_units` has them.
    """
    counts = _Counts(network, couplings)
    if figure == "parameters":
        return [cost for name, layer in network.named_modules() for cost in _parameters(name, layer, counts)]
    # At how many positions of an image each convolution and linear layer is computed.
    positions: dict[str, float] = {}
    layers = {name: layer for name, layer in network.named_modules() if _products(layer)}

    def count(name: str, output: torch.Tensor) -> None:
        layer = layers[name]
        width = layer.out_channels if isinstance(layer, nn.Conv2d) else output.shape[-1]
        positions[name] = positions.get(name, 0.0) + output.numel() / len(output) / int(width)

    with torch.no_grad(), capture_outputs(layers, count):
        run()
    return [
        Cost(_products(layer) * positions[name], counts.of(name, "in"), counts.of(name, "out"))
        for name, layer in layers.items()
        if name in positions
    ]


def _products(layer: nn.Module) -> float:
    """Multiplications at one position for an input and an output channel; inputs count in all groups."""
    if isinstance(layer, nn.Linear):
        return 1.0
    if isinstance(layer, nn.Conv2d):
        kernel = math.prod(layer.kernel_size)
        return kernel if _alone(layer) else kernel / layer.groups
    return 0.0


def _alone(layer: nn.Module) -> bool:
    """Return whether each channel is passed on alone, so that no product involves the outputs."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.out_channels and layer.groups > 1


def _parameters(name: str, layer: nn.Module, counts: _Counts) -> list[Cost]:
    parameters = dict(layer.named_parameters(recurse=False))
    if not parameters:
        return []
    constant, outputs = Count(1.0), counts.of(name, "out")
    if isinstance(layer, nn.Conv2d | nn.Linear):
        weights = Cost(_products(layer), counts.of(name, "in"), outputs)
        return [weights, *([Cost(1.0, constant, outputs)] if "bias" in parameters else [])]
    if outputs.of:
        return [Cost(float(len(parameters)), constant, outputs)]
    return [Cost(float(sum(tensor.numel() for tensor in parameters.values())), constant, constant)]


class _Counts:
    """Numbers of inputs and outputs of each layer, in terms of the places its couplings keep."""

    def __init__(self, network: nn.Module, couplings: Sequence[Coupling]) -> None:
        self._network = network
        self._shares: dict[tuple[str, Side], dict[int, int]] = {}
        for index, coupling in enumerate(couplings):
            for part in coupling.parts:
                self._shares.setdefault((part.layer, part.side), {})[index] = len(part.features)
        self._places = [coupling.prunable_units for coupling in couplings]

    def of(self, name: str, side: Literal["in", "out"]) -> Count:
        """Return the inputs or outputs of a layer; a layer that passes channels on alone has one input to each."""
        layer: Any = self._network.get_submodule(name)
        if side == "in" and _alone(layer):
            return Count(1.0)
        shares = self._shares.get((name, side)) or self._shares.get((name, "both")) or {}
        of = {index: features / self._places[index] for index, features in shares.items()}
        return Count(float(_width(layer, side) - sum(shares.values())), of)


def _width(layer: object, side: Side) -> int:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels if side == "in" else layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.in_features if side == "in" else layer.out_features
    return int(getattr(layer, "num_features", 0) or getattr(layer, "num_parameters", 0))


@dataclass(frozen=True)
class Count:
    """Number of a layer's inputs or outputs: ``fixed``, plus ``of[c]`` for each place kept in coupling c."""

    fixed: float
    of: Mapping[int, float] = field(default_factory=dict)

    def at(self, kept: Sequence[int]) -> float:
        """Their number once ``kept[c]`` places are left."""
        return self.fixed + sum(kept[index] * factor for index, factor in self.of.items())


@dataclass(frozen=True)
class Cost:
    """Cost of a layer: ``each`` x inputs x outputs."""

    each: float
    inputs: Count
    outputs: Count

    def at(self, kept: Sequence[int]) -> float:
        """Return the cost if ``kept[c]`` places remain in coupling c."""
        return self.each * self.inputs.at(kept) * self.outputs.at(kept)


def ladder(places: int, step: int) -> list[int]:
    """Return the numbers of places that may remain, downwards: all, then multiples of ``step``."""
    return [places, *range((places - 1) // step * step, 0, -step)]


def nearest_rung(rungs: Sequence[int], wanted: float) -> int:
    """Return the rung nearest to ``wanted``; of two equally near ones the larger."""
    return min(rungs, key=lambda rung: (abs(rung - wanted), -rung))


def least_loss(
    scores: Sequence[torch.Tensor], rungs: Sequence[Sequence[int]], costs: Sequence[Cost], limit: float
) -> list[int]:
    """Return how many places to keep in each coupling, so that the costs sum to ``limit`` or less.

    Again and again the step down is taken that loses least importance for what it saves, as in a knapsack filled
    greedily (Dantzig 1957). A coupling of ``scores`` [places] keeps its best places. Where even the lowest rungs cost
    more than ``limit``, these are given.
    """
    # Removing the least important units first, the loss of any count is a prefix sum of the sorted scores.
    ordered = [torch.cumsum(unit_scores.double().sort().values, 0).tolist() for unit_scores in scores]
    couplings = range(len(scores))
    touching = [[cost for cost in costs if index in {**cost.inputs.of, **cost.outputs.of}] for index in couplings]
    at = [0] * len(scores)
    remaining = [steps[0] for steps in rungs]
    total = sum(cost.at(remaining) for cost in costs)
    while total > limit:
        best: tuple[float, int, float] | None = None
        for index, steps in enumerate(rungs):
            if at[index] + 1 == len(steps):
                continue
            lower = [*remaining]
            lower[index] = steps[at[index] + 1]
            saved = sum(cost.at(remaining) - cost.at(lower) for cost in touching[index])
            # The importance of the places that are lost when ``after`` are kept in place of ``before``.
            cumulated = ordered[index]
            places = len(cumulated)
            gone = cumulated[places - lower[index] - 1]
            loss = gone - (cumulated[places - remaining[index] - 1] if remaining[index] < places else 0.0)
            if saved > 0 and (best is None or loss / saved < best[0]):
                best = (loss / saved, index, saved)
        if best is None:
            break
        _, index, saved = best
        at[index] += 1
        remaining[index] = rungs[index][at[index]]
        total -= saved
    return remaining


_BATCH = 16
_CLOSE = 1e-3
"""Of the largest answer; what the same sums in another order may differ by."""


@dataclass(frozen=True)
class Net:
    """A model's network, whose layers are named from ``network`` on, and a way to run it on two images."""

    module: Any
    network: nn.Module
    examples: Examples
    batch: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: TorchModel, examples: Examples) -> Net:
        """Return the network of ``model``; names of a custom module leave out its wrapper."""
        module: Any = model.module
        network = module.network if isinstance(module, CustomModule) else module
        batch = tensors(examples, [0, min(1, len(examples) - 1)])
        return cls(module.eval(), network, examples, batch)

    def run(self) -> torch.Tensor:
        """Return the predictions [2, ...]."""
        return answers(self.examples, forward(self.module, self.batch), self.batch)

    def copy(self) -> Net:
        """Return a copy with weights of its own."""
        module = copy.deepcopy(self.module)
        return replace(self, module=module, network=module.network if isinstance(module, CustomModule) else module)


def prune_channels(model: TorchModel, settings: Pruning, examples: Examples, context: Context) -> None:
    """Remove channels in place, and record the remaining sizes in the model's config.

    Args:
        model: Model to prune.
        settings: Share or budget, and measure of importance.
        examples: Examples on which importance is measured.
        context: Context of the stage.

    Raises:
        StageError: If no channel can be removed.
    """
    # Find the sets of channels that must be removed together.
    net = Net.of(model, examples)
    sizes, figures_before = layer_sizes(net.network), _figures(net)
    couplings, whole = _provable(net, context)
    if not couplings:
        raise StageError(
            "No channels of this model can be cut.",
            expected="convolutions or linear layers whose channels other layers read",
            hint=f"reasons: {_listed(whole) or 'its layers have no channels that only layers read'}",
        )
    # The importance of each place [places] of each coupling.
    importances = _taylor(net, couplings, examples, context)
    scores = [
        scores.view(coupling.groups, coupling.prunable_units).sum(0)
        for scores, coupling in zip(importances, couplings, strict=True)
    ]
    cuts = _choose(net, couplings, scores, settings)
    expected = masked(net.network, cuts, net.run)
    remove_channels(net.network, cuts)
    if not _same(net, expected):
        raise StageError(
            "After pruning, the outputs differ from those with the removed channels set to zero.",
            hint="this is a defect of the stage; please report it with the recipe",
        )
    record(net.module.config, sizes, net.network)
    channels, remaining = sum(coupling.size for coupling, _ in cuts), sum(len(channels) for _, channels in cuts)
    figures = ", ".join(f"{figures_before[name]:,} -> {count:,} {name}" for name, count in _figures(net).items())
    context.note(f"prune: {remaining:,} of {channels:,} channels kept in {len(cuts)} sets of coupled layers; {figures}")
    if whole:
        context.note(f"prune: left whole: {_listed(whole)}")


def _provable(net: Net, context: Context) -> tuple[list[Coupling], dict[str, str]]:
    """Couplings that, cut by half on trial, leave the answers that zeros would; and why others stay whole."""
    couplings, whole = find_couplings(net.network, net.run)
    provable = []
    for coupling in context.progress.track(couplings, "prune: trial cuts", len(couplings)):
        if coupling.prunable_units < 2:
            whole[coupling.name] = "it has only one channel"
            continue
        cuts = [(coupling, coupling.channels_at(torch.arange(0, coupling.prunable_units, 2)))]
        try:
            expected = masked(net.network, cuts, net.run)
            trial = net.copy()
            remove_channels(trial.network, cuts)
            is_clean = _same(trial, expected)
        except (RuntimeError, ValueError, IndexError):
            is_clean = False
        if is_clean:
            provable.append(coupling)
        else:
            whole[coupling.name] = "removing its channels changed the others"
    return provable, whole


@torch.no_grad()
def _same(net: Net, expected: torch.Tensor) -> bool:
    output = net.run()
    if output.shape != expected.shape:
        return False
    return bool((output - expected).abs().max() <= _CLOSE * expected.abs().max() + 1e-6)


def _taylor(net: Net, couplings: Sequence[Coupling], examples: Examples, context: Context) -> list[torch.Tensor]:
    """First-order importance of gates on what each channel's readers are given, summed over examples, [size] each."""
    sums = [torch.zeros(coupling.size) for coupling in couplings]
    layers = {part.layer: net.network.get_submodule(part.layer) for coupling in couplings for part in coupling.readers}
    inputs: dict[str, torch.Tensor] = {}
    starts = range(0, len(examples), _BATCH)
    for start in context.progress.track(starts, "prune: importance", len(starts)):
        batch = tensors(examples, list(range(start, min(start + _BATCH, len(examples)))))
        with capture_inputs(layers, inputs.__setitem__):
            loss = loss_of(context.task, net.module, batch) * len(batch["index"])
        input_gradients = torch.autograd.grad(loss, [inputs[name] for name in layers], allow_unused=True)
        gradients = dict(zip(layers, input_gradients, strict=True))
        for total, coupling in zip(sums, couplings, strict=True):
            # dL/d xi of a gate xi at 1 on each channel, wherever it is read, [batch, size].
            gates: torch.Tensor | None = None
            for part in coupling.readers:
                gradient, activation = gradients[part.layer], inputs[part.layer].detach()
                if gradient is not None:
                    products = channel_products(activation, gradient, channel_axis(layers[part.layer], activation))
                    gates = torch.zeros(len(products), coupling.size) if gates is None else gates
                    gates.index_add_(1, part.channels, products[:, part.features])
            total += 0.0 if gates is None else gates.abs().sum(0)
    return sums


def _choose(net: Net, couplings: Sequence[Coupling], scores: Sequence[torch.Tensor], settings: Pruning) -> list[Cut]:
    """Return the places to keep of each coupling."""
    steps = [least_common_places(coupling.groups, settings.channel_multiple) for coupling in couplings]
    rungs = [ladder(coupling.prunable_units, step) for coupling, step in zip(couplings, steps, strict=True)]
    if max(len(steps) for steps in rungs) == 1:
        widest = max(couplings, key=lambda coupling: coupling.size)
        raise StageError(
            f"No layer is wide enough to lose channels by multiples of {settings.channel_multiple}: the widest, "
            f"{widest.name}, has {widest.size}.",
            hint="set channel_multiple: 1",
        )
    if settings.channels:
        counts = [_share(coupling, rungs[i], settings.channels) for i, coupling in enumerate(couplings)]
    else:
        what: Figure = "multiplications" if settings.flops is not None else "parameters"
        share = settings.flops if settings.flops is not None else settings.parameters
        assert share is not None
        costs = layer_costs(net.network, couplings, net.run, what)
        total = sum(cost.at([coupling.prunable_units for coupling in couplings]) for cost in costs)
        counts = least_loss(scores, rungs, costs, total * (1 - share))
        reached = 1 - sum(cost.at(counts) for cost in costs) / total
        if reached < share * (1 - 1e-9):
            raise StageError(
                f"Cutting channels can remove {reached:.1%} of the {what}, and not {share:.1%}.",
                hint="remove less, set channel_multiple: 1, or start from a smaller model",
            )
    cuts = [
        (coupling, coupling.channels_at(most_important(importances, count)))
        for coupling, importances, count in zip(couplings, scores, counts, strict=True)
        if count < coupling.prunable_units
    ]
    if not cuts:
        raise StageError(
            f"By multiples of {settings.channel_multiple}, no channel goes.",
            hint="set channel_multiple: 1, or remove more",
        )
    return cuts


def _share(coupling: Coupling, rungs: Sequence[int], share: float) -> int:
    remaining_units = coupling.prunable_units * (1 - share)
    if round(remaining_units) < 1:
        raise StageError(
            f"Removing {share:.0%} of the {coupling.size} channels of {coupling.name} leaves none.",
            hint="remove a smaller share",
        )
    return nearest_rung(rungs, remaining_units)


@torch.no_grad()
def _figures(net: Net) -> dict[str, int]:
    multiplications = sum(cost.at([]) for cost in layer_costs(net.network, [], net.run, "multiplications"))
    return {
        "multiplications an image": round(multiplications),
        "parameters": sum(parameter.numel() for parameter in net.module.parameters()),
    }


def _listed(whole: dict[str, str]) -> str:
    """Return the reasons, each with its layers."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in whole.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
