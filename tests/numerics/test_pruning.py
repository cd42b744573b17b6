"""Tests of pruning scores, removal of parts and solvers of sparse layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from compress.numerics.gptq import output_error
from compress.numerics.pruning import (
    channel_products,
    cubic_sparsity,
    magnitude_masks,
    most_important,
    remove_parts,
    sparsegpt,
    taylor_importance,
    wanda,
)
from compress.numerics.sparsity_pattern import Pattern


@pytest.mark.parametrize(
    ("step", "expected"),
    # s_t = s_f + (0 - s_f) (1 - t / n)^3 with s_f = 0.8, n = 8 (Zhu and Gupta 2017, equation 1).
    [(0, 0.0), (2, 0.8 * (1 - 27 / 64)), (4, 0.8 * 7 / 8), (6, 0.8 * 63 / 64), (8, 0.8), (9, 0.8), (-1, 0.0)],
)
def test_sparsity_rises_along_the_cubic(step: int, expected: float):
    assert cubic_sparsity(step, 8, 0.8) == pytest.approx(expected, abs=1e-12)


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(7, 9, generator=generator), 3 * torch.randn(4, 5, generator=generator)]


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
def test_masks_of_each_layer_equal_torch(sparsity: float):
    for weight, mask in zip(weights(), magnitude_masks(weights(), sparsity), strict=True):
        layer = nn.Linear(1, 1)
        layer.weight = nn.Parameter(weight)
        torch_prune.l1_unstructured(layer, "weight", amount=int(sparsity * weight.numel()))
        assert torch.equal(mask, layer.weight_mask.bool())


def test_ties_are_pruned_in_order_of_position():
    masks = magnitude_masks([torch.tensor([[1.0, -1.0], [1.0, 1.0]])], 0.5)
    assert masks[0].tolist() == [[False, False], [True, True]]


def test_importance_of_heads_is_the_gradient_of_their_gates():
    batch, length, heads, size = 4, 3, 2, 5
    generator = torch.Generator().manual_seed(1)
    activation = torch.randn(batch, length, heads * size, generator=generator, requires_grad=True)
    target = torch.randn(batch, length, 6, generator=generator)
    matrix = torch.randn(heads * size, 6, generator=generator)

    def loss(gated: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return ((gated @ matrix).tanh() - wanted).square().sum()

    (gradient,) = torch.autograd.grad(loss(activation, target), activation)
    expected = torch.zeros(heads)
    for row in range(batch):
        gates = torch.ones(heads, requires_grad=True)
        gated = activation.detach()[row] * gates.repeat_interleave(size)
        (gate_gradient,) = torch.autograd.grad(loss(gated, target[row]), gates)
        expected += gate_gradient.abs()
    torch.testing.assert_close(taylor_importance(activation.detach(), gradient, size), expected)


def test_top_indices_are_ascending_and_ties_prefer_lower_index():
    assert most_important(torch.tensor([0.1, 5.0, 0.3, 2.0]), 2).tolist() == [1, 3]
    assert most_important(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3).tolist() == [0, 1, 2]


def test_importance_of_channels_is_the_gradient_of_their_gates():
    # One gate for a channel read by two layers, a convolution and a linear layer on the pooled map.
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(3, 4, 5, 5, generator=generator)
    convolution, linear = nn.Conv2d(4, 6, 3), nn.Linear(4, 6)

    def loss(read: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        return (convolution(read).mean((2, 3)).tanh() * linear(pooled)).sum()

    inputs = images.clone().requires_grad_(), images.mean((2, 3)).requires_grad_()
    gradients = torch.autograd.grad(loss(*inputs), inputs)
    products = [channel_products(item.detach(), two, 1) for item, two in zip(inputs, gradients, strict=True)]
    for row in range(3):
        gates = torch.ones(4, requires_grad=True)
        gated = images[row : row + 1] * gates.view(1, 4, 1, 1)
        (expected,) = torch.autograd.grad(loss(gated, gated.mean((2, 3))), gates)
        torch.testing.assert_close((products[0] + products[1])[row], expected)


def by_hand(weight: torch.Tensor, kept: int, of: int) -> torch.Tensor:
    """Return the N:M mask along the inputs, one group at a time."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    flat = weight.flatten(2) if weight.ndim > 2 else weight[..., None]
    for out in range(flat.shape[0]):
        for start in range(0, flat.shape[1], of):
            for position in range(flat.shape[2]):
                group = flat[out, start : start + of, position].abs()
                for index in sorted(range(of), key=lambda i: (-float(group[i]), i))[:kept]:
                    mask.view_as(flat)[out, start + index, position] = True
    return mask


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (2, 3), (3, 6)])
def test_n_of_every_m_inputs_are_kept(kept: int, of: int):
    generator = torch.Generator().manual_seed(kept)
    weights = [torch.randn(5, 12, generator=generator), torch.randn(4, 12, 3, 2, generator=generator)]
    pattern = Pattern.read(f"{kept}:{of}")
    final = magnitude_masks(weights, 1 - kept / of, pattern)
    for mask, weight in zip(final, weights, strict=True):
        assert torch.equal(mask, by_hand(weight, kept, of))
    # At partial sparsity exactly the requested count is zero: the smallest weights among those the pattern removes.
    half = magnitude_masks(weights, 0.2, pattern)
    for mask, last, weight in zip(half, final, weights, strict=True):
        assert int((~mask).sum()) == int(0.2 * weight.numel()) and not (~mask & last).any()
        assert weight[~mask].abs().max() <= weight[mask & ~last].abs().min()


