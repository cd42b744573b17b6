"""The sizes of layers whose channels were cut, kept in `config.json`, and giving them to a freshly built network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.utils.errors import ModelError

CHANNELS_KEY = "compress_channels"
"""Config key: layer name -> torch's own names of its sizes -> what they became."""
_CONVOLUTION = ("in_channels", "out_channels", "groups")
_SIZES: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Conv2d, _CONVOLUTION),
    (nn.Linear, ("in_features", "out_features")),
    (_BatchNorm, ("num_features",)),
    (nn.PReLU, ("num_parameters",)),
)

Sizes = dict[str, dict[str, int]]


def layer_sizes(network: nn.Module) -> Sizes:
    """The sizes of each layer that channels can be cut from."""
    return {name: _sizes(layer) for name, layer in network.named_modules() if _names(layer)}


def record(config: Any, before: Sizes, network: nn.Module) -> None:
    """Note in ``config`` every layer whose sizes are no longer those of ``before``, beside what it notes already."""
    changed = {name: sizes for name, sizes in layer_sizes(network).items() if sizes != before[name]}
    setattr(config, CHANNELS_KEY, {**(getattr(config, CHANNELS_KEY, None) or {}), **changed})


def shrink_to_recorded(network: nn.Module, config: Any, where: str) -> None:
    """Give a freshly built ``network`` the sizes that ``config`` records, in place, before its weights are loaded.

    Raises `ModelError` for sizes that are none of this network's.
    """
    recorded = getattr(config, CHANNELS_KEY, None) or {}
    if not isinstance(recorded, Mapping):
        raise _wrong("is no table of layers", where)
    layers = dict(network.named_modules())
    for name, sizes in recorded.items():
        known = _names(layers[name]) if name in layers else ()
        if not known:
            raise _wrong(f"names the layer {name!r}, which this network lacks or which has no channels", where)
        own = _sizes(layers[name])
        if not isinstance(sizes, Mapping) or set(sizes) != set(known):
            raise _wrong(f"gives {name} other sizes than {', '.join(known)}", where)
        for size, value in sizes.items():
            if type(value) is not int or not 1 <= value <= own[size]:
                raise _wrong(f"gives {name} {size} {value!r}, of {own[size]} at most", where)
        if "groups" in sizes and (sizes["in_channels"] % sizes["groups"] or sizes["out_channels"] % sizes["groups"]):
            raise _wrong(f"gives {name} {sizes['groups']} groups, which don't divide its channels", where)
        _resize(layers[name], dict(sizes))


def _names(layer: nn.Module) -> tuple[str, ...]:
    return next((names for kind, names in _SIZES if isinstance(layer, kind)), ())


def _sizes(layer: nn.Module) -> dict[str, int]:
    return {name: int(getattr(layer, name)) for name in _names(layer)}


def _wrong(what: str, where: str) -> ModelError:
    return ModelError(
        f"{CHANNELS_KEY} in config.json {what}.",
        where=where,
        expected="the sizes that the stage `prune` wrote for the network that this config makes",
    )


@torch.no_grad()
def _resize(layer: nn.Module, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        setattr(layer, name, size)
    if isinstance(layer, nn.Conv2d):
        shape: tuple[int, ...] = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    elif isinstance(layer, nn.Linear):
        shape = (layer.out_features, layer.in_features)
    else:
        shape = (next(iter(sizes.values())),)
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(layer, name, None)
        if tensor is not None:
            empty = tensor.new_zeros(shape if name == "weight" else shape[:1])
            setattr(layer, name, nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty)
