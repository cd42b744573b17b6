"""What student and teacher have in common: tokens that both know, and blocks of which one came from the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.models.model import TorchModel
from compress.models.structure import blocks
from compress.numerics.language_head import Divergence, HeadLoss, head_loss
from compress.numerics.losses import relative_error, uniform_layer_map
from compress.stages.distill_language_model.settings import LanguageLoss
from compress.stages.recovery.trainer import Body, head_of
from compress.stages.training.sequences import TokenSequences
from compress.utils.errors import StageError

Tokens = torch.Tensor | None


def shared_tokens(
    weights: LanguageLoss, teacher: TorchModel, student: TorchModel, windows: TokenSequences
) -> tuple[Tokens, Tokens, bool]:
    """Return student and teacher ids of each of the student's tokens, and whether the teacher has all of them.

    Both are None if the two have the same vocabulary. Tokens are the same if they have the same spelling.

    Args:
        weights: Weights of the losses, which determine whether tokens are compared.
        teacher: Teacher with its tokenizer.
        student: Student with its tokenizer.
        windows: Token sequences of the training.

    Raises:
        StageError: If the loss compares tokens and the teacher lacks some of them.
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
        return None, None, True
    count = min(max(mine.values()) + 1, rows[0])
    teacher_ids = torch.full((count,), -1, dtype=torch.int64)
    # Map each of the student's ids to the teacher's id of the same spelling; -1 if there is none.
    for token, token_id in mine.items():
        other = theirs.get(token, -1)
        if token_id < count and other < rows[1]:
            teacher_ids[token_id] = other
    missing = sorted(token for token, token_id in mine.items() if token_id < count and teacher_ids[token_id] < 0)
    if missing and weights.logits_weight:
        raise StageError(
            f"The teacher has another vocabulary: it lacks {len(missing):,} of the student's {len(mine):,} tokens, "
            f"such as {missing[0]!r}, so that their predictions cannot be compared.",
            where="teacher",
            expected="a teacher whose tokenizer has all of the student's tokens; it may have others besides",
            hint="name such a teacher, or compare hidden states alone, by loss: {hidden_weight: 1, logits_weight: 0}",
        )
    if missing and weights.hidden_weight:
        ids = torch.cat([torch.from_numpy(window["input_ids"]) for window in windows.train.inputs])
        if unknown := int((teacher_ids[ids] < 0).sum()):
            raise StageError(
                f"The teacher cannot read the text as the student does: {unknown:,} of {len(ids):,} tokens are "
                f"among the {len(missing):,} that it lacks.",
                where="teacher",
                expected="a teacher that knows the tokens of the text, if it is to be compared by hidden states",
                hint="name another teacher, or learn from the text alone: logits_weight: 0, labels_weight: 1",
            )
    teacher_ids[teacher_ids < 0] = 0
    return torch.arange(count) if count < rows[0] else None, teacher_ids, not missing


def block_pairs(student: PreTrainedModel, teacher: PreTrainedModel) -> list[tuple[int, int]]:
    """Return which hidden states are compared: those after each student block and after its original in the teacher.

    A block is known by its vectors (norms, biases), which cuts of width leave as they are; where these don't tell,
    blocks are spread evenly (TinyBERT, section 3). Behind the last block a norm follows, so that it has a partner only
    in the last.
    """
    mine, theirs = blocks(student), blocks(teacher)
    originals = _original_blocks([block.module for block in mine], [block.module for block in theirs])
    if originals is None:
        originals = [layer - 1 for layer in uniform_layer_map(len(mine), len(theirs))]
    pairs = enumerate((original + 1 for original in originals), 1)
    return [pair for pair in pairs if (pair[0] == len(mine)) == (pair[1] == len(theirs))]


def _original_blocks(mine: list[nn.Module], theirs: list[nn.Module]) -> list[int] | None:
    """Return for each of the student's blocks the teacher's block with the same vectors, in order; None without one."""
    originals: list[int] = []
    for block in mine:
        later = range(originals[-1] + 1 if originals else 0, len(theirs))
        position = next((position for position in later if _same_vectors(block, theirs[position])), None)
        if position is None:
            return None
        originals.append(position)
    return originals


def _same_vectors(block: nn.Module, other: nn.Module) -> bool:
    """Compare weights with one axis, except those that are all alike, as they are before any training."""
    mine, theirs = (
        {
            name: value
            for name, value in module.named_parameters()
            if value.ndim == 1 and bool((value != value[0]).any())
        }
        for module in (block, other)
    )
    alike = [name for name, value in mine.items() if name in theirs and value.shape == theirs[name].shape]
    return bool(alike) and all(torch.equal(mine[name], theirs[name]) for name in alike)


class StudentWithLoss(nn.Module):
    """A causal model that gives its loss, so that what is put around it for several processes sees all of its weights.

    ``pairs`` are blocks of the student and of the teacher whose states are compared, by their places among the hidden
    states; ``projections`` join widths that differ.
    """

    def __init__(
        self,
        body: Body,
        weights: LanguageLoss,
        dtype: torch.dtype,
        pairs: list[tuple[int, int]],
        widths: tuple[int, int],
    ) -> None:
        super().__init__()
        self.body = body
        self.weights = weights
        self.dtype = dtype
        self.pairs = pairs
        different = pairs if widths[0] != widths[1] else []
        self.projections = nn.ModuleList(nn.Linear(*widths, bias=False) for _ in different)

    def get_input_embeddings(self) -> nn.Module:
        """Return the student's embedding table."""
        embedding: nn.Module = self.body.causal.get_input_embeddings()
        return embedding

    def forward(self, batch: dict[str, torch.Tensor], teacher: Callable[[], Any], taught: Any) -> torch.Tensor:
        """Return the loss of some sequences; ``taught`` has the teacher's states, ``teacher`` its head."""
        weights = self.weights
        outputs = self.body.outputs(batch["input_ids"], **({"output_hidden_states": True} if self.pairs else {}))
        loss = torch.zeros((), device=batch["input_ids"].device)
        if weights.logits_weight or weights.labels_weight:
            which = Divergence(weights.temperature, weights.direction == "reverse", weights.top_k)
            head_loss_spec = HeadLoss(
                which,
                weights.logits_weight * batch["each"],
                batch["following"] if weights.labels_weight else None,
                weights.labels_weight * batch["labels_each"],
            )
            heads = head_of(self.body, outputs.last_hidden_state, self.dtype), teacher()
            loss = loss + head_loss(*heads, head_loss_spec)
        for pair_index, (mine, theirs) in enumerate(self.pairs):
            states = outputs.hidden_states[mine]
            states = self.projections[pair_index](states) if len(self.projections) else states
            apart = relative_error(states.float(), taught.hidden_states[theirs].float())
            share = weights.hidden_weight / len(self.pairs)
            loss = loss + share * (apart.flatten() * batch["each"]).sum()
        return loss
