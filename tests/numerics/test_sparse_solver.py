"""Wanda and SparseGPT against their authors' updates, written out, and against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from compress.numerics.gptq import output_energy
from compress.numerics.sparse_pattern import Pattern
from compress.numerics.sparse_solver import sparsegpt, wanda

TWO_OF_FOUR = Pattern.read("2:4")


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, columns], and X^T X / n of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixed * torch.linspace(0.3, 3, columns)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / len(inputs)


def authors_sparsegpt(
    weight: torch.Tensor, hessian: torch.Tensor, sparsity: float, prune: tuple[int, int] | None
) -> torch.Tensor:
    """`SparseGPT.fasterprune` of the authors' repository, in double precision, its threshold an exact count."""
    w, h = weight.double().clone(), hessian.double().clone()
    columns = w.shape[1]
    h.diagonal().add_(0.01 * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for first in range(0, columns, 128):
        last = min(first + 128, columns)
        part, block_columns = w[:, first:last].clone(), inverse[first:last, first:last]
        remaining, errors = torch.zeros_like(part), torch.zeros_like(part)
        mask = torch.zeros_like(part, dtype=torch.bool)
        if prune is None:
            scores = part**2 / block_columns.diagonal() ** 2
            mask = scores < scores.flatten().sort()[0][int(scores.numel() * sparsity)]
        for i in range(last - first):
            if prune is not None and i % prune[1] == 0:
                scores = part[:, i : i + prune[1]] ** 2 / block_columns.diagonal()[i : i + prune[1]] ** 2
                mask.scatter_(1, i + torch.topk(scores, prune[0], dim=1, largest=False)[1], True)
            remaining[:, i] = part[:, i].masked_fill(mask[:, i], 0)
            errors[:, i] = (part[:, i] - remaining[:, i]) / block_columns[i, i]
            part[:, i:] -= errors[:, i : i + 1] @ block_columns[i : i + 1, i:]
        w[:, first:last] = remaining
        w[:, last:] -= errors @ inverse[first:last, last:]
    return w.float()


@pytest.mark.parametrize(("sparsity", "prune"), [(0.5, None), (0.7, None), (0.5, (2, 4))])
def test_sparsegpt_is_its_authors_update(sparsity: float, prune: tuple[int, int] | None) -> None:
    weight, hessian = problem(24, 300)
    actual = sparsegpt(weight, hessian, sparsity, TWO_OF_FOUR if prune else None)
    torch.testing.assert_close(actual, authors_sparsegpt(weight, hessian, sparsity, prune), atol=2e-4, rtol=1e-3)


def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude() -> None:
    weight, hessian = problem(32, 128)
    smallest = weight.abs().argsort(dim=1)[:, :64]
    lost = [
        output_energy(weight - sparse, hessian)
        for sparse in (sparsegpt(weight, hessian, 0.5), wanda(weight, hessian, 0.5), weight.scatter(1, smallest, 0.0))
    ]
    assert lost[0] < 0.9 * lost[1] < 0.8 * lost[2]


@pytest.mark.parametrize("pattern", [None, TWO_OF_FOUR])
def test_wanda_drops_what_brute_force_finds_least(pattern: Pattern | None) -> None:
    # Where inputs are independent, what a row loses is the sum of the squared scores of what goes.
    weight, hessian = problem(3, 8, seed=3)
    hessian = torch.diag(hessian.diagonal())
    actual = wanda(weight, hessian, 0.5, pattern)
    groups = [range(8)] if pattern is None else [range(4), range(4, 8)]
    for row, remaining in zip(weight, actual, strict=True):
        for group in groups:
            losses = {
                some: float(sum(row[at] ** 2 * hessian[at, at] for at in some))
                for some in itertools.combinations(group, len(group) // 2)
            }
            gone = min(losses, key=losses.__getitem__)
            assert [at for at in group if remaining[at] == 0] == list(gone)
            assert all(remaining[at] == row[at] for at in group if at not in gone)


def test_patterns_hold_and_shares_are_exact() -> None:
    weight, hessian = problem(16, 260)
    for solve in (wanda, sparsegpt):
        assert bool(((solve(weight, hessian, 0.5, TWO_OF_FOUR) != 0).view(16, -1, 4).sum(-1) == 2).all())
    assert bool(((wanda(weight, hessian, 0.3) == 0).sum(1) == 78).all())
    # Two whole blocks of columns and one of four.
    assert int((sparsegpt(weight, hessian, 0.3) == 0).sum()) == 2 * int(0.3 * 16 * 128) + int(0.3 * 16 * 4)


def test_inputs_that_are_always_zero_lose_their_weights_without_harm() -> None:
    weight, hessian = problem(8, 64)
    hessian[5], hessian[:, 5] = 0, 0
    actual = sparsegpt(weight, hessian, 0.25)
    assert bool((actual[:, 5] == 0).all()) and bool(torch.isfinite(actual).all())
    with pytest.raises(ValueError, match="not finite"):
        wanda(weight, hessian + torch.nan, 0.5)
