"""A model whose linear layers and convolutions compute through integers, while it learns and as it ships."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.formats.onnx.int8.from_qat import ActivationGrid, IntegerLayer
from compress.formats.onnx.int8.layer_matching import UNLIMITED, Grids
from compress.numerics.fake_quantization import (
    best_row_scales,
    nearest_on_grid,
    on_grid,
    rounded,
    row_scales,
    unsigned_grid,
)
from compress.numerics.int8_activations import Histogram, find_range
from compress.utils.errors import StageError

_LEVELS = 255
_SMALLEST_LINEAR = 1024
"""Weights. Smaller layers, such as a classifier of few classes, gain nothing from integers."""
_NARROW = 64
"""Two products of 255 and so much fit in 16 bits."""
_LARGEST_BIAS = 2.0**22
"""In steps of a convolution's sums: beyond, float32 sums of whole numbers would not be exact."""
_BELOW = 1 - 2.0**-22
"""The grid ends within its limits in float32 too, so that the runtime sees that a `Clip` cuts nothing."""
_TINY = torch.finfo(torch.float32).tiny
Quantizable = nn.Linear | nn.Conv1d | nn.Conv2d


class LearnedGrid(nn.Module):
    """Steps of 8-bit activations: first it watches values, then it rounds them, its scale learned and zero point fixed.

    Values outside ``limits`` will be cut by what follows, so the grid leaves them out.
    """

    def __init__(self, limits: tuple[float, float] = UNLIMITED) -> None:
        super().__init__()
        self.limits = limits
        self.seen: Histogram | None = Histogram()
        self.change = nn.Parameter(torch.zeros(()))
        """Of the logarithm of the scale: a step of the optimizer is a share of the scale, however small that is."""
        self.first, self.zero_point = 1.0, 0

    def watch(self, values: torch.Tensor) -> None:
        """Count ``values``. Raises `StageError` where they are not finite."""
        assert self.seen is not None, "not started"
        array = values.detach().float().clamp(*self.limits).cpu().numpy()
        if not np.isfinite(array).all():
            raise StageError(
                "Activations hold NaN or infinite values on the training data.",
                expected="finite ones; 8 bits cannot cover infinity",
                hint="look at the model's weights and at the images' preparation",
            )
        self.seen.add(array)

    def start(self) -> bool:
        """Round from now on, at first with the least squared error; whether the values differed at all."""
        assert self.seen is not None, "started once"
        differed = not self.seen.constant
        self.first, self.zero_point = unsigned_grid(*find_range(self.seen, "mse"))
        self.seen = None
        return differed

    def scale(self) -> torch.Tensor:
        """Positive, a number."""
        return (self.first * self.change.exp()).clamp(max=self.limits[1] * _BELOW / _LEVELS)

    def integers(self, values: torch.Tensor) -> torch.Tensor:
        """Return the output of `QuantizeLinear`, minus the zero point."""
        return on_grid(values, self.scale(), self.zero_point, 0, _LEVELS)

    def nearest(self, steps: torch.Tensor) -> torch.Tensor:
        """Values that are counted in the grid's steps already, rounded."""
        return nearest_on_grid(steps, self.zero_point, 0, _LEVELS)

    def shipped(self) -> ActivationGrid:
        """Return the learned grid."""
        return ActivationGrid(np.float32(self.scale().item()), self.zero_point)


