"""Shared functions of text tasks: token ids, loading of encoders, and logits per token. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.tasks.lazy_modules import losses, np, torch
from compress.tasks.loading import Origin, load_with_head, tokenizer_by
from compress.tasks.task import LOGITS, Examples, Head, NamedArrays, Task

if TYPE_CHECKING:
    from compress.models.model import Processor, TorchModel

IGNORED = -100
"""Label of a position without a label."""


def text_inputs(
    encoded: Mapping[str, Any], processor: Processor, kinds: bool = False
) -> tuple[list[dict[str, np.ndarray]], dict[str, float | None]]:
    """Return a tokenizer's output as examples, and their padding. Token types only if texts have two ``kinds``."""
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
    """Return rows of integers as one array [n, longest], padded with ``fill``."""
    padded = np.full((len(rows), max(map(len, rows), default=0)), fill, dtype=np.int32)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


@dataclass(frozen=True)
class TokenLogits(Head):
    """Logits of each token, 0 for padding. ``labels`` are the names of the classes."""

    labels: tuple[str, ...] | None = None

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return logits [B, L, classes]."""
        mask = batch["attention_mask"].bool()[..., None]
        logits = outputs[LOGITS][:, : mask.shape[1]]
        return torch.where(mask, logits, torch.zeros((), dtype=logits.dtype, device=logits.device))


def token_distance(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the softened KL divergence of logits [B, L, classes], averaged over tokens that are not padding."""
    real = teacher.ne(0).any(dim=-1)
    return losses.softened_kl(student[real], teacher[real], temperature)


def load_encoder(
    task: str,
    directory: Path,
    head: str,
    labels: Sequence[str] | None,
    trust_remote_code: bool,
    **config_values: object,
) -> TorchModel:
    """Return weights and tokenizer of an encoder, loaded by `AutoModelFor` plus ``head``.

    Args:
        task: Name of the task, for messages.
        directory: Folder of the model.
        head: Suffix of the auto class.
        labels: Class names for a new head.
        trust_remote_code: Allow code of the repository.
        **config_values: Config values for a new head.
    """
    expected = "a text encoder with a fast tokenizer, in Hugging Face layout"
    origin = Origin(task, directory, tokenizer_by(trust_remote_code), expected)
    return load_with_head(origin, (head,), labels, trust_remote_code, **config_values)


def by_length(examples: Examples, size: int) -> list[list[int]]:
    """Return the indices of the examples in batches of ``size``, shortest first; singly if they are unbatchable."""
    size = 1 if examples.unbatchable else size
    order = np.argsort(examples.lengths(), kind="stable")
    return [order[start : start + size].tolist() for start in range(0, len(order), size)]


def keep_all(
    task: Task,
    examples: Examples,
    batches: Iterable[list[int]],
    answered: Callable[[list[int]], NamedArrays],
) -> NamedArrays:
    """Return the task's collected outputs for all batches, in the order of the examples.

    Args:
        task: The task.
        examples: The examples.
        batches: Indices of the examples of each batch. Examples that belong together, such as a text and its pair,
            follow each other.
        answered: Returns the outputs of the model for a batch.
    """
    indices: list[int] = []
    parts = []
    for batch in batches:
        parts.append(task.collect(answered(batch), examples, batch))
        indices += batch
    order = np.argsort(indices)
    return {name: np.concatenate(_widened([part[name] for part in parts]))[order] for name in parts[0]}


def _widened(parts: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """Pad collected parts to the same width with NaN or -1."""
    widest = max(part.shape[-1] for part in parts)
    if all(part.shape[-1] == widest for part in parts) or any(part.ndim != 2 for part in parts):
        return parts
    fill = np.nan if parts[0].dtype.kind == "f" else -1
    return [np.pad(part, ((0, 0), (0, widest - part.shape[-1])), constant_values=fill) for part in parts]
