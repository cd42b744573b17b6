"""Distillation losses against plain loops over the papers' formulas; padding must have no influence."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from compress.numerics.distillation import (
    attention_mse,
    hidden_cosine,
    hidden_mse,
    relation_kl,
    scaled_scores,
    softened_kl,
    uniform_layer_map,
)

BATCH, LENGTH, WIDTH, HEADS = 3, 5, 8, 2
LENGTHS = (5, 3, 1)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask() -> torch.Tensor:
    return (torch.arange(LENGTH)[None] < torch.tensor(LENGTHS)[:, None]).double()


def hidden(seed: int) -> torch.Tensor:
    return random(BATCH, LENGTH, WIDTH, seed=seed)


def scores(seed: int) -> torch.Tensor:
    return random(BATCH, HEADS, LENGTH, LENGTH, seed=seed)


def probabilities(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_softened_kl_of_a_hand_worked_pair():
    # At T = 2 the teacher's probabilities are 3/4 and 1/4, the student's 1/2 each.
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    student = torch.tensor([[1.5, 1.5]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert softened_kl(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_softened_kl_is_the_mean_over_the_batch(temperature: float):
    student, teacher = random(4, 3, seed=0), random(4, 3, seed=1)
    expected = 0.0
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p = probabilities([value / temperature for value in theirs])
        q = probabilities([value / temperature for value in mine])
        expected += temperature**2 * divergence(p, q) / 4
    assert softened_kl(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-9)


def test_softened_kl_is_zero_for_equal_answers_and_ignores_a_shift():
    logits = random(4, 3, seed=0)
    assert softened_kl(logits + 7, logits, 2.0).item() == pytest.approx(0, abs=1e-12)


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


def test_hidden_cosine_is_a_mean_over_real_tokens():
    student, teacher = hidden(0), hidden(1)
    distances = []
    for row, length in enumerate(LENGTHS):
        for token in range(length):
            a, b = student[row, token].tolist(), teacher[row, token].tolist()
            product = sum(x * y for x, y in zip(a, b, strict=True))
            distances.append(1 - product / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b)))
    expected = sum(distances) / len(distances)
    assert hidden_cosine(student, teacher, mask()).item() == pytest.approx(expected, rel=1e-9)


def test_hidden_mse_is_a_mean_over_real_tokens():
    student, teacher = hidden(0), hidden(1)
    errors = []
    for row, length in enumerate(LENGTHS):
        for token in range(length):
            errors += [
                (a - b) ** 2 for a, b in zip(student[row, token].tolist(), teacher[row, token].tolist(), strict=True)
            ]
    assert hidden_mse(student, teacher, mask()).item() == pytest.approx(sum(errors) / len(errors), rel=1e-9)


def test_attention_mse_is_a_mean_over_heads_and_pairs_of_real_tokens():
    student, teacher = scores(0), scores(1)
    errors = [
        (student[row, head, i, j] - teacher[row, head, i, j]).item() ** 2
        for row, length in enumerate(LENGTHS)
        for head in range(HEADS)
        for i in range(length)
        for j in range(length)
    ]
    assert attention_mse(student, teacher, mask()).item() == pytest.approx(sum(errors) / len(errors), rel=1e-9)


def test_relation_kl_is_a_mean_over_heads_and_real_queries():
    student, teacher = scores(0), scores(1)
    divergences = [
        divergence(
            probabilities(teacher[row, head, i, :length].tolist()),
            probabilities(student[row, head, i, :length].tolist()),
        )
        for row, length in enumerate(LENGTHS)
        for head in range(HEADS)
        for i in range(length)
    ]
    expected = sum(divergences) / len(divergences)
    assert relation_kl(student, teacher, mask()).item() == pytest.approx(expected, rel=1e-6)


def test_relation_kl_of_a_certain_teacher_is_finite():
    teacher = torch.tensor([[[[200.0, -200.0], [0.0, 0.0]]]])
    student = torch.zeros(1, 1, 2, 2, requires_grad=True)
    loss = relation_kl(student, teacher, torch.ones(1, 2))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) / 2, rel=1e-5)
    assert student.grad is not None and bool(student.grad.isfinite().all())


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.mark.parametrize("loss", [hidden_cosine, hidden_mse])
@pytest.mark.parametrize("filler", [1e4, -3.0])
def test_padded_hidden_states_change_nothing(loss: Loss, filler: float):
    student, teacher = hidden(0).requires_grad_(), hidden(1)
    original = loss(student, teacher, mask())
    original.backward()
    padding = mask() == 0
    assert student.grad is not None and not student.grad[padding].any() and student.grad[~padding].any()
    changed = student.detach().clone()
    changed[padding] = filler
    other = teacher.clone()
    other[padding] = filler * 2
    assert loss(changed, other, mask()).item() == original.item()


@pytest.mark.parametrize("loss", [attention_mse, relation_kl])
def test_padded_queries_and_keys_change_nothing(loss: Loss):
    student, teacher = scores(0).requires_grad_(), scores(1)
    original = loss(student, teacher, mask())
    original.backward()
    real = (mask()[:, None, :, None] * mask()[:, None, None, :]).bool().expand_as(student)
    assert student.grad is not None and bool(student.grad.isfinite().all())
    assert not student.grad[~real].any() and student.grad[real].any()
    changed, other = student.detach().clone(), teacher.clone()
    changed[~real], other[~real] = 50.0, -50.0
    assert loss(changed, other, mask()).item() == pytest.approx(original.item(), rel=1e-12)


def test_scaled_scores_are_those_of_torchs_attention():
    query, key = hidden(0), hidden(1)
    size = WIDTH // HEADS
    split = lambda states: states.view(BATCH, LENGTH, HEADS, size).transpose(1, 2)  # noqa: E731
    # With the identity as values, attention returns its own probabilities.
    identity = torch.eye(LENGTH, dtype=torch.float64).expand(BATCH, HEADS, LENGTH, LENGTH)
    expected = scaled_dot_product_attention(split(query), split(key), identity)
    torch.testing.assert_close(scaled_scores(query, key, HEADS).softmax(dim=-1), expected)


def test_scaled_scores_of_hand_worked_heads():
    left = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 2.0]]])
    right = torch.tensor([[[1.0, 1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 5.0]]])
    torch.testing.assert_close(scaled_scores(left, right, 2), torch.tensor([[[[5.0]], [[5.0]]]]))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (4, 12, [3, 6, 9, 12]),
        (6, 12, [2, 4, 6, 8, 10, 12]),
        (3, 6, [2, 4, 6]),
        (1, 6, [6]),
        (6, 6, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_layers_map_as_in_tinybert(student: int, teacher: int, expected: list[int]):
    assert uniform_layer_map(student, teacher) == expected
