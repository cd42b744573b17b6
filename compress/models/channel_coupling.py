"""Channels that must be pruned together, found in a traced network, and their removal from its layers."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.models.hooks import removed_on_exit
from compress.utils.errors import MissingExtraError, StageError

Side = Literal["in", "out", "both"]
_SIZES: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Linear, ("in_features", "out_features")),
    (nn.Conv2d, ("in_channels", "out_channels")),
    (nn.PReLU, ("num_parameters",)),
    (_BatchNorm, ("num_features",)),
    (nn.GroupNorm, ("num_channels",)),
)
"""torch's attributes of the number of inputs and outputs of a layer."""
_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, AssertionError)
"""Exceptions of the tracer for a network that it cannot trace."""


@dataclass(frozen=True)
class CoupledLayer:
    """One layer's share of a coupling: feature ``features[i]`` of its inputs or outputs is the channel ``channels[i]``.

    A layer with the side ``both`` passes each channel on separately: a normalisation or a depthwise convolution.
    """

    layer: str
    side: Side
    features: torch.Tensor
    channels: torch.Tensor


@dataclass(frozen=True)
class Coupling:
    """Group of ``size`` channels that all layers in ``parts`` share; the first layer gives it its name.

    With grouped convolutions, the channels form ``groups`` blocks, from which the same positions are removed.
    """

    size: int
    groups: int
    parts: tuple[CoupledLayer, ...]

    @property
    def name(self) -> str:
        """Return the name of the first layer."""
        return self.parts[0].layer

    @property
    def prunable_units(self) -> int:
        """Return the number of units that can be pruned one by one: channels, or the same channel of each group."""
        return self.size // self.groups

    @property
    def readers(self) -> tuple[CoupledLayer, ...]:
        """Return the layers that compute other channels from these; for them a removed channel is like zeros."""
        return tuple(part for part in self.parts if part.side == "in")

    def channels_at(self, units: torch.Tensor) -> torch.Tensor:
        """Return the channels [groups * n] at the units ``places`` [n] of each group, in ascending order."""
        return (torch.arange(self.groups)[:, None] * self.prunable_units + units[None]).flatten()


Cut = tuple[Coupling, torch.Tensor]
"""A coupling and the channels of it that are kept."""


def find_couplings(network: nn.Module, run: Callable[[], torch.Tensor]) -> tuple[list[Coupling], dict[str, str]]:
    """Return the prunable couplings of ``network``, and the reasons for all others by their first layers' names.

    ``run`` calls the network and returns its output. Torch-Pruning traces the layers (Fang et al. 2023, DepGraph,
    section 3.2). Raises `StageError` for a network that cannot be traced and `MissingExtraError` without the package.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingExtraError("torch-pruning", "pruning", "Cutting channels") from error
    calls = _calls(network, run)
    names = {layer: name for name, layer in network.named_modules()}
    try:
        # Torch-Pruning traces the autograd graph of one run.
        graph = torch_pruning.DependencyGraph().build_dependency(
            network, (), forward_fn=lambda *_: run(), verbose=False
        )
        groups = list(graph.get_all_groups(root_module_types=(nn.Conv2d, nn.Linear)))
    except _FAILURES as error:
        message = (str(error) or repr(error)).splitlines()[0]
        raise StageError(
            f"The network cannot be traced: {message}",
            hint="prune heads, neurons or layers, or use sparse weights instead",
        ) from error
    # A coupling is prunable if all of its layers are.
    couplings, unprunable = [], {}
    for group in groups:
        parts = [_part(item, graph, names) for item in group]
        layers = [part for part in parts if isinstance(part, CoupledLayer)]
        reason = next((part for part in parts if isinstance(part, str)), None) or _why_whole(network, layers, calls)
        if reason is None:
            couplings.append(Coupling(_size(layers), _groups(network, layers), tuple(layers)))
        # Output channels are never pruned and need no explanation.
        elif reason != _ANSWERS:
            unprunable[names[group[0].dep.target.module]] = reason
    return couplings, unprunable


_ANSWERS = "they are outputs of the network"


def _part(item: Any, graph: Any, names: dict[nn.Module, str]) -> CoupledLayer | str | None:
    """Return a layer's share, the reason why it cannot be pruned, or ``None`` for an operation without weights."""
    target = item.dep.target.module
    # The tracer represents operations without weights by dummy modules.
    if type(target).__module__.startswith("torch_pruning"):
        return _ANSWERS if type(target).__name__ == "_OutputOp" else None
    if isinstance(target, nn.Parameter):
        return "a parameter outside any layer belongs to them"
    reads, writes = graph.is_in_channel_pruning_fn(item.dep.handler), graph.is_out_channel_pruning_fn(item.dep.handler)
    # One shared slope does not depend on channels.
    if isinstance(target, nn.PReLU) and target.num_parameters == 1:
        return None
    if isinstance(target, nn.Conv2d) and reads and writes and target.in_channels != target.groups:
        return f"{names[target]} makes one of several"
    if not isinstance(target, nn.Conv2d | nn.Linear | _BatchNorm | nn.PReLU):
        return f"{names[target]} ({type(target).__name__}) computes over all of them"
    # Some operations lose the mapping from their features to channels.
    if None in item.root_idxs or not item.idxs:
        return f"{names[target]} reads them in an order that is not supported"
    side: Side = "both" if reads and writes else "in" if reads else "out"
    return CoupledLayer(names[target], side, torch.tensor(item.idxs), torch.tensor(item.root_idxs))


def _calls(network: nn.Module, run: Callable[[], torch.Tensor]) -> Counter[str]:
    """Return the number of calls of each layer in one run."""
    calls: Counter[str] = Counter()

    def count(name: str, *_: object) -> None:
        calls[name] += 1

    network.eval()
    handles = [layer.register_forward_hook(partial(count, name)) for name, layer in network.named_modules()]
    with removed_on_exit(handles), torch.no_grad():
        run()
    return calls


