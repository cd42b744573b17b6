"""Sizes of layers with pruned channels, recorded in `config.json` and applied to a freshly built network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


CHANNELS_KEY = "compress_channels"
"""Config key for a mapping of layer name -> torch's attribute of a size -> the size after pruning."""
_CONVOLUTION = ("in_channels", "out_channels", "groups")
_SIZES: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Conv2d, _CONVOLUTION),
    (nn.Linear, ("in_features", "out_features")),
    (_BatchNorm, ("num_features",)),
    (nn.PReLU, ("num_parameters",)),
)

Sizes = dict[str, dict[str, int]]


def layer_sizes(network: nn.Module) -> Sizes:
    """Return the sizes of each layer from which channels can be pruned."""
    return {name: _sizes(layer) for name, layer in network.named_modules() if _names(layer)}


def record(config: PretrainedConfig, before: Sizes, network: nn.Module) -> None:
    """Record in ``config`` every layer whose sizes differ from ``before``; earlier records stay."""
    # Earlier records of other layers stay.
    changed = {name: sizes for name, sizes in layer_sizes(network).items() if sizes != before[name]}
    setattr(config, CHANNELS_KEY, {**(getattr(config, CHANNELS_KEY, None) or {}), **changed})


def resize_to_recorded(network: nn.Module, config: PretrainedConfig, where: str) -> None:
    """Resize a freshly built ``network`` in place to the sizes that ``config`` records, before its weights are loaded.

    Raises `ModelError` for layers or sizes that the network cannot have.
    """
    recorded = getattr(config, CHANNELS_KEY, None) or {}
    # The config may have been edited, so everything is checked.
    if not isinstance(recorded, Mapping):
        raise _wrong("is no table of layers", where)
    layers = dict(network.named_modules())
    for name, sizes in recorded.items():
        size_names = _names(layers[name]) if name in layers else ()
        if not size_names:
            raise _wrong(f"names the layer {name!r}, which this network lacks or which has no channels", where)
        built_sizes = _sizes(layers[name])
        if not isinstance(sizes, Mapping) or set(sizes) != set(size_names):
            raise _wrong(f"gives {name} other sizes than {', '.join(size_names)}", where)
        for size, value in sizes.items():
            # Pruning only shrinks: a size must lie between 1 and the size in the full network.
            if type(value) is not int or not 1 <= value <= built_sizes[size]:
                raise _wrong(f"gives {name} {size} {value!r}, of {built_sizes[size]} at most", where)
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
    # Values are loaded afterwards; only shapes matter.
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(layer, name, None)
        if tensor is not None:
            empty = tensor.new_zeros(shape if name == "weight" else shape[:1])
            setattr(layer, name, nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty)
