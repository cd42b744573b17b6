"""Channels that stand or fall together, found in a traced network, and cutting them out of its layers."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.utils.errors import MissingExtraError, StageError

Side = Literal["in", "out", "both"]
_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, AssertionError)
"""What a tracer raises for a network that it can't follow."""


@dataclass(frozen=True)
class Part:
    """One layer's share: at ``features[i]`` of its inputs or outputs lies the coupling's channel ``channels[i]``.

    A part of side ``both`` hands each channel on alone: a normalisation or a depthwise convolution.
    """

    layer: str
    side: Side
    features: torch.Tensor
    channels: torch.Tensor


@dataclass(frozen=True)
class Coupling:
    """``size`` channels, each of which is one thing to all layers in ``parts``, the first of which names it.

    Where grouped convolutions are among them, the channels lie in ``groups`` blocks, of which the same places go.
    """

    size: int
    groups: int
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The layer that the coupling goes by."""
        return self.parts[0].layer

    @property
    def places(self) -> int:
        """What can be kept or cut one by one: channels, or in a grouped convolution the same channel of each group."""
        return self.size // self.groups

    @property
    def readers(self) -> tuple[Part, ...]:
        """Parts that make something else of the channels; to them a channel that is cut is as if it were zero."""
        return tuple(part for part in self.parts if part.side == "in")

    def channels_at(self, places: torch.Tensor) -> torch.Tensor:
        """The channels [groups * n] at ``places`` [n] of each group, in ascending order."""
        return (torch.arange(self.groups)[:, None] * self.places + places[None]).flatten()


Cut = tuple[Coupling, torch.Tensor]
"""A coupling and the channels of it that are kept."""


def find_couplings(network: nn.Module, run: Callable[[], torch.Tensor]) -> tuple[list[Coupling], dict[str, str]]:
    """The couplings of ``network`` that can be cut, and why the others can't, by their first layers' names.

    ``run`` calls the network and gives its answers. Layers are followed by Torch-Pruning (Fang et al. 2023, DepGraph,
    section 3.2). Raises `StageError` for a network that cannot be traced and `MissingExtraError` without the package.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingExtraError("torch-pruning", "pruning", "Cutting channels") from error
    calls = _calls(network, run)
    names = {layer: name for name, layer in network.named_modules()}
    try:
        graph = torch_pruning.DependencyGraph().build_dependency(
            network, (), forward_fn=lambda *_: run(), verbose=False
        )
        groups = list(graph.get_all_groups(root_module_types=(nn.Conv2d, nn.Linear)))
    except _FAILURES as error:
        said = (str(error) or repr(error)).splitlines()[0]
        raise StageError(
            f"The network cannot be followed from layer to layer: {said}",
            hint="cut heads, neurons or layers, or make sparse weights instead",
        ) from error
    found, whole = [], {}
    for group in groups:
        parts = [_part(item, graph, names) for item in group]
        listed = [part for part in parts if isinstance(part, Part)]
        reason = next((part for part in parts if isinstance(part, str)), None) or _why_whole(network, listed, calls)
        if reason is None:
            found.append(Coupling(_size(listed), _groups(network, listed), tuple(listed)))
        elif reason != _ANSWERS:
            whole[names[group[0].dep.target.module]] = reason
    return found, whole


_ANSWERS = "they are the network's answers"


def _part(item: Any, graph: Any, names: dict[nn.Module, str]) -> Part | str | None:
    """A layer's share, why there is none that can be cut, or ``None`` for an operation without weights."""
    target = item.dep.target.module
    if type(target).__module__.startswith("torch_pruning"):
        return _ANSWERS if type(target).__name__ == "_OutputOp" else None
    if isinstance(target, nn.Parameter):
        return "a parameter outside any layer belongs to them"
    reads, writes = graph.is_in_channel_pruning_fn(item.dep.handler), graph.is_out_channel_pruning_fn(item.dep.handler)
    if isinstance(target, nn.PReLU) and target.num_parameters == 1:
        return None
    if isinstance(target, nn.Conv2d) and reads and writes and target.in_channels != target.groups:
        return f"{names[target]} makes one of several"
    if not isinstance(target, nn.Conv2d | nn.Linear | _BatchNorm | nn.PReLU):
        return f"{names[target]} ({type(target).__name__}) computes over all of them"
    if None in item.root_idxs or not item.idxs:
        return f"{names[target]} reads them in an order that was not followed"
    side: Side = "both" if reads and writes else "in" if reads else "out"
    return Part(names[target], side, torch.tensor(item.idxs), torch.tensor(item.root_idxs))


def _calls(network: nn.Module, run: Callable[[], torch.Tensor]) -> Counter[str]:
    """How often each layer is called in one run."""
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    handles = [layer.register_forward_hook(count(name)) for name, layer in network.named_modules()]
    network.eval()
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return calls


def _size(parts: Sequence[Part]) -> int:
    return 1 + max(int(part.channels.max()) for part in parts)


def _grouped(network: nn.Module, parts: Sequence[Part]) -> list[tuple[Part, nn.Conv2d]]:
    """The parts in convolutions of several groups that mix channels within each."""
    layers = [(part, network.get_submodule(part.layer)) for part in parts if part.side != "both"]
    return [(part, layer) for part, layer in layers if isinstance(layer, nn.Conv2d) and layer.groups > 1]