TINY = 1e-7


def inputs_of(columns: int, seed: int = 0) -> torch.Tensor:
    """Return correlated inputs [n, columns]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    return torch.randn(6 * columns, columns, generator=generator) @ mixed * torch.linspace(0.3, 3, columns)


def weight_of(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def left_out(inputs: torch.Tensor, weight: torch.Tensor, columns: list[int]) -> tuple[torch.Tensor, float]:
    """Return the best weight [rows, columns] on these inputs alone by least squares, and its remaining error."""
    some, expected = inputs.double()[:, columns], inputs.double() @ weight.double().T
    best = torch.linalg.lstsq(some, expected).solution
    return best.T.float(), float((some @ best - expected).square().sum())


def of_parts(parts: list[int], size: int) -> list[int]:
    return [part * size + index for part in parts for index in range(size)]


@pytest.mark.parametrize(("size", "count"), [(1, 7), (4, 3)])
def test_removed_parts_match_brute_force_and_least_squares(size: int, count: int) -> None:
    parts = 12 // size if size > 1 else 12
    inputs, weight = inputs_of(parts * size), weight_of(5, parts * size)
    left = list(range(parts))
    while len(left) > count:
        trials = {
            part: left_out(inputs, weight, of_parts([other for other in left if other != part], size))[1]
            for part in left
        }
        left.remove(min(trials, key=trials.__getitem__))
    stays, fitted = remove_parts(weight, inputs.T @ inputs / len(inputs), size, count, TINY)
    assert stays.tolist() == left
    columns = of_parts(left, size)
    torch.testing.assert_close(fitted[:, columns], left_out(inputs, weight, columns)[0], atol=1e-3, rtol=1e-3)
    gone = [column for column in range(parts * size) if column not in columns]
    assert not fitted[:, gone].any()


def test_redundant_parts_are_removed_without_loss() -> None:
    inputs, weight = inputs_of(10), weight_of(4, 10)
    inputs[:, 3] = inputs[:, 7] - 2 * inputs[:, 1]
    hessian = inputs.T @ inputs
    stays, fitted = remove_parts(weight, hessian, 1, 9, TINY)
    assert len({1, 3, 7} & set(stays.tolist())) == 2
    assert output_error(weight, fitted, hessian) < 1e-6


def test_inputs_that_were_always_zero_go_first() -> None:
    inputs, weight = inputs_of(10), weight_of(4, 10)
    inputs[:, [2, 5]] = 0
    weight[:, [2, 5]] = 100.0
    stays, fitted = remove_parts(weight, inputs.T @ inputs, 1, 8)
    assert stays.tolist() == [0, 1, 3, 4, 6, 7, 8, 9]
    torch.testing.assert_close(fitted[:, stays], weight[:, stays])


def test_batched_removal_is_close_to_one_by_one_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weight = inputs_of(120), weight_of(20, 120)
    hessian = inputs.T @ inputs / len(inputs)
    one_by_one = output_error(weight, remove_parts(weight, hessian, 1, 60)[1], hessian)
    monkeypatch.setattr("compress.numerics.pruning._ROUNDS", 15)
    several = output_error(weight, remove_parts(weight, hessian, 1, 60)[1], hessian)
    largest = hessian.diagonal().argsort()[60:].sort().values
    fitted = torch.zeros_like(weight)
    fitted[:, largest] = left_out(inputs, weight, largest.tolist())[0]
    assert one_by_one < several < 1.03 * one_by_one
    assert several < output_error(weight, fitted, hessian)


@pytest.mark.parametrize("broken", ["weight", "hessian", "zero"])
def test_unsolvable_layers_are_reported(broken: str) -> None:
    inputs, weight = inputs_of(6), weight_of(3, 6)
    hessian = inputs.T @ inputs * (broken != "zero")
    if broken != "zero":
        {"weight": weight, "hessian": hessian}[broken][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite|zero"):
        remove_parts(weight, hessian, 1, 3)


TWO_OF_FOUR = Pattern.read("2:4")


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight [rows, columns], and X^T X / n of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixed * torch.linspace(0.3, 3, columns)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / len(inputs)


def authors_sparsegpt(
    weight: torch.Tensor, hessian: torch.Tensor, sparsity: float, prune: tuple[int, int] | None
) -> torch.Tensor:
    """Run `SparseGPT.fasterprune` of the authors' repository in float64, with an exact count as threshold."""
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
def test_sparsegpt_equals_the_authors_code(sparsity: float, prune: tuple[int, int] | None) -> None:
    weight, hessian = problem(24, 300)
    actual = sparsegpt(weight, hessian, sparsity, TWO_OF_FOUR if prune else None)
    torch.testing.assert_close(actual, authors_sparsegpt(weight, hessian, sparsity, prune), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("pattern", [None, TWO_OF_FOUR])
def test_wanda_removes_what_brute_force_removes(pattern: Pattern | None) -> None:
    # For independent inputs the error of a row is the sum of the squared scores of its removed weights.
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


def test_patterns_and_sparsity_are_exact() -> None:
    weight, hessian = problem(16, 260)
    for solve in (wanda, sparsegpt):
        assert bool(((solve(weight, hessian, 0.5, TWO_OF_FOUR) != 0).view(16, -1, 4).sum(-1) == 2).all())
    assert bool(((wanda(weight, hessian, 0.3) == 0).sum(1) == 78).all())
    # Two whole blocks of columns and one of four.
    assert int((sparsegpt(weight, hessian, 0.3) == 0).sum()) == 2 * int(0.3 * 16 * 128) + int(0.3 * 16 * 4)


def test_weights_of_always_zero_inputs_are_removed_first() -> None:
    weight, hessian = problem(8, 64)
    hessian[5], hessian[:, 5] = 0, 0
    actual = sparsegpt(weight, hessian, 0.25)
    assert bool((actual[:, 5] == 0).all()) and bool(torch.isfinite(actual).all())
    with pytest.raises(ValueError, match="not finite"):
        wanda(weight, hessian + torch.nan, 0.5)
