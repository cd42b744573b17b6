"""Student of a language distillation: the tokens that it shares with its teacher, and its loss."""

from __future__ import annotations

import torch
from torch import nn

from compress.models.model import TorchModel
from compress.numerics.language_head import Divergence, HeadLoss, LanguageHead, head_loss
from compress.stages.distill_language_model.settings import LanguageLoss
from compress.stages.recovery.trainer import Body, head_of
from compress.stages.training.sequences import TokenSequences
from compress.utils.errors import StageError

Tokens = torch.Tensor | None


def shared_tokens(teacher: TorchModel, student: TorchModel, windows: TokenSequences) -> tuple[Tokens, Tokens]:
    """Return student and teacher ids of each of the student's tokens; both None if the vocabularies are the same.

    Tokens are the same if they have the same spelling. Raises `StageError` if the teacher lacks some of them.
    """
    rows = [model.module.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    mine, theirs = (model.tokenizer.get_vocab() for model in (student, teacher))
    used = max(int(window["input_ids"].max()) for part in (windows.train, windows.held_out) for window in part.inputs)
    if used >= rows[0]:
        raise StageError(
            f"The text has the token {used}; the model has {rows[0]}.",
            expected="the tokenizer that the model was trained with",
        )
    if mine == theirs and rows[0] == rows[1]:
        return None, None
    count = min(max(mine.values()) + 1, rows[0])
    teacher_ids = torch.full((count,), -1, dtype=torch.int64)
    # Map each of the student's ids to the teacher's id of the same spelling; -1 if there is none.
    for token, token_id in mine.items():
        other = theirs.get(token, -1)
        if token_id < count and other < rows[1]:
            teacher_ids[token_id] = other
    missing = sorted(token for token, token_id in mine.items() if token_id < count and teacher_ids[token_id] < 0)
    if missing:
        raise StageError(
            f"The teacher has another vocabulary: it lacks {len(missing):,} of the student's {len(mine):,} tokens, "
            f"such as {missing[0]!r}, so that their predictions cannot be compared.",
            where="teacher",
            expected="a teacher whose tokenizer has all of the student's tokens; it may have others besides",
        )
    teacher_ids[teacher_ids < 0] = 0
    return torch.arange(count) if count < rows[0] else None, teacher_ids


class StudentWithLoss(nn.Module):
    """A causal model that gives its loss, so that a wrapper for several processes sees all of its weights."""

    def __init__(self, body: Body, weights: LanguageLoss, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = body
        self.weights = weights
        self.dtype = dtype

    def get_input_embeddings(self) -> nn.Module:
        """Return the student's embedding table."""
        embedding: nn.Module = self.body.causal.get_input_embeddings()
        return embedding

    def forward(self, batch: dict[str, torch.Tensor], teacher: LanguageHead | None) -> torch.Tensor:
        """Return the loss of some sequences; ``teacher`` has the teacher's states and head, unless labels alone count.

        The head's loss is computed outside of autocast, in the dtype of the states.
        """
        weights = self.weights
        which = Divergence(weights.temperature, weights.direction == "reverse", weights.top_k)
        head_loss_spec = HeadLoss(
            which,
            weights.logits_weight * batch["each"],
            batch["following"] if weights.labels_weight else None,
            weights.labels_weight * batch["labels_each"],
        )
        return head_loss(head_of(self.body, self.body(batch["input_ids"]), self.dtype), teacher, head_loss_spec)
