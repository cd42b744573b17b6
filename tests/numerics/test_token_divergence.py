"""Divergences of next-token distributions and their slopes, against torch's own formulas and its autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from compress.numerics.language_head import HeadLoss, LanguageHead, head_loss
from compress.numerics.token_divergence import Divergence, divergence_of

TOKENS, WIDTH, VOCABULARY = 11, 6, 17


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def merged(probabilities: torch.Tensor, teacher: torch.Tensor, count: int | None) -> torch.Tensor:
    """The probabilities of the teacher's likeliest tokens, and of all others together, [n, count + 1]."""
    if count is None or count >= VOCABULARY:
        return probabilities
    chosen = teacher.argsort(dim=-1, descending=True)[:, :count]
    remaining = probabilities.gather(-1, chosen)
    return torch.cat([remaining, 1 - remaining.sum(-1, keepdim=True)], dim=-1)


def by_formula(student: torch.Tensor, teacher: torch.Tensor, which: Divergence) -> torch.Tensor:
    mine, theirs = ((logits / which.temperature).softmax(-1) for logits in (student, teacher))
    mine, theirs = (merged(item, teacher, which.top_k) for item in (mine, theirs))
    apart = (
        kl_div(theirs.log(), mine, reduction="none") if which.reverse else kl_div(mine.log(), theirs, reduction="none")
    )
    return apart.sum(-1) * which.temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("top_k", [None, 1, 5, VOCABULARY - 1, VOCABULARY])
def test_values_and_slopes_are_those_of_the_formula(temperature: float, reverse: bool, top_k: int | None) -> None:
    which = Divergence(temperature, reverse, top_k)
    student, teacher = drawn(TOKENS, VOCABULARY, seed=1).requires_grad_(True), drawn(TOKENS, VOCABULARY, seed=2)
    expected = by_formula(student, teacher, which)
    item = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (slope,) = torch.autograd.grad((expected * item).sum(), student)
    values, actual = divergence_of(student.detach(), teacher, which)
    torch.testing.assert_close(values, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(actual * item[:, None], slope, rtol=1e-9, atol=1e-12)


def test_a_rest_of_next_to_nothing_has_finite_slopes() -> None:
    teacher = torch.zeros(1, VOCABULARY)
    teacher[0, 0] = 90.0
    student = drawn(1, VOCABULARY, seed=4).float()
    for reverse in (False, True):
        values, slope = divergence_of(student, teacher, Divergence(1.0, reverse, 3))
        assert torch.isfinite(values).all() and torch.isfinite(slope).all()
        torch.testing.assert_close(slope.sum(-1), torch.zeros(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [3, 100])
def test_the_loss_of_a_head_is_the_sum_over_tokens_of_both_parts(chunk: int) -> None:
    which = Divergence(2.0, False, 4)
    student, teacher = (
        LanguageHead(drawn(TOKENS, WIDTH, seed=s), drawn(VOCABULARY, WIDTH, seed=s + 10)) for s in (5, 6)
    )
    item, labels_each = (torch.rand(TOKENS, generator=torch.Generator().manual_seed(s)).double() for s in (7, 8))
    labels = torch.arange(TOKENS) * 3 % VOCABULARY
    actual = []
    for whole in (False, True):
        mine = LanguageHead(*(tensor.clone().requires_grad_(True) for tensor in student))
        if whole:
            logits = mine.hidden @ mine.weight.T
            apart = by_formula(logits, teacher.hidden @ teacher.weight.T, which)
            loss = (apart * item).sum() + (cross_entropy(logits, labels, reduction="none") * labels_each).sum()
        else:
            loss = head_loss(mine, teacher, HeadLoss(which, item, labels, labels_each), chunk)
        (loss * 3).backward()
        actual.append((loss.detach(), mine.hidden.grad, mine.weight.grad))
    for item, other in zip(*actual, strict=True):
        torch.testing.assert_close(item, other, rtol=1e-9, atol=1e-11)


def test_without_a_teacher_it_is_the_cross_entropy_of_the_text() -> None:
    student = LanguageHead(drawn(TOKENS, WIDTH, seed=5), drawn(VOCABULARY, WIDTH, seed=15))
    labels = torch.arange(TOKENS) % VOCABULARY
    loss = head_loss(student, None, HeadLoss(labels=labels, labels_each=torch.full((TOKENS,), 1 / TOKENS)), 4)
    assert float(loss) == pytest.approx(float(cross_entropy(student.hidden @ student.weight.T, labels)), rel=1e-6)
