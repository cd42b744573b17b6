"""Contrastive losses, by the formula as the paper writes it, pair by pair."""

from __future__ import annotations

import math

import torch

from compress.numerics.contrastive import supervised_contrastive


def test_supervised_contrastive_is_the_papers_sum() -> None:
    torch.manual_seed(0)
    raw, labels, temperature = torch.randn(5, 3), [0, 1, 0, 0, 2], 0.1
    unit = raw / raw.norm(dim=1, keepdim=True)
    terms = []
    for i, mine in enumerate(labels):
        same = [p for p, other in enumerate(labels) if other == mine and p != i]
        if not same:
            continue
        whole = sum(math.exp(float(unit[i] @ unit[a]) / temperature) for a in range(5) if a != i)
        logs = [math.log(math.exp(float(unit[i] @ unit[p]) / temperature) / whole) for p in same]
        terms.append(-sum(logs) / len(same))
    actual = supervised_contrastive(raw, torch.tensor(labels), temperature)
    assert abs(float(actual) - sum(terms) / len(terms)) < 1e-5


def test_where_no_two_are_alike_there_is_nothing_to_learn() -> None:
    raw = torch.randn(3, 2, requires_grad=True)
    loss = supervised_contrastive(raw, torch.arange(3), 0.1)
    loss.backward()
    assert float(loss.detach()) == 0 and raw.grad is not None and not raw.grad.any()
