"""Answers of a torch model over many examples, batched by length."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from compress.tasks.task import Examples
from compress.training.loop import answers, tensors
from compress.training.short_forward import shortened


@torch.inference_mode()
def predict(
    module: nn.Module, examples: Examples, batch_size: int = 64, bf16: bool = False, first_token_only: bool = False
) -> np.ndarray:
    """Logits or embeddings of every example in the order given, [n, ...] float32; the module is put into eval mode.

    ``bf16`` runs matrix products in bfloat16: faster, and fine for a teacher's answers, but not exact.
    ``first_token_only`` computes in the last layer what a classifier reads, and no more.
    """
    module.eval()
    order = np.argsort(examples.lengths(), kind="stable")
    parts = []
    for start in range(0, len(order), batch_size):
        batch = tensors(examples, order[start : start + batch_size].tolist())
        inputs = {name: batch[name] for name in examples.padding}
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), shortened(module, first_token=first_token_only):
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