def _size(parts: Sequence[CoupledLayer]) -> int:
    return 1 + max(int(part.channels.max()) for part in parts)


def _grouped(network: nn.Module, parts: Sequence[CoupledLayer]) -> list[tuple[CoupledLayer, nn.Conv2d]]:
    """Return the convolutions with several groups that mix channels within each group."""
    layers = [(part, network.get_submodule(part.layer)) for part in parts if part.side != "both"]
    return [(part, layer) for part, layer in layers if isinstance(layer, nn.Conv2d) and layer.groups > 1]


def _groups(network: nn.Module, parts: Sequence[CoupledLayer]) -> int:
    return max((layer.groups for _, layer in _grouped(network, parts)), default=1)


def _why_whole(network: nn.Module, parts: Sequence[CoupledLayer], calls: Counter[str]) -> str | None:
    """Return the reason why channels that the tracer allows to prune must stay; ``None`` if there is none."""
    repeated = next((part.layer for part in parts if calls[part.layer] > 1), None)
    if repeated is not None:
        return f"{repeated} is called more than once"
    # Channels that no layer reads are outputs of the network.
    if all(part.side != "in" for part in parts):
        return _ANSWERS
    size, groups = _size(parts), _groups(network, parts)
    for part, layer in _grouped(network, parts):
        # A grouped convolution must see all channels in order, in groups of equal size.
        width = layer.in_channels if part.side == "in" else layer.out_channels
        is_in_order = torch.equal(part.features[part.channels.argsort()], torch.arange(size)) and width == size
        if not is_in_order or groups % layer.groups or size % groups:
            return f"the {layer.groups} groups of {part.layer} don't divide them"
    return "each group of a grouped convolution has one" if groups > 1 and size // groups < 2 else None


def remove_channels(network: nn.Module, cuts: Sequence[Cut]) -> None:
    """Remove the channels that are not kept from every layer, in place; weights and statistics shrink."""
    removed: dict[tuple[str, Side], list[torch.Tensor]] = defaultdict(list)
    for coupling, remaining in cuts:
        is_kept = torch.zeros(coupling.size, dtype=torch.bool)
        is_kept[remaining] = True
        for part in coupling.parts:
            removed[part.layer, part.side].append(part.features[~is_kept[part.channels]])
    for (name, side), features in removed.items():
        _drop(network.get_submodule(name), side, torch.cat(features))


@torch.no_grad()
def _drop(layer: nn.Module, side: Side, removed: torch.Tensor) -> None:
    reads = side == "in" and isinstance(layer, nn.Linear | nn.Conv2d)
    if isinstance(layer, nn.LayerNorm):
        size, size_name = layer.normalized_shape[0], ""
    else:
        names = next(names for kind, names in _SIZES if isinstance(layer, kind))
        size_name = names[0] if reads else names[-1]
        size = getattr(layer, size_name)
    is_kept = torch.ones(size, dtype=torch.bool)
    is_kept[removed] = False
    remaining = is_kept.nonzero().flatten()
    if reads:
        # The weights of a grouped convolution have the inputs of one group.
        _select(layer, ("weight",), remaining[remaining < size // getattr(layer, "groups", 1)], 1)
    else:
        _select(layer, ("weight", "bias", "running_mean", "running_var"), remaining, 0)
    if isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (len(remaining),)
    else:
        setattr(layer, size_name, len(remaining))
    if isinstance(layer, nn.Conv2d) and side == "both":
        layer.in_channels = layer.groups = len(remaining)


def _select(layer: nn.Module, names: Sequence[str], kept: torch.Tensor, axis: int) -> None:
    for name in names:
        tensor = getattr(layer, name, None)
        if isinstance(tensor, nn.Parameter):
            pruned = tensor.detach().index_select(axis, kept).clone()
            setattr(layer, name, nn.Parameter(pruned, requires_grad=tensor.requires_grad))
        elif tensor is not None:
            setattr(layer, name, tensor.index_select(axis, kept).clone())


def masked(network: nn.Module, cuts: Sequence[Cut], run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return the output of the unpruned ``network`` when readers see zeros in place of removed channels."""
    handles = []
    for coupling, remaining in cuts:
        is_kept = torch.zeros(coupling.size)
        is_kept[remaining] = 1.0
        # Zeros at the readers are equivalent to removed channels.
        for part in coupling.readers:
            layer = network.get_submodule(part.layer)
            handles.append(layer.register_forward_pre_hook(partial(_mask, part, is_kept)))
    with removed_on_exit(handles), torch.no_grad():
        return run()


def _mask(
    part: CoupledLayer, is_kept: torch.Tensor, layer: nn.Module, arguments: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Return the arguments of a layer with zeros in place of the channels that are not kept: a hook."""
    inputs = arguments[0]
    axis = channel_axis(layer, inputs)
    factors = torch.ones(inputs.shape[axis])
    factors[part.features] = is_kept[part.channels]
    shape = [1] * inputs.ndim
    shape[axis] = -1
    return (inputs * factors.view(shape), *arguments[1:])


def channel_axis(layer: nn.Module, inputs: torch.Tensor) -> int:
    """Return the axis of a layer's inputs with its channels or features."""
    return inputs.ndim - 1 if isinstance(layer, nn.Linear) else inputs.ndim - 3


def least_common_places(groups: int, multiple: int) -> int:
    """Return the number of units per group that hold a multiple of ``multiple`` channels in total."""
    # Each unit contributes one channel per group.
    return multiple // math.gcd(multiple, groups)