class QuantizedLayer(nn.Module):
    """A linear layer or convolution of 8-bit inputs on the grid ``given`` and weights of 8 or 4 bits.

    8-bit weights have their scale from the largest of an output channel, as long as it learns; 4-bit ones learn it
    (LSQ, Esser et al. 2020, from the scale of least squared error). A convolution gives values on the grid ``made``.
    """

    first: torch.Tensor

    def __init__(
        self, layer: Quantizable, bits: int, highest: int, given: LearnedGrid, made: LearnedGrid | None
    ) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.bits, self.highest = bits, highest
        self.lowest = -self.highest if bits == 8 else -self.highest - 1
        self.given, self.made = given, made
        self.register_buffer("first", best_row_scales(self.weight, self.highest), persistent=False)
        self.change = None if bits == 8 else nn.Parameter(torch.zeros(len(self.weight)))
        self.product = _product(layer)
        self.plain = (layer,)
        """In a tuple, so that its weights are not counted twice."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, equal to the exported graph's bit for bit."""
        if self.given.seen is not None:
            return self._watched(values)
        with torch.autocast(values.device.type, enabled=False):
            scales = self.weight_scales()
            steps = self.given.scale() * scales
            # Sums of whole numbers, exact below 2^24 in any order; the scales come after, as in an integer kernel.
            sums = self.product(self.given.integers(values.float()), self._integers(scales))
            if self.made is None:
                out = sums * self._along(steps, sums)
                return out if self.bias is None else out + self._along(self.bias, out)
            if self.bias is not None:
                sums = sums + self._along(rounded(self.bias / steps), sums)
            scale = self.made.scale()
            return self.made.nearest(sums * self._along(steps / scale, sums)) * scale

    def __getattr__(self, name: str) -> Any:
        """Architectures ask a layer for its stride, say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "plain" not in self.__dict__:
                raise
            return getattr(self.__dict__["plain"][0], name)

    def weight_scales(self) -> torch.Tensor:
        """Return the scales [outputs], positive."""
        if self.change is None:
            scales = row_scales(self.weight, self.highest)
        else:
            scales = (self.first * self.change.exp()).clamp(min=_TINY)
        if self.made is None or self.bias is None:
            return scales
        least = self.bias.detach().abs() / (self.given.scale().detach() * _LARGEST_BIAS)
        return torch.maximum(scales, least)

    @torch.no_grad()
    def shipped(self, name: str) -> IntegerLayer:
        """Return the learned layer as integers and scales."""
        scales = self.weight_scales()
        return IntegerLayer(
            name,
            self.bits,
            self._integers(scales).to(torch.int8).cpu().numpy(),
            scales.cpu().numpy(),
            None if self.bias is None else self.bias.detach().cpu().numpy(),
            self.given.shipped(),
            None if self.made is None else self.made.shipped(),
        )

    def _watched(self, values: torch.Tensor) -> torch.Tensor:
        self.given.watch(values)
        out: torch.Tensor = self.product(values, self.weight)
        out = out if self.bias is None else out + self._along(self.bias, out)
        if self.made is not None and self.made.seen is not None:
            self.made.watch(out)
        return out

    def _integers(self, scales: torch.Tensor) -> torch.Tensor:
        shaped = scales.reshape(-1, *[1] * (self.weight.ndim - 1))
        return on_grid(self.weight, shaped, 0, self.lowest, self.highest)

    def _along(self, vector: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """``vector`` [outputs] where ``out`` has its outputs."""
        return vector if self.weight.ndim == 2 else vector.reshape(-1, *[1] * (self.weight.ndim - 2))


def quantizable(module: nn.Module) -> tuple[dict[str, Quantizable], dict[str, str]]:
    """Return the layers that can compute through integers by name, and the others with the reason."""
    layers_by_name: dict[str, Quantizable] = {}
    reasons: dict[str, str] = {}
    # Parameters that several modules hold.
    owners = Counter(id(parameter) for part in module.modules() for parameter in part.parameters(recurse=False))
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            continue
        if isinstance(layer, nn.Linear) and layer.weight.numel() < _SMALLEST_LINEAR:
            reasons[name] = f"has fewer than {_SMALLEST_LINEAR} weights"
        elif owners[id(layer.weight)] > 1:
            reasons[name] = "shares its weights with another module"
        elif getattr(layer, "padding_mode", "zeros") != "zeros":
            reasons[name] = "is not padded with zeros"
        else:
            layers_by_name[name] = layer
    return layers_by_name, reasons


def put_in(
    module: nn.Module, layers: Mapping[str, Quantizable], bits: int, grids: Grids, narrow: bool = False
) -> dict[str, QuantizedLayer]:
    """Replace ``layers`` of ``module``, in place; name -> what took its place. Grids of one name are one.

    With ``narrow`` no product of theirs saturates in 16 bits: 8-bit weights have 7, but for depthwise convolutions.
    """
    names = {*grids.inputs.values(), *grids.outputs.values()}
    learned = {name: LearnedGrid(grids.limits.get(name, UNLIMITED)) for name in sorted(names)}
    quantized_layers = {}
    for name, layer in layers.items():
        output_grid = learned[grids.outputs[name]] if name in grids.outputs else None
        # ONNX Runtime sums depthwise convolutions in 32 bits on every processor.
        is_depthwise = not isinstance(layer, nn.Linear) and layer.groups == layer.in_channels == layer.out_channels
        highest = _NARROW if narrow and bits == 8 and not is_depthwise else 2 ** (bits - 1) - 1
        quantized_layers[name] = QuantizedLayer(layer, bits, highest, learned[grids.inputs[name]], output_grid)
        _replace(module, name, quantized_layers[name])
    return quantized_layers


def start(layers: Mapping[str, QuantizedLayer]) -> list[str]:
    """Compute through integers from now on; the layers whose inputs were the same everywhere."""
    constant = []
    for name, layer in layers.items():
        if layer.given.seen is not None and not layer.given.start():
            constant.append(name)
        if layer.made is not None and layer.made.seen is not None:
            layer.made.start()
    return constant


def take_out(module: nn.Module, layers: Mapping[str, QuantizedLayer]) -> dict[str, IntegerLayer]:
    """Put the plain layers back, in place, with the weights that the integers stand for; returns these."""
    shipped = {name: layer.shipped(name) for name, layer in layers.items()}
    for name, layer in layers.items():
        plain = layer.plain[0]
        plain.weight.data = torch.from_numpy(shipped[name].weight).to(plain.weight.device)
        _replace(module, name, plain)
    return shipped


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Wherever the same layer stands."""
    old = module.get_submodule(name)
    for parent in list(module.modules()):
        for child_name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, child_name, layer)


def _product(layer: Quantizable) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the function of inputs and weights that computes the layer without its bias."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear
    shape = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    return partial(nn.functional.conv1d if isinstance(layer, nn.Conv1d) else nn.functional.conv2d, **shape)
