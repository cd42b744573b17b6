"""Random linear layers whose inputs are correlated and of uneven scale, as in real models."""

from __future__ import annotations

import torch


def layer_problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a heavy-tailed weight [rows, columns] and the second moment X^T X / n [columns, columns] of its inputs.

    The inputs have a decaying spectrum and a few channels of large scale.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight = 0.02 * weight * torch.exp(0.5 * torch.randn(rows, columns, generator=generator))
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    spectrum = torch.arange(1, columns + 1).float() ** -0.8
    loudness = torch.exp(0.8 * torch.randn(columns, generator=generator))
    inputs = torch.randn(8 * columns + 8, columns, generator=generator) * spectrum @ mixing
    inputs = (inputs + 0.05 * torch.randn(inputs.shape, generator=generator)) * loudness
    return weight, inputs.T @ inputs / len(inputs)
