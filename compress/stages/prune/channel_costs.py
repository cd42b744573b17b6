"""What each layer of a network costs, as a function of how many channels its couplings keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from compress.models.channel_coupling import Coupling, Side
from compress.models.hooks import capture_outputs

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
    positions = _positions(network, run)
    return [
        Cost(each * positions[name], counts.of(name, "in"), counts.of(name, "out"))
        for name, layer in network.named_modules()
        if (each := _products(layer)) and name in positions
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
    own = {key: tensor for key, tensor in layer.named_parameters(recurse=False) if tensor is not None}
    if not own:
        return []
    one, outputs = Count(1.0), counts.of(name, "out")
    if not (isinstance(layer, nn.Conv2d | nn.Linear) or outputs.of):
        return [Cost(float(sum(tensor.numel() for tensor in own.values())), one, one)]
    if isinstance(layer, nn.Conv2d | nn.Linear):
        found = [Cost(_products(layer), counts.of(name, "in"), outputs)]
        return [*found, *([Cost(1.0, one, outputs)] if "bias" in own else [])]
    return [Cost(float(len(own)), one, outputs)]


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


def _width(layer: Any, side: Side) -> int:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels if side == "in" else layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.in_features if side == "in" else layer.out_features
    return int(getattr(layer, "num_features", 0) or getattr(layer, "num_parameters", 0))


def _positions(network: nn.Module, run: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Return at how many positions of an image each convolution and linear layer is computed."""
    found: dict[str, float] = {}
    layers = {name: layer for name, layer in network.named_modules() if _products(layer)}

    def count(name: str, output: torch.Tensor) -> None:
        layer = layers[name]
        width = layer.out_channels if isinstance(layer, nn.Conv2d) else output.shape[-1]
        found[name] = found.get(name, 0.0) + output.numel() / len(output) / int(width)

    with torch.no_grad(), capture_outputs(layers, count):
        run()
    return found


@dataclass(frozen=True)
class Count:
    """Number of a layer's inputs or outputs: ``fixed``, plus ``of[c]`` for each place kept in coupling c."""

    fixed: float
    of: Mapping[int, float] = field(default_factory=dict)

    def at(self, kept: Sequence[int]) -> float:
        """Their number once ``kept[c]`` places are left."""
        return self.fixed + sum(kept[index] * each for index, each in self.of.items())


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
    ordered = [torch.cumsum(found.double().sort().values, 0).tolist() for found in scores]
    couplings = range(len(scores))
    touching = [[cost for cost in costs if index in {**cost.inputs.of, **cost.outputs.of}] for index in couplings]
    at = [0] * len(scores)
    kept = [steps[0] for steps in rungs]
    total = sum(cost.at(kept) for cost in costs)
    while total > limit:
        best: tuple[float, int, float] | None = None
        for index, steps in enumerate(rungs):
            if at[index] + 1 == len(steps):
                continue
            lower = [*kept]
            lower[index] = steps[at[index] + 1]
            saved = sum(cost.at(kept) - cost.at(lower) for cost in touching[index])
            loss = _lost(ordered[index], kept[index], lower[index])
            if saved > 0 and (best is None or loss / saved < best[0]):
                best = (loss / saved, index, saved)
        if best is None:
            break
        _, index, saved = best
        at[index] += 1
        kept[index] = rungs[index][at[index]]
        total -= saved
    return kept


def _lost(cumulated: Sequence[float], before: int, after: int) -> float:
    """Return the importance of the places that are lost when ``after`` are kept in place of ``before``."""
    places = len(cumulated)
    gone = cumulated[places - after - 1]
    return gone - (cumulated[places - before - 1] if before < places else 0.0)
