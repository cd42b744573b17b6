"""Products with a language model's head, its largest matrix, and losses on the resulting next-token distributions.

n: tokens, W: width, V: vocabulary. The logits of a whole batch would not fit in memory, so they are computed for a
few tokens at a time, together with their gradient (`token_divergence`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
        likely, apart = mine.exp(), mine - theirs
        values = (likely * apart).sum(dim=-1)
        slope = apart.sub_(values[:, None]).mul_(likely)
    else:
        # The log-probabilities are overwritten.
        likely = theirs.exp()
        values = theirs.sub_(mine).mul_(likely).sum(dim=-1)
        slope = mine.exp_().sub_(likely)
    return (values, slope) if temperature == 1 else (values * temperature**2, slope.mul_(temperature))


def _of_top(mine: torch.Tensor, theirs: torch.Tensor, count: int, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    teacher_logs, chosen = theirs.topk(count, dim=-1)
    student_logs = mine.gather(-1, chosen)
    # Log-probability of all other tokens by teacher and student, summed directly: 1 - sum would lose digits.
    teacher_other, student_other = (
        logs.scatter(-1, chosen, float("-inf")).logsumexp(dim=-1) for logs in (theirs, mine)
    )
    if reverse:
        log_ratio, other_log_ratio = student_logs - teacher_logs, student_other - teacher_other
        values = (student_logs.exp() * log_ratio).sum(dim=-1) + student_other.exp() * other_log_ratio
        # First the gradient of tokens outside the top k, then overwrite the others.
        slope = mine.exp() * (other_log_ratio - values)[:, None]
        return values, slope.scatter_(-1, chosen, student_logs.exp() * (log_ratio - values[:, None]))
    other_log_ratio = teacher_other - student_other
    values = (teacher_logs.exp() * (teacher_logs - student_logs)).sum(dim=-1) + teacher_other.exp() * other_log_ratio
    slope = mine.exp() * (1 - other_log_ratio.exp())[:, None]
    return values, slope.scatter_(-1, chosen, student_logs.exp() - teacher_logs.exp())


CHUNK = 256
"""Number of tokens whose logits are held at a time."""


class LanguageHead(NamedTuple):
    """Hidden states [n, W] and the head's weight [V, W], in one dtype; their product is the logits."""

    hidden: torch.Tensor
    weight: torch.Tensor


class TokenScores(NamedTuple):
    """KL from teacher to student and both negative log-likelihoods of the next token, for each token [n]."""

    divergence: torch.Tensor
    student_loss: torch.Tensor
    teacher_loss: torch.Tensor


def head_divergence(student: LanguageHead, teacher: LanguageHead, chunk: int = CHUNK) -> torch.Tensor:
    """Return KL(softmax(teacher) || softmax(student)), mean over tokens, differentiable in the student's two tensors.

    Products are computed in the given dtype, softmax and sums in float32 or wider.
    """
    return head_loss(student, teacher, HeadLoss(), chunk=chunk)


class HeadLoss(NamedTuple):
    """Terms of a loss over tokens n: a[n] D(student, teacher) + b[n] cross-entropy of the next token.

    ``each`` is a [n], by default 1 / n; ``labels`` are the next tokens [n] and ``labels_each`` is b [n], by default
    none.
    """

    divergence: Divergence = Divergence()
    each: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    labels_each: torch.Tensor | None = None


