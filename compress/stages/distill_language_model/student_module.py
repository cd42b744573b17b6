"""A causal model that gives its loss beside a teacher's answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compress.numerics.distillation import relative_error
from compress.numerics.language_head import HeadLoss, head_loss
from compress.numerics.token_divergence import Divergence
from compress.stages.distill_language_model.settings import LanguageLoss
from compress.stages.recovery.trainer import Body, head_of


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
        found: nn.Module = self.body.causal.get_input_embeddings()
        return found

    def forward(self, batch: dict[str, torch.Tensor], teacher: Callable[[], Any], taught: Any) -> torch.Tensor:
        """Return the loss of some sequences; ``taught`` has the teacher's states, ``teacher`` its head."""
        weights = self.weights
        outputs = self.body.outputs(batch["input_ids"], **({"output_hidden_states": True} if self.pairs else {}))
        loss = torch.zeros((), device=batch["input_ids"].device)
        if weights.logits_weight or weights.labels_weight:
            which = Divergence(weights.temperature, weights.direction == "reverse", weights.top_k)
            wanted = HeadLoss(
                which,
                weights.logits_weight * batch["each"],
                batch["following"] if weights.labels_weight else None,
                weights.labels_weight * batch["labels_each"],
            )
            heads = head_of(self.body, outputs.last_hidden_state, self.dtype), teacher()
            loss = loss + head_loss(*heads, wanted)
        for place, (mine, theirs) in enumerate(self.pairs):
            states = outputs.hidden_states[mine]
            states = self.projections[place](states) if len(self.projections) else states
            apart = relative_error(states.float(), taught.hidden_states[theirs].float())
            share = weights.hidden_weight / len(self.pairs)
            loss = loss + share * (apart.flatten() * batch["each"]).sum()
        return loss
