"""Schedules, masks and importance against closed forms, torch's own pruning and autograd on explicit gates."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from compress.numerics.pruning import cubic_sparsity, magnitude_masks, most_important, taylor_importance


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
