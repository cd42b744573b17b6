"""Tests of distillation losses, and divergences of predictions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from compress.numerics.language_head import (
    Divergence,
    HeadLoss,
    LanguageHead,
    divergence_of,
    head_divergence,
    head_loss,
    token_scores,
)
from compress.numerics.losses import (
    softened_kl,
    supervised_contrastive,
)

BATCH, LENGTH, WIDTH, HEADS = 3, 5, 8, 2


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hidden(seed: int) -> torch.Tensor:
    return random(BATCH, LENGTH, WIDTH, seed=seed)


def scores(seed: int) -> torch.Tensor:
    return random(BATCH, HEADS, LENGTH, LENGTH, seed=seed)


def probabilities(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_softened_kl_is_the_mean_over_the_batch(temperature: float):
    student, teacher = random(4, 3, seed=0), random(4, 3, seed=1)
    expected = 0.0
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p = probabilities([value / temperature for value in theirs])
        q = probabilities([value / temperature for value in mine])
        expected += temperature**2 * divergence(p, q) / 4
    assert softened_kl(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-9)


def test_gradients_keep_their_size_at_high_temperature():
    # Hinton et al., equation 4: for zero-mean logits and T much larger than they are, the gradient of the loss with
    # T^2 is (student - teacher) / classes for each row, divided by the batch size: independent of T.
    student, teacher = random(2, 4, seed=0), random(2, 4, seed=1)
    student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    for temperature in (200.0, 2000.0):
        leaf = student.clone().requires_grad_()
        softened_kl(leaf, teacher, temperature).backward()
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, (student - teacher) / 4 / 2, rtol=0.05, atol=1e-3)


def test_supervised_contrastive_loss_matches_the_paper() -> None:
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


def test_contrastive_loss_without_positive_pairs_is_zero() -> None:
    raw = torch.randn(3, 2, requires_grad=True)
    loss = supervised_contrastive(raw, torch.arange(3), 0.1)
    loss.backward()
    assert float(loss.detach()) == 0 and raw.grad is not None and not raw.grad.any()


TOKENS, HEAD_WIDTH, VOCABULARY = 11, 6, 17


def heads(seed: int = 0) -> tuple[LanguageHead, LanguageHead]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return tuple(LanguageHead(draw(TOKENS, HEAD_WIDTH), draw(VOCABULARY, HEAD_WIDTH)) for _ in range(2))  # type: ignore[return-value]


def on_whole_logits(student: LanguageHead, teacher: LanguageHead) -> torch.Tensor:
    log_student, log_teacher = ((head.hidden @ head.weight.T).log_softmax(-1) for head in (student, teacher))
    return kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_value_and_gradients_equal_those_on_full_logits(chunk: int) -> None:
    student, teacher = heads()
    results = []
    for divergence in (lambda s, t: head_divergence(s, t, chunk), on_whole_logits):
        tensors = LanguageHead(*(tensor.clone().requires_grad_(True) for tensor in student))
        loss = divergence(tensors, teacher) * 3
        loss.backward()
        results.append((loss.detach(), tensors.hidden.grad, tensors.weight.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_a_frozen_head_gets_no_gradient() -> None:
    student, teacher = heads()
    hidden = student.hidden.requires_grad_(True)
    head_divergence(LanguageHead(hidden, student.weight), teacher).backward()
    assert hidden.grad is not None and student.weight.grad is None


def test_bfloat16_products_are_close() -> None:
    student, teacher = heads()
    low = [LanguageHead(*(tensor.bfloat16() for tensor in head)) for head in (student, teacher)]
    assert float(head_divergence(*low)) == pytest.approx(float(on_whole_logits(student, teacher)), rel=0.05)


@pytest.mark.parametrize("chunk", [3, 100])
def test_scores_of_each_token(chunk: int) -> None:
    student, teacher = heads()
    following = torch.arange(TOKENS) % VOCABULARY
    scores = token_scores(student, teacher, following, chunk)
    losses = [cross_entropy(head.hidden @ head.weight.T, following, reduction="none") for head in (student, teacher)]
    torch.testing.assert_close(scores.student_loss, losses[0])
    torch.testing.assert_close(scores.teacher_loss, losses[1])
    torch.testing.assert_close(scores.divergence.mean(), on_whole_logits(student, teacher))
    assert scores.divergence.shape == (TOKENS,)


TOKEN_TOKENS, TOKEN_WIDTH, TOKEN_VOCABULARY = 11, 6, 17


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def merged(probabilities: torch.Tensor, teacher: torch.Tensor, count: int | None) -> torch.Tensor:
    """Return probabilities of the teacher's top tokens, and of all others together, [n, count + 1]."""
    if count is None or count >= TOKEN_VOCABULARY:
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
@pytest.mark.parametrize("top_k", [None, 1, 5, TOKEN_VOCABULARY - 1, TOKEN_VOCABULARY])
def test_values_and_gradients_match_the_formula(temperature: float, reverse: bool, top_k: int | None) -> None:
    which = Divergence(temperature, reverse, top_k)
    student, teacher = (
        drawn(TOKEN_TOKENS, TOKEN_VOCABULARY, seed=1).requires_grad_(True),
        drawn(TOKEN_TOKENS, TOKEN_VOCABULARY, seed=2),
    )
    expected = by_formula(student, teacher, which)
    item = torch.rand(TOKEN_TOKENS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (slope,) = torch.autograd.grad((expected * item).sum(), student)
    values, actual = divergence_of(student.detach(), teacher, which)
    torch.testing.assert_close(values, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(actual * item[:, None], slope, rtol=1e-9, atol=1e-12)


def test_tiny_remaining_probability_has_finite_gradients() -> None:
    teacher = torch.zeros(1, TOKEN_VOCABULARY)
    teacher[0, 0] = 90.0
    student = drawn(1, TOKEN_VOCABULARY, seed=4).float()
    for reverse in (False, True):
        values, slope = divergence_of(student, teacher, Divergence(1.0, reverse, 3))
        assert torch.isfinite(values).all() and torch.isfinite(slope).all()
        torch.testing.assert_close(slope.sum(-1), torch.zeros(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [3, 100])
def test_head_loss_is_the_sum_over_tokens_of_both_parts(chunk: int) -> None:
    which = Divergence(2.0, False, 4)
    student, teacher = (
        LanguageHead(drawn(TOKEN_TOKENS, TOKEN_WIDTH, seed=s), drawn(TOKEN_VOCABULARY, TOKEN_WIDTH, seed=s + 10))
        for s in (5, 6)
    )
    item, labels_each = (torch.rand(TOKEN_TOKENS, generator=torch.Generator().manual_seed(s)).double() for s in (7, 8))
    labels = torch.arange(TOKEN_TOKENS) * 3 % TOKEN_VOCABULARY
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


def test_loss_without_teacher_is_cross_entropy() -> None:
    student = LanguageHead(drawn(TOKEN_TOKENS, TOKEN_WIDTH, seed=5), drawn(TOKEN_VOCABULARY, TOKEN_WIDTH, seed=15))
    labels = torch.arange(TOKEN_TOKENS) % TOKEN_VOCABULARY
    loss = head_loss(
        student, None, HeadLoss(labels=labels, labels_each=torch.full((TOKEN_TOKENS,), 1 / TOKEN_TOKENS)), 4
    )
    assert float(loss) == pytest.approx(float(cross_entropy(student.hidden @ student.weight.T, labels)), rel=1e-6)
