"""Products with a stored head, rows of it at a time: no second copy of a model's largest matrix, backwards neither."""

from __future__ import annotations

from typing import Any

import torch

ROWS = 8192
"""Rows of the head that are held in the dtype of the product at a time."""


def head_product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``hidden`` [..., columns] times ``weight`` [rows, columns] transposed, as [..., rows].

    ``weight`` is as it lies on disk, of any float type, and has no gradient. The product is in float32, or in the type
    of an autocast around it.
    """
    found: torch.Tensor = _HeadProduct.apply(hidden, weight)  # type: ignore[no-untyped-call]
    return found


class _HeadProduct(torch.autograd.Function):
    """A plain product would keep the rows that it cast until the way back."""

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(weight)
        product = None
        for start in range(0, len(weight), ROWS):
            rows = weight[start : start + ROWS]
            part = hidden @ rows.float().T
            if product is None:
                product = part.new_empty((*part.shape[:-1], len(weight)))
            product[..., start : start + len(rows)] = part
        assert product is not None
        return product

    @staticmethod
    def backward(context: Any, slope: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = context.saved_tensors
        total = slope.new_zeros((*slope.shape[:-1], weight.shape[1]), dtype=torch.float32)
        for start in range(0, len(weight), ROWS):
            rows = weight[start : start + ROWS]
            total += slope[..., start : start + len(rows)] @ rows.to(slope.dtype)
        return total, None
