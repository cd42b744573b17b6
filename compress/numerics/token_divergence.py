"""Divergence of a student's next-token distribution from its teacher's, and its gradient by the student's logits.

n: tokens, V: vocabulary, T: temperature; p = softmax(teacher / T), q = softmax(student / T).

forward    D = T^2 sum_i p_i log(p_i / q_i)      dD/dlogit_i = T (q_i - p_i)                       (Hinton et al. 2015)
reverse    D = T^2 sum_i q_i log(q_i / p_i)      dD/dlogit_i = T q_i (log(q_i / p_i) - D / T^2)   (Gu et al. 2024)

With ``top_k`` the sums cover the teacher's k likeliest tokens K and one more class for all others, with the
probabilities P = 1 - sum_K p and Q = 1 - sum_K q, so that no mass is lost (the ghost token of Anshumann et al.
2025). For a token outside K, p_i is replaced by its share of P in the student's distribution, P q_i / Q (forward),
and q_i / p_i by the ratio Q / P (reverse).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import log_softmax


class Divergence(NamedTuple):
    """Kind of divergence; ``top_k`` None means whole distributions."""

    temperature: float = 1.0
    reverse: bool = False
    top_k: int | None = None


def divergence_of(student: torch.Tensor, teacher: torch.Tensor, which: Divergence) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergence of each token [n] and its gradient by the student's logits [n, V]."""
    temperature = which.temperature
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    mine, theirs = log_softmax(student, dim=-1), log_softmax(teacher, dim=-1)
    # Without fewer classes than the vocabulary the full divergence is equal.
    if which.top_k is not None and which.top_k < mine.shape[-1]:
        values, slope = _of_top(mine, theirs, which.top_k, which.reverse)
    elif which.reverse:
        values, slope = _reverse(mine, theirs)
    else:
        values, slope = _forward(mine, theirs)
    return (values, slope) if temperature == 1 else (values * temperature**2, slope.mul_(temperature))


def _forward(mine: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return forward divergences and gradients of log-probabilities, which are overwritten."""
    likely = theirs.exp()
    values = theirs.sub_(mine).mul_(likely).sum(dim=-1)
    return values, mine.exp_().sub_(likely)


def _reverse(mine: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    likely, apart = mine.exp(), mine - theirs
    values = (likely * apart).sum(dim=-1)
    return values, apart.sub_(values[:, None]).mul_(likely)


def _of_top(mine: torch.Tensor, theirs: torch.Tensor, count: int, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    teacher_logs, chosen = theirs.topk(count, dim=-1)
    student_logs = mine.gather(-1, chosen)
    # Probability of all other tokens, by teacher and student.
    teacher_other, student_other = (_log_rest(logs, chosen) for logs in (theirs, mine))
    if reverse:
        log_ratio, other_log_ratio = student_logs - teacher_logs, student_other - teacher_other
        values = (student_logs.exp() * log_ratio).sum(dim=-1) + student_other.exp() * other_log_ratio
        # First the gradient of tokens outside the top k, then overwrite the others.
        slope = mine.exp() * (other_log_ratio - values)[:, None]
        return values, slope.scatter_(-1, chosen, student_logs.exp() * (log_ratio - values[:, None]))
    values = (teacher_logs.exp() * (teacher_logs - student_logs)).sum(dim=-1) + teacher_other.exp() * (
        teacher_other - student_other
    )
    slope = mine.exp() * (1 - (teacher_other - student_other).exp())[:, None]
    return values, slope.scatter_(-1, chosen, student_logs.exp() - teacher_logs.exp())


def _log_rest(logs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of all tokens except the chosen ones [n], summed for accuracy."""
    return logs.scatter(-1, chosen, float("-inf")).logsumexp(dim=-1)
