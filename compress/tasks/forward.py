"""A torch model over encoded examples: batches as tensors, and its answers to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from compress.tasks.task import Examples


def tensors(examples: Examples, indices: list[int]) -> dict[str, torch.Tensor]:
    """The padded batch at ``indices`` as tensors, with ``index`` and, where there are labels, ``labels``."""
    batch = {name: torch.from_numpy(array) for name, array in examples.batch(indices).items()}
    batch["index"] = torch.tensor(indices)
    if examples.labels is not None:
        batch["labels"] = torch.from_numpy(examples.labels[indices])
    return batch


def forward(module: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    """The module's output for the model inputs in ``batch``; ``labels`` and ``index`` are left out."""
    return module(**{name: value for name, value in batch.items() if name not in ("labels", "index")}, **options)


def answers(examples: Examples, outputs: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits or embeddings [B, ...] among a module's outputs for a batch of ``examples``, or made of them."""
    if examples.head is None:
        logits: torch.Tensor = outputs.logits
        return logits
    return examples.head.embed(outputs.last_hidden_state, batch["attention_mask"])


@torch.inference_mode()
def predict(module: nn.Module, examples: Examples, batch_size: int = 64, bf16: bool = False) -> np.ndarray:
    """Logits or embeddings of every example in the order given, [n, ...] float32; the module is put into eval mode.

    ``bf16`` runs matrix products in bfloat16: faster, and fine for a teacher's answers, but not exact.
    """
    module.eval()
    order = np.argsort(examples.lengths(), kind="stable")
    parts = []
    for start in range(0, len(order), batch_size):
        batch = tensors(examples, order[start : start + batch_size].tolist())
        inputs = {name: batch[name] for name in examples.padding}
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = answers(examples, module(**inputs), batch)
        parts.append(found.float().cpu().numpy())
    stacked = np.concatenate(parts)
    outputs = np.empty_like(stacked)
    outputs[order] = stacked
    return outputs


def labels_or_answers(batch: dict[str, torch.Tensor], outputs: Any) -> torch.Tensor:
    """The labels of a batch; where the data has none, the classes that the model itself chose."""
    if "labels" in batch:
        return batch["labels"]
    chosen: torch.Tensor = outputs.logits.detach().argmax(dim=-1)
    return chosen
