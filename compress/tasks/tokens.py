"""What tasks of text share: rows as token ids, encoders as they are loaded, and answers by token. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from compress.tasks.task import LOGITS

if TYPE_CHECKING:
    import torch

    from compress.models.torch_model import TorchModel

IGNORED = -100
"""The label of a place that has none."""


def text_inputs(
    encoded: Mapping[str, Any], processor: Any, kinds: bool = False
) -> tuple[list[dict[str, np.ndarray]], dict[str, float | None]]:
    """Examples of what a tokenizer gave, and their padding; token types only where there are two ``kinds`` of text."""
    ids = encoded["input_ids"]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    if kinds and "token_type_ids" in encoded:
        columns["token_type_ids"] = encoded["token_type_ids"]
    inputs = [
        {name: np.array(row, dtype=np.int64) for name, row in zip(columns, rows, strict=True)}
        for rows in zip(*columns.values(), strict=True)
    ]
    return inputs, {name: processor.pad_token_id or 0 if name == "input_ids" else 0 for name in columns}


def ragged(rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    """Rows of integers as one array [n, longest], ``fill`` at their ends."""
    found = np.full((len(rows), max(map(len, rows), default=0)), fill, dtype=np.int32)
    for row, values in zip(found, rows, strict=True):
        row[: len(values)] = values
    return found


@dataclass(frozen=True)
class TokenLogits:
    """The logits of each token, 0 for padding: a `Head`. ``labels`` are the names of what they are logits of."""

    labels: tuple[str, ...] | None = None
    outputs: ClassVar[tuple[str, ...]] = (LOGITS,)
    answer: ClassVar[str] = LOGITS
    many: ClassVar[str] = "logits"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits [B, L, classes]."""
        import torch

        mask = batch["attention_mask"].bool()[..., None]
        logits = outputs[LOGITS][:, : mask.shape[1]]
        return torch.where(mask, logits, torch.zeros((), dtype=logits.dtype, device=logits.device))


def token_distance(mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
    """Softened KL of logits [B, L, classes], averaged over the tokens that have any."""
    from compress.numerics.distillation import softened_kl

    real = taught.ne(0).any(dim=-1)
    return softened_kl(mine[real], taught[real], temperature)


def load_encoder(
    task: str, directory: Path, head: str, labels: Sequence[str] | None, trust_remote_code: bool, **config_values: Any
) -> TorchModel:
    """Weights and tokenizer of an encoder for `AutoModelFor` ``head``, as `load_with_head` has them."""
    from compress.tasks.loading import Origin, load_with_head, tokenizer_by

    expected = "a text encoder with a fast tokenizer, in Hugging Face layout"
    origin = Origin(task, directory, tokenizer_by(trust_remote_code), expected)
    return load_with_head(origin, (head,), labels, trust_remote_code, **config_values)
