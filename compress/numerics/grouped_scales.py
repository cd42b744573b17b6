"""Weights from fixed integers and scales that learn: ``W = q s``, differentiable in ``s`` alone."""

from __future__ import annotations

from typing import Any

import torch

from compress.numerics.fake_quantization import straight_through

_PIECE_ELEMENTS = 1 << 22
"""Large matrices are turned into floats by pieces that stay in the processor's cache."""


def dequantize(integers: torch.Tensor, scales: torch.Tensor, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    """``integers`` [rows, columns] (zero point taken off) times ``scales`` [rows, groups], rounded to ``dtype``.

    Differentiable in the scales: dL/ds sums dL/dW q over the columns of a group, the last of which may be shorter.
    Keeps the integers for the backward pass and no floats.
    """
    result: torch.Tensor = _Dequantize.apply(integers, scales, group_size, dtype)  # type: ignore[no-untyped-call]
    return result


def stored_as(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values`` rounded to what a file of ``dtype`` can hold; the gradient passes as if they were not rounded."""
    return straight_through(values, lambda exact: exact.to(dtype).to(exact.dtype))


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, integers: torch.Tensor, scales: torch.Tensor, group_size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(integers)
        ctx.group_size, ctx.scale_dtype = group_size, scales.dtype
        rows = max(1, _PIECE_ELEMENTS // integers.shape[1])
        if len(integers) <= rows:
            return _product(integers, scales, group_size).to(dtype)
        weight = torch.empty(integers.shape, dtype=dtype)
        for start in range(0, len(integers), rows):
            piece = slice(start, start + rows)
            weight[piece] = _product(integers[piece], scales[piece], group_size)
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
        (integers,) = ctx.saved_tensors
        rows = max(1, _PIECE_ELEMENTS // integers.shape[1])
        sums = [
            _group_sums(gradient[start : start + rows], integers[start : start + rows], ctx.group_size, ctx.scale_dtype)
            for start in range(0, len(integers), rows)
        ]
        return None, torch.cat(sums), None, None


def _product(integers: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    columns = integers.shape[1]
    if columns % group_size == 0:
        return integers.to(scales.dtype).view(len(integers), -1, group_size).mul_(scales[..., None]).flatten(1)
    return integers.to(scales.dtype).mul_(scales.repeat_interleave(group_size, 1)[:, :columns])


def _group_sums(gradient: torch.Tensor, integers: torch.Tensor, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    product = integers.to(dtype).mul_(gradient)
    missing = -product.shape[1] % group_size
    if missing:
        product = torch.nn.functional.pad(product, (0, missing))
    return product.view(len(product), -1, group_size).sum(-1)
