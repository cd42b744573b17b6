"""A torch model over encoded examples: batches as tensors, and its answers to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from compress.tasks.batches import by_length, keep_all
from compress.tasks.task import Examples, Task
from compress.utils.errors import StageError, first_line

_JUDGED_AT_ONCE = 512


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


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def answers(examples: Examples, outputs: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The answers [B, ...] among a module's outputs for a batch of ``examples``, or made of them."""
    if examples.head is None:
        logits: torch.Tensor = outputs.logits
        return logits
    names = (*examples.head.outputs, *getattr(examples.head, "while_training", ()))
    found: dict[str, Any] = {name: getattr(outputs, name, None) for name in names}
    return examples.head.read(found, batch)


@torch.inference_mode()
def predict(module: nn.Module, examples: Examples, batch_size: int = 64, bf16: bool = False) -> np.ndarray:
    """The answers to every example in the order given, [n, ...] float32; the module is put into eval mode.

    Those to shorter examples have zeros at their end, where longer ones have more.

    ``bf16`` runs matrix products in bfloat16: faster, and fine for a teacher's answers, but not exact.
    """
    module.eval()
    batches, parts, device = by_length(examples, batch_size), [], device_of(module)
    for places in batches:
        batch = {name: tensor.to(device) for name, tensor in tensors(examples, places).items()}
        inputs = {name: batch[name] for name in examples.padding}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found = answers(examples, module(**inputs), batch)
        parts.append(found.float().cpu().numpy())
    largest = np.max([part.shape[1:] for part in parts], axis=0).astype(int)
    stacked = np.zeros((len(examples), *largest), np.float32)
    for places, part in zip(batches, parts, strict=True):
        for place, own in zip(places, part, strict=True):
            stacked[place][tuple(map(slice, own.shape))] = own
    return stacked


def merit(task: Task, module: nn.Module, examples: Examples) -> float:
    """The task's first metric of a module's answers to labeled examples."""

    def answered(places: list[int]) -> dict[str, np.ndarray]:
        return {examples.answer: predict(module, examples.subset(places))}

    kept = keep_all(task, examples, by_length(examples, _JUDGED_AT_ONCE), answered)
    return task.measure(kept, examples.labels, "validation", "torch")[0].value


def with_targets(task: Task, module: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    """The module's output for a labeled batch, with what its task's loss needs of it. Raises `StageError`."""
    targets = task.targets(batch["labels"])
    if not targets:
        return forward(module, batch, **options)
    try:
        return forward(module, batch, **targets, **options)
    except ValueError as error:
        raise StageError(
            f"The model cannot compute its loss: {first_line(error)}",
            hint="lower learning_rate, or set precision: fp32, if its answers are not finite",
        ) from error


def loss_of(task: Task, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The task's loss of a batch; where the data has no labels, for those that the model itself would give."""
    if "labels" not in batch:
        outputs = forward(module, batch)
        batch = {**batch, "labels": task.own_labels(outputs, batch)}
        if not task.targets(batch["labels"]):
            return task.loss(outputs, batch["labels"])
    return task.loss(with_targets(task, module, batch), batch["labels"])
