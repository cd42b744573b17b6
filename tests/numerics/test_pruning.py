"""Schedules, masks and importance against closed forms, torch's own pruning and autograd on explicit gates."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from compress.numerics.pruning import (
    channel_products,
    cubic_sparsity,
    magnitude_masks,
    most_important,
    taylor_importance,
)
from compress.numerics.sparse_pattern import Pattern


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
def test_masks_of_each_layer_are_those_of_torch(sparsity: float):
    for weight, mask in zip(weights(), magnitude_masks(weights(), sparsity, "layer"), strict=True):
        layer = nn.Linear(1, 1)
        layer.weight = nn.Parameter(weight)
        torch_prune.l1_unstructured(layer, "weight", amount=int(sparsity * weight.numel()))
        assert torch.equal(mask, layer.weight_mask.bool())


def test_global_masks_are_those_of_torch():
    layers = [nn.Linear(1, 1), nn.Linear(1, 1)]
    for layer, weight in zip(layers, weights(), strict=True):
        layer.weight = nn.Parameter(weight)
    count = int(0.4 * sum(weight.numel() for weight in weights()))
    torch_prune.global_unstructured(
        [(layer, "weight") for layer in layers], pruning_method=torch_prune.L1Unstructured, amount=count
    )
    masks = magnitude_masks(weights(), 0.4, "global")
    for layer, mask in zip(layers, masks, strict=True):
        assert torch.equal(mask, layer.weight_mask.bool())
    # The second tensor's weights are larger, so the first loses more than its share.
    assert (~masks[0]).float().mean() > 0.4 > (~masks[1]).float().mean()


def test_ties_fall_in_the_order_of_position():
    masks = magnitude_masks([torch.tensor([[1.0, -1.0], [1.0, 1.0]])], 0.5, "layer")
    assert masks[0].tolist() == [[False, False], [True, True]]
    first, second = magnitude_masks([torch.ones(3), -torch.ones(3)], 0.5, "global")
    assert first.tolist() == [False] * 3 and second.tolist() == [True] * 3


def test_the_share_that_is_dropped_is_rounded_down():
    (mask,) = magnitude_masks([torch.tensor([3.0, 1.0, 2.0])], 0.6, "layer")
    assert mask.tolist() == [True, False, True]


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


def test_importance_of_hand_worked_neurons():
    activation = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    gradient = torch.tensor([[[1.0, 1.0], [-1.0, 9.0]], [[0.5, -3.0], [0.5, 1.0]]])
    # First example: |1 - 3| and |2 + 0|; second: |0.5 + 0.5| and |-3 + 1|.
    assert taylor_importance(activation, gradient, 1).tolist() == [3.0, 4.0]


def test_the_most_important_come_in_ascending_order_and_ties_fall_to_the_lower_index():
    assert most_important(torch.tensor([0.1, 5.0, 0.3, 2.0]), 2).tolist() == [1, 3]
    assert most_important(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3).tolist() == [0, 1, 2]


def test_importance_of_channels_is_the_gradient_of_their_gates():
    # A channel that two layers read, a convolution and a linear layer on the pooled map, under one gate.
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
    """N:M along the inputs, one group after another."""
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
    final = magnitude_masks(weights, 1 - kept / of, "layer", pattern)
    for mask, weight in zip(final, weights, strict=True):
        assert torch.equal(mask, by_hand(weight, kept, of))
    # Half way there, as many are zero as asked for, all of them among those that must go, and the smallest of these.
    half = magnitude_masks(weights, 0.2, "layer", pattern)
    for mask, last, weight in zip(half, final, weights, strict=True):
        assert int((~mask).sum()) == int(0.2 * weight.numel()) and not (~mask & last).any()
        assert weight[~mask].abs().max() <= weight[mask & ~last].abs().min()


@pytest.mark.parametrize(("rows", "columns"), [(4, 1), (2, 3), (1, 12)])
def test_whole_blocks_go_the_least_first(rows: int, columns: int):
    weight = torch.randn(8, 12, 2, 1, generator=torch.Generator().manual_seed(rows))
    (mask,) = magnitude_masks([weight], 0.4, "layer", Pattern(rows, columns, blocks=True))
    norms = []
    for index in range(2):
        for top in range(0, 8, rows):
            for left in range(0, 12, columns):
                block = (slice(top, top + rows), slice(left, left + columns), index, 0)
                assert mask[block].all() or not mask[block].any()
                norms.append((float(weight[block].square().sum()), bool(mask[block].all())))
    norms.sort()
    gone = int(0.4 * len(norms))
    assert [stays for _, stays in norms] == [False] * gone + [True] * (len(norms) - gone)
