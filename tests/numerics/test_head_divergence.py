"""The divergence worked out in pieces, against torch's own on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from compress.numerics.language_head import LanguageHead, head_divergence, token_scores

TOKENS, WIDTH, VOCABULARY = 11, 6, 17


def heads(seed: int = 0) -> tuple[LanguageHead, LanguageHead]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return tuple(LanguageHead(draw(TOKENS, WIDTH), draw(VOCABULARY, WIDTH)) for _ in range(2))  # type: ignore[return-value]


def on_whole_logits(student: LanguageHead, teacher: LanguageHead) -> torch.Tensor:
    log_student, log_teacher = ((head.hidden @ head.weight.T).log_softmax(-1) for head in (student, teacher))
    return kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_value_and_gradients_are_those_on_whole_logits(chunk: int) -> None:
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


def test_equal_heads_do_not_differ() -> None:
    student, _ = heads()
    hidden = student.hidden.clone().requires_grad_(True)
    loss = head_divergence(LanguageHead(hidden, student.weight), student)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-12 and float(hidden.grad.abs().max()) < 1e-12


def test_bfloat16_products_stay_near() -> None:
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
