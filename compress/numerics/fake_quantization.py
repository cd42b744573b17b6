"""Quantization-aware training: values rounded to a quantized graph's grid, with straight-through gradients.

It includes weights of fixed integers, ``W = q s``, which are differentiable in the scales ``s`` only.

A layer computes ``(sum of q_x q_w) (s_x s_w) + b``, as ONNX Runtime's integer kernels do, with integers ``q_x``
minus their zero point and ``q_w``, which are floats of integral value here. Their sums are exact below 2^24, so
that training sees the same values as the exported graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_SMALLEST_RANGE = 1e-30
"""Range below which a step would be no normal float32, so that everything is 0."""


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Round to integers, halves to even; gradients pass unchanged."""
    return straight_through(values, torch.round)


def straight_through(values: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return ``rounding(values)`` with gradients as if they were not rounded (Bengio et al. 2013, section 4)."""
    result: torch.Tensor = _StraightThrough.apply(values, rounding)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, values: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return rounding(values)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def nearest_on_grid(steps: torch.Tensor, zero_point: int, lowest: int, highest: int) -> torch.Tensor:
    """Return the integers from ``lowest`` to ``highest``, minus ``zero_point``, nearest to ``steps``: clamp, round.

    Args:
        steps: Values divided by the scale.
        zero_point: Integer that represents 0.
        lowest: Smallest integer.
        highest: Largest integer.
    """
    return rounded(steps.clamp(lowest - zero_point, highest - zero_point))


def on_grid(values: torch.Tensor, scale: torch.Tensor, zero_point: int, lowest: int, highest: int) -> torch.Tensor:
    """Return the integers, minus ``zero_point``, that `QuantizeLinear` yields for ``values``.

    Together with the multiplication by ``scale`` that follows, gradients are those of LSQ (Esser et al. 2020, equation
    3): inside the grid dL/dx passes, outside it is 0; dL/ds uses q - x/s inside, and the end of the grid outside.

    Args:
        values: Values to quantize.
        scale: Distance of two levels.
        zero_point: Integer that represents 0.
        lowest: Smallest integer.
        highest: Largest integer.
    """
    return nearest_on_grid(values / scale, zero_point, lowest, highest)


def row_scales(weight: torch.Tensor, highest: int) -> torch.Tensor:
    """Return the scale of each output channel of a weight [outputs, ...]: its largest magnitude over ``highest``."""
    largest = weight.detach().flatten(1).abs().amax(dim=1)
    return (largest / highest).clamp(min=torch.finfo(torch.float32).tiny)


def best_row_scales(weight: torch.Tensor, highest: int, steps: int = 80) -> torch.Tensor:
    """Return the scale of each output channel with the least squared error, among shares of the full-range scale."""
    full = row_scales(weight, highest)
    rows = weight.detach().flatten(1)
    best, least = full.clone(), torch.full_like(full, torch.inf)
    # Shares go down to a fifth of the full range.
    for step in range(steps):
        scale = full * (1 - step / (1.25 * steps))
        q = (rows / scale[:, None]).round().clamp(-highest - 1, highest)
        error = (q * scale[:, None] - rows).square().sum(dim=1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def unsigned_grid(low: float, high: float) -> tuple[float, int]:
    """Return scale and zero point of 8-bit activations from ``low`` to ``high``, with 0 on the grid.

    A range of 0 has the scale 1. Raises `ValueError` for a range that is not finite.
    """
    # The grid must contain 0, which padding and ReLU produce.
    low, high = min(low, 0.0), max(high, 0.0)
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise ValueError(f"activations from {low} to {high}")
    if high - low < _SMALLEST_RANGE:
        return 1.0, 0
    scale = (high - low) / 255
    return scale, max(0, min(255, round(-low / scale)))


_PIECE_ELEMENTS = 1 << 22
"""Elements of a matrix that are dequantized at a time, so that they stay in the processor's cache."""


def dequantize(integers: torch.Tensor, scales: torch.Tensor, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight ``q s`` [rows, columns] in ``dtype`` for integers [rows, columns] and scales [rows, groups].

    Differentiable in the scales: dL/ds sums dL/dW q over the columns of a group, the last of which may be shorter. If
    the integers are floats that are trained, they are differentiable too: dL/dq is dL/dW s. The backward pass stores
    the integers and no other floats of their size.

    Args:
        integers: Integers minus zero points [rows, columns].
        scales: Scales [rows, groups].
        group_size: Columns that share a scale.
        dtype: Type of the result.
    """
    result: torch.Tensor = _Dequantize.apply(integers, scales, group_size, dtype)  # type: ignore[no-untyped-call]
    return result


def stored_as(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``values`` rounded to a file's ``dtype``; gradients pass as if they were not rounded."""
    return straight_through(values, lambda exact: exact.to(dtype).to(exact.dtype))


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, integers: torch.Tensor, scales: torch.Tensor, group_size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Compute the weight in pieces of rows.

        Args:
            ctx: Context for the backward pass.
            integers: Integers minus zero points [rows, columns].
            scales: Scales [rows, groups].
            group_size: Columns that share a scale.
            dtype: Type of the result.
        """
        ctx.save_for_backward(integers, scales)
        ctx.group_size = group_size
        # Work in pieces of rows, so that no second matrix in the scales' type is needed.
        rows = max(1, _PIECE_ELEMENTS // integers.shape[1])
        if len(integers) <= rows:
            return _product(integers, scales, group_size).to(dtype)
        weight = torch.empty(integers.shape, dtype=dtype, device=integers.device)
        for start in range(0, len(integers), rows):
            piece = slice(start, start + rows)
            weight[piece] = _product(integers[piece], scales[piece], group_size)
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None, None]:
        integers, scales = ctx.saved_tensors
        rows = max(1, _PIECE_ELEMENTS // integers.shape[1])
        pieces = [slice(start, start + rows) for start in range(0, len(integers), rows)]
        # Recompute integer products piece by piece in place of keeping them.
        sums: list[torch.Tensor] = []
        for piece in pieces:
            product = integers[piece].to(scales.dtype, copy=True).mul_(gradient[piece])
            missing = -product.shape[1] % ctx.group_size
            # Pad the last group with zeros.
            if missing:
                product = torch.nn.functional.pad(product, (0, missing))
            sums.append(product.view(len(product), -1, ctx.group_size).sum(-1))
        by_integers = None
        if ctx.needs_input_grad[0]:
            by_integers = torch.cat([_product(gradient[piece], scales[piece], ctx.group_size) for piece in pieces])
        return by_integers, torch.cat(sums), None, None


def _product(integers: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    columns, copied = integers.shape[1], integers.to(scales.dtype, copy=True)
    if columns % group_size == 0:
        return copied.view(len(integers), -1, group_size).mul_(scales[..., None]).flatten(1)
    return copied.mul_(scales.repeat_interleave(group_size, 1)[:, :columns])
