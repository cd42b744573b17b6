"""Batch normalisation folded into the layer before it, so that what is trained is what ships."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

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
    watch = _Watch()
    parts = [part for part in module.modules() if isinstance(part, _Norm | _Layer)]
    handles = [
        part.register_forward_pre_hook(watch.reads)
        if isinstance(part, _Norm)
        else part.register_forward_hook(watch.makes)
        for part in parts
    ]
    _run(run, handles)
    return {
        norm: watch.makers[given]
        for norm, given in watch.given.items()
        if given in watch.makers and watch.calls[norm] == 1 == watch.calls[watch.makers[given]] and _fits(norm)
    }


@dataclass
class _Watch:
    makers: dict[int, _Layer] = field(default_factory=dict)
    given: dict[_Norm, int] = field(default_factory=dict)
    calls: dict[nn.Module, int] = field(default_factory=dict)
    held: list[torch.Tensor] = field(default_factory=list)
    """Else an identity might be given to another tensor."""

    def makes(self, layer: Any, arguments: object, output: torch.Tensor) -> None:
        self.held.append(output)
        self.makers[id(output)] = layer
        self.calls[layer] = self.calls.get(layer, 0) + 1

    def reads(self, norm: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        self.given[norm] = id(arguments[0])
        self.calls[norm] = self.calls.get(norm, 0) + 1


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
    return bool(torch.isfinite(_run(run, handles)).all())


def _run(run: Run, handles: list[Any]) -> torch.Tensor:
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()


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
