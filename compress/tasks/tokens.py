"""What tasks of text share: rows as token ids, encoders as they are loaded, and answers by token. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from compress.errors import ModelError
from compress.tasks.task import LOGITS

if TYPE_CHECKING:
    import torch

    from compress.checkpoints.torch_model import TorchModel

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
    """Weights and tokenizer of an encoder for `AutoModelFor` ``head``; a missing head is drawn from torch's generator.

    ``labels`` name a new head's classes. Raises `ModelError` for files that do not load and `DataError` for labels that
    a trained head lacks.
    """
    import transformers

    from compress.architectures.cut_model import is_cut, load_cut
    from compress.checkpoints.checks import refuse_quantized
    from compress.checkpoints.config_check import loading_failures
    from compress.checkpoints.torch_model import TorchModel
    from compress.tasks.classes import set_labels

    refuse_quantized(directory)
    auto: Any = getattr(transformers, f"AutoModelFor{head}")
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        has_head = any(head in name for name in config.architectures or ())
        for name, value in config_values.items() if not has_head else ():
            setattr(config, name, value)
        if labels is not None:
            set_labels(config, labels, has_head)
        if is_cut(config):
            module = load_cut(auto, directory, config)
        else:
            module = auto.from_pretrained(
                directory, config=config, trust_remote_code=trust_remote_code, use_safetensors=True
            )
    except loading_failures() as error:
        raise ModelError(
            f"The model cannot be loaded for {task}: {error}",
            where=str(directory),
            expected="a text encoder with a fast tokenizer, in Hugging Face layout",
        ) from error
    return TorchModel(module.float().eval(), tokenizer)
