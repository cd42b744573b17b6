"""Orthogonal matrices that spread what few columns hold over all of them."""

from __future__ import annotations

import torch


def rotation(size: int, hadamard: bool, generator: torch.Generator) -> torch.Tensor:
    """An orthogonal matrix [size, size] in float64, drawn anew at each call.

    A Hadamard matrix with random signs, all of whose entries are as large (QuaRot, Ashkboos et al. 2024, section 3), as
    far as ``size`` has factors of 2; with the odd rest as a random orthogonal matrix, by their Kronecker product.
    Without ``hadamard`` it is random altogether, uniform over all rotations and reflections.
    """
    odd = size
    while hadamard and odd % 2 == 0:
        odd //= 2
    found = _random(odd, generator)
    for _ in range((size // odd).bit_length() - 1):
        found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5, found)
    signs = torch.randint(0, 2, (size,), generator=generator).double().mul_(2).sub_(1)
    return signs[:, None] * found


def _random(size: int, generator: torch.Generator) -> torch.Tensor:
    """By QR of a Gaussian matrix, with signs that make it uniform (Mezzadri 2007, section 5)."""
    orthogonal, upper = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    found: torch.Tensor = orthogonal * upper.diagonal().sign()
    return found.contiguous()