def _groups(network: nn.Module, parts: Sequence[Part]) -> int:
    return max((layer.groups for _, layer in _grouped(network, parts)), default=1)


def _why_whole(network: nn.Module, parts: Sequence[Part], calls: Counter[str]) -> str | None:
    """Why channels that no operation forbids to cut stay whole all the same; ``None`` if nothing speaks against it."""
    again = next((part.layer for part in parts if calls[part.layer] > 1), None)
    if again is not None:
        return f"{again} is called more than once"
    if all(part.side != "in" for part in parts):
        return _ANSWERS
    size, groups = _size(parts), _groups(network, parts)
    for part, layer in _grouped(network, parts):
        width = layer.in_channels if part.side == "in" else layer.out_channels
        straight = torch.equal(part.features[part.channels.argsort()], torch.arange(size)) and width == size
        if not straight or groups % layer.groups or size % groups:
            return f"the {layer.groups} groups of {part.layer} don't divide them"
    return "each group of a grouped convolution has one" if groups > 1 and size // groups < 2 else None


def cut(network: nn.Module, cuts: Sequence[Cut]) -> None:
    """Take the channels that are not kept out of every layer, in place; weights and statistics really get smaller."""
    gone: dict[tuple[str, Side], list[torch.Tensor]] = defaultdict(list)
    for coupling, kept in cuts:
        stays = torch.zeros(coupling.size, dtype=torch.bool)
        stays[kept] = True
        for part in coupling.parts:
            gone[part.layer, part.side].append(part.features[~stays[part.channels]])
    for (name, side), features in gone.items():
        _drop(network.get_submodule(name), side, torch.cat(features))


@torch.no_grad()
def _drop(layer: nn.Module, side: Side, gone: torch.Tensor) -> None:
    if isinstance(layer, nn.Linear):
        kept = _others(layer.in_features if side == "in" else layer.out_features, gone)
        _select(layer, ("weight",) if side == "in" else ("weight", "bias"), kept, 1 if side == "in" else 0)
        setattr(layer, "in_features" if side == "in" else "out_features", len(kept))
    elif isinstance(layer, nn.Conv2d) and side == "in":
        width = layer.in_channels // layer.groups
        kept = _others(layer.in_channels, gone)
        _select(layer, ("weight",), kept[kept < width], 1)
        layer.in_channels = len(kept)
    elif isinstance(layer, nn.Conv2d):
        kept = _others(layer.out_channels, gone)
        _select(layer, ("weight", "bias"), kept, 0)
        layer.out_channels = len(kept)
        if side == "both":
            layer.in_channels = layer.groups = len(kept)
    elif isinstance(layer, nn.PReLU):
        kept = _others(layer.num_parameters, gone)
        _select(layer, ("weight",), kept, 0)
        layer.num_parameters = len(kept)
    elif isinstance(layer, _BatchNorm):
        kept = _others(layer.num_features, gone)
        _select(layer, ("weight", "bias", "running_mean", "running_var"), kept, 0)
        layer.num_features = len(kept)
    elif isinstance(layer, nn.GroupNorm):
        kept = _others(layer.num_channels, gone)
        _select(layer, ("weight", "bias"), kept, 0)
        layer.num_channels = len(kept)
    elif isinstance(layer, nn.LayerNorm):
        kept = _others(layer.normalized_shape[0], gone)
        _select(layer, ("weight", "bias"), kept, 0)
        layer.normalized_shape = (len(kept),)


def _others(size: int, gone: torch.Tensor) -> torch.Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero().flatten()


def _select(layer: nn.Module, names: Sequence[str], kept: torch.Tensor, axis: int) -> None:
    for name in names:
        tensor = getattr(layer, name, None)
        if isinstance(tensor, nn.Parameter):
            smaller = tensor.detach().index_select(axis, kept).clone()
            setattr(layer, name, nn.Parameter(smaller, requires_grad=tensor.requires_grad))
        elif tensor is not None:
            setattr(layer, name, tensor.index_select(axis, kept).clone())


def masked(network: nn.Module, cuts: Sequence[Cut], run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The answers of the uncut ``network`` where readers see zeros in place of the channels that are not kept."""
    handles = []
    for coupling, kept in cuts:
        stays = torch.zeros(coupling.size)
        stays[kept] = 1.0
        for part in coupling.readers:
            layer = network.get_submodule(part.layer)
            handles.append(layer.register_forward_pre_hook(_mask(part, stays)))
    try:
        with torch.no_grad():
            return run()
    finally:
        for handle in handles:
            handle.remove()


def _mask(part: Part, stays: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    def hook(layer: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        inputs = arguments[0]
        axis = channel_axis(layer, inputs)
        factors = torch.ones(inputs.shape[axis])
        factors[part.features] = stays[part.channels]
        shape = [1] * inputs.ndim
        shape[axis] = -1
        return (inputs * factors.view(shape), *arguments[1:])

    return hook


def channel_axis(layer: nn.Module, inputs: torch.Tensor) -> int:
    """Which axis of a layer's inputs its channels, or features, lie on."""
    return inputs.ndim - 1 if isinstance(layer, nn.Linear) else inputs.ndim - 3


def least_common_places(groups: int, multiple: int) -> int:
    """How many places of each of ``groups`` hold a multiple of ``multiple`` channels in all."""
    return multiple // math.gcd(multiple, groups)
