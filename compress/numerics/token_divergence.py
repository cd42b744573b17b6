"""How far a student's next-token distribution is from its teacher's, and the slope of that by the student's logits.

n: tokens, V: vocabulary, T: temperature; p = softmax(teacher / T), q = softmax(student / T).

forward    D = T^2 sum_i p_i log(p_i / q_i)      dD/dlogit_i = T (q_i - p_i)                       (Hinton et al. 2015)
reverse    D = T^2 sum_i q_i log(q_i / p_i)      dD/dlogit_i = T q_i (log(q_i / p_i) - D / T^2)   (Gu et al. 2024)

With ``top_k`` the sums go over the teacher's k likeliest tokens K and one class more, the rest, with the probabilities
P = 1 - sum_K p and Q = 1 - sum_K q, so that no mass is lost (the ghost token of Anshumann et al. 2025). A token beyond
K then has in place of p_i its share of P by the student's own measure, P q_i / Q (forward), and in place of q_i / p_i
the ratio Q / P (reverse).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import log_softmax


class Divergence(NamedTuple):
    """Which divergence is meant; ``top_k`` None: of whole distributions."""

    temperature: float = 1.0
    reverse: bool = False
    top_k: int | None = None


def divergence_of(student: torch.Tensor, teacher: torch.Tensor, which: Divergence) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits [n, V]: the divergence of each token [n], and its slope by the student's logits [n, V]."""
    degrees = which.temperature
    if degrees != 1:
        student, teacher = student / degrees, teacher / degrees
    mine, theirs = log_softmax(student, dim=-1), log_softmax(teacher, dim=-1)
    if which.top_k is not None and which.top_k < mine.shape[-1]:
        values, slope = _of_top(mine, theirs, which.top_k, which.reverse)
    elif which.reverse:
        values, slope = _reverse(mine, theirs)
    else:
        values, slope = _forward(mine, theirs)
    return (values, slope) if degrees == 1 else (values * degrees**2, slope.mul_(degrees))


def _forward(mine: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of log-probabilities, which are overwritten."""
    likely = theirs.exp()
    values = theirs.sub_(mine).mul_(likely).sum(dim=-1)
    return values, mine.exp_().sub_(likely)


def _reverse(mine: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    likely, apart = mine.exp(), mine - theirs
    values = (likely * apart).sum(dim=-1)
    return values, apart.sub_(values[:, None]).mul_(likely)


def _of_top(mine: torch.Tensor, theirs: torch.Tensor, count: int, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    kept, chosen = theirs.topk(count, dim=-1)
    own = mine.gather(-1, chosen)
    rest, own_rest = (_log_rest(logs, chosen) for logs in (theirs, mine))
    if reverse:
        apart, apart_rest = own - kept, own_rest - rest
        values = (own.exp() * apart).sum(dim=-1) + own_rest.exp() * apart_rest
        slope = mine.exp() * (apart_rest - values)[:, None]
        return values, slope.scatter_(-1, chosen, own.exp() * (apart - values[:, None]))
    values = (kept.exp() * (kept - own)).sum(dim=-1) + rest.exp() * (rest - own_rest)
    slope = mine.exp() * (1 - (rest - own_rest).exp())[:, None]
    return values, slope.scatter_(-1, chosen, own.exp() - kept.exp())


def _log_rest(logs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The logarithm of what is left beside the chosen tokens [n], summed rather than subtracted from 1."""
    return logs.scatter(-1, chosen, float("-inf")).logsumexp(dim=-1)