def head_loss(
    student: LanguageHead, teacher: LanguageHead | None, wanted: HeadLoss, chunk: int = CHUNK
) -> torch.Tensor:
    """Return the loss ``wanted``, differentiable in the student's two tensors; without a teacher, of labels only.

    Args:
        student: Hidden states and head of the student.
        teacher: Hidden states and head of the teacher, or None.
        wanted: Terms of the loss.
        chunk: Tokens per chunk.
    """
    taught = (None, None) if teacher is None else tuple(teacher)
    result: torch.Tensor = _HeadLoss.apply(*student, *taught, wanted, chunk)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def token_scores(
    student: LanguageHead, teacher: LanguageHead, next_tokens: torch.Tensor, chunk: int = CHUNK
) -> TokenScores:
    """Return the divergence and the losses of each token.

    Args:
        student: Hidden states and head of the student.
        teacher: Hidden states and head of the teacher.
        next_tokens: Ids of the next tokens [n].
        chunk: Tokens per chunk.
    """
    parts = []
    # Logits exist for one chunk at a time.
    for start in range(0, len(next_tokens), chunk):
        piece = slice(start, start + chunk)
        log_student, log_teacher = (
            log_softmax(_logits(head.hidden[piece], head.weight), dim=-1) for head in (student, teacher)
        )
        ids = next_tokens[piece, None]
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
        parts.append((divergence, -log_student.gather(1, ids)[:, 0], -log_teacher.gather(1, ids)[:, 0]))
    return TokenScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        teacher_hidden: torch.Tensor | None,
        teacher_weight: torch.Tensor | None,
        wanted: HeadLoss,
        chunk: int,
    ) -> torch.Tensor:
        """Compute the loss and its gradients chunk by chunk.

        Args:
            ctx: Context for the backward pass.
            hidden: Hidden states of the student [n, W].
            weight: Head of the student [V, W].
            teacher_hidden: Hidden states of the teacher, or None.
            teacher_weight: Head of the teacher, or None.
            wanted: Terms of the loss.
            chunk: Tokens per chunk.
        """
        count, total = len(hidden), 0.0
        by_hidden = torch.empty_like(hidden)
        by_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if ctx.needs_input_grad[1] else None
        # Losses need more precision than an enclosing autocast may allow.
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, count, chunk):
                piece = slice(start, start + chunk)
                logits = _logits(hidden[piece], weight)
                taught = None if teacher_hidden is None else _logits(teacher_hidden[piece], teacher_weight)
                value, slope = _piece(logits, taught, wanted, piece, count)
                total += value
                # Gradients are computed in the forward pass, so that logits need not be kept.
                slope = slope.to(weight.dtype)
                by_hidden[piece] = slope @ weight
                if by_weight is not None:
                    by_weight += slope.T @ hidden[piece]
        ctx.save_for_backward(by_hidden, by_weight)
        return torch.tensor(total, dtype=_wide(hidden.dtype), device=hidden.device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        by_hidden, by_weight = ctx.saved_tensors
        # The upstream gradient is a scalar that scales both.
        weight = None if by_weight is None else (by_weight * gradient).to(by_hidden.dtype)
        return (by_hidden * gradient).to(by_hidden.dtype), weight, None, None, None, None


def _piece(
    logits: torch.Tensor, taught: torch.Tensor | None, wanted: HeadLoss, piece: slice, count: int
) -> tuple[float, torch.Tensor]:
    """Return the contribution of some tokens to the loss, and its gradient with respect to their logits [n, V].

    Args:
        logits: Logits of the student [n, V].
        taught: Logits of the teacher [n, V], or None.
        wanted: Terms of the loss.
        piece: Range of the tokens.
        count: Number of all tokens.
    """
    labels = None
    if wanted.labels is not None and wanted.labels_each is not None:
        labels = wanted.labels[piece], wanted.labels_each[piece]
    if taught is None:
        assert labels is not None, "without a teacher there are labels"
        return _cross_entropy(logits, *labels)
    # `divergence_of` overwrites its input, and the labels need it again.
    plain = logits.clone() if labels is not None else logits
    values, slope = divergence_of(logits, taught, wanted.divergence)
    if wanted.each is None:
        value = float(values.sum(dtype=torch.float64)) / count
        slope.div_(count)
    else:
        each = wanted.each[piece].to(values.dtype)
        value = float((values * each).sum(dtype=torch.float64))
        slope.mul_(each[:, None])
    if labels is not None:
        label_loss, label_slope = _cross_entropy(plain, *labels)
        return value + label_loss, slope.add_(label_slope)
    return value, slope


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, each: torch.Tensor) -> tuple[float, torch.Tensor]:
    log_probabilities, each = log_softmax(logits, dim=-1), each.to(logits.dtype)
    label_logs = log_probabilities.gather(1, labels[:, None])[:, 0]
    slope = log_probabilities.exp_().mul_(each[:, None])
    slope.scatter_add_(1, labels[:, None], -each[:, None])
    return float(-(label_logs * each).sum(dtype=torch.float64)), slope


def _logits(hidden: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    assert weight is not None
    logits = hidden @ weight.T
    return logits.to(_wide(logits.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


ROWS = 8192
"""Number of rows of the head that are held in the dtype of the product at a time."""


def head_product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``hidden`` [..., columns] times ``weight`` [rows, columns] transposed, [..., rows].

    ``weight`` is stored in any float type and has no gradient. The product is in float32, or in the type of an
    enclosing autocast.
    """
    product: torch.Tensor = _HeadProduct.apply(hidden, weight)  # type: ignore[no-untyped-call]
    return product


class _HeadProduct(torch.autograd.Function):
    """Product that casts the weight again in the backward pass, since a plain one would keep the cast rows."""

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(weight)
        product = None
        # Cast and multiply a band of rows at a time.
        for start in range(0, len(weight), ROWS):
            rows = weight[start : start + ROWS]
            part = hidden @ rows.float().T
            if product is None:
                product = part.new_empty((*part.shape[:-1], len(weight)))
            product[..., start : start + len(rows)] = part
        assert product is not None
        return product

    @staticmethod
    def backward(context: Any, slope: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = context.saved_tensors
        total = slope.new_zeros((*slope.shape[:-1], weight.shape[1]), dtype=torch.float32)
        for start in range(0, len(weight), ROWS):
            rows = weight[start : start + ROWS]
            total += slope[..., start : start + len(rows)] @ rows.to(slope.dtype)
        return total, None
