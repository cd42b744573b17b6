"""Batch normalisation folded into the layer before it, so that what is trained is what ships."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from compress.architectures.watched import given, hooked, made

_Norm = nn.BatchNorm1d | nn.BatchNorm2d
_Layer = nn.Linear | nn.Conv1d | nn.Conv2d
Run = Callable[[], torch.Tensor]


@torch.no_grad()
def fold_batch_norms(module: nn.Module, run: Run) -> int:
    """Fold every normalisation whose input is the output of one layer, and is read by nothing else; how many.

    In place: such a normalisation becomes an `nn.Identity`. ``run`` gives the module's answers on some input; the
    module is in eval mode.
    """
    pairs = _pairs(module, run)
    if not _read_by_nothing_else(pairs, run):
        pairs = {norm: layer for norm, layer in pairs.items() if _read_by_nothing_else({norm: layer}, run)}
    for norm, layer in pairs.items():
        _fold(layer, norm)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if child in pairs:
                setattr(parent, name, nn.Identity())
    return len(pairs)


def _pairs(module: nn.Module, run: Run) -> dict[_Norm, _Layer]:
    """Normalisations and the layers whose outputs they are given; each of both is called once."""
    norms: dict[_Norm, list[torch.Tensor]] = {part: [] for part in module.modules() if isinstance(part, _Norm)}
    layers: dict[_Layer, list[torch.Tensor]] = {part: [] for part in module.modules() if isinstance(part, _Layer)}
    with (
        given({part: part for part in norms}, lambda norm, values: norms[norm].append(values)),
        made({part: part for part in layers}, lambda layer, values: layers[layer].append(values)),
    ):
        run()
    makers = {id(values): layer for layer, outputs in layers.items() for values in outputs}
    found = {norm: makers[id(inputs[0])] for norm, inputs in norms.items() if inputs and id(inputs[0]) in makers}
    return {norm: layer for norm, layer in found.items() if len(norms[norm]) == 1 == len(layers[layer]) and _fits(norm)}


def _read_by_nothing_else(pairs: Mapping[_Norm, _Layer], run: Run) -> bool:
    """Whether answers stay finite where all but the normalisations read NaN in place of what the layers give."""
    true: dict[nn.Module, torch.Tensor] = {}

    def hide(layer: nn.Module, arguments: object, output: torch.Tensor) -> torch.Tensor:
        true[layer] = output
        return torch.full_like(output, torch.nan)

    def show(norm: Any, arguments: object) -> torch.Tensor:
        return true[pairs[norm]]

    handles = [layer.register_forward_hook(hide) for layer in pairs.values()]
    handles += [norm.register_forward_pre_hook(show) for norm in pairs]
    with hooked(handles):
        return bool(torch.isfinite(run()).all())


def _fits(norm: _Norm) -> bool:
    """Whether it has statistics and factors of its own."""
    return norm.running_mean is not None and norm.running_var is not None and norm.affine


def _fold(layer: _Layer, norm: _Norm) -> None:
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    assert norm.running_mean is not None and norm.running_var is not None, "chosen so"
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    learns = layer.weight.requires_grad
    layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics)
    layer.bias.requires_grad_(learns)
