"""Inference of a torch model over encoded examples.

Only inputs that the module's `forward` accepts are passed to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from compress.tasks.task import Examples, Task
from compress.tasks.tokens import by_length, keep_all
from compress.utils.errors import StageError, first_line
from compress.utils.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from transformers.utils import ModelOutput


_JUDGED_AT_ONCE = 512


def tensors(examples: Examples, indices: list[int]) -> dict[str, torch.Tensor]:
    """Return the padded batch at ``indices`` as tensors, with ``index`` and, if present, ``labels``."""
    batch = {name: torch.from_numpy(array) for name, array in examples.batch(indices).items()}
    batch["index"] = torch.tensor(indices)
    if examples.labels is not None:
        batch["labels"] = torch.from_numpy(examples.labels[indices])
    return batch


def forward(module: nn.Module, batch: dict[str, torch.Tensor], **options: object) -> ModelOutput:
    """Return the module's output for the model inputs of ``batch``, without ``labels`` and ``index``."""
    return module(**{name: value for name, value in batch.items() if name not in ("labels", "index")}, **options)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's weights."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def answers(examples: Examples, outputs: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the answers [B, ...] of a module's outputs for a batch of ``examples``."""
    if examples.head is None:
        logits: torch.Tensor = outputs.logits
        return logits
    names = (*examples.head.outputs, *getattr(examples.head, "while_training", ()))
    selected: dict[str, Any] = {name: getattr(outputs, name, None) for name in names}
    return examples.head.read(selected, batch)


@torch.inference_mode()
def predict(
    module: nn.Module,
    examples: Examples,
    batch_size: int = 64,
    bf16: bool = False,
    progress: Progress | None = None,
    description: str = "predict",
) -> np.ndarray:
    """Return the answers to all examples in the given order, [n, ...] float32. Puts the module into eval mode.

    Answers of shorter examples are padded with zeros.

    Args:
        module: The model.
        examples: The examples.
        batch_size: Number of examples per call.
        bf16: Compute matrix products in bfloat16. This is faster and accurate enough for a teacher, but not exact.
        progress: Shows the batches under ``description``.
        description: Label of the progress.
    """
    module.eval()
    batches, parts, device = by_length(examples, batch_size), [], device_of(module)
    for indices in (progress or SilentProgress()).track(batches, description, len(batches)):
        batch = {name: tensor.to(device) for name, tensor in tensors(examples, indices).items()}
        inputs = {name: batch[name] for name in examples.padding}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            batch_answers = answers(examples, module(**inputs), batch)
        parts.append(batch_answers.float().cpu().numpy())
    largest = np.max([part.shape[1:] for part in parts], axis=0).astype(int)
    stacked = np.zeros((len(examples), *largest), np.float32)
    for indices, part in zip(batches, parts, strict=True):
        for index, answer in zip(indices, part, strict=True):
            stacked[index][tuple(map(slice, answer.shape))] = answer
    return stacked


def merit(task: Task, module: nn.Module, examples: Examples) -> float:
    """Return the task's first metric of a module's answers to labeled examples."""

    def answered(places: list[int]) -> dict[str, np.ndarray]:
        return {examples.answer: predict(module, examples.subset(places))}

    collected = keep_all(task, examples, by_length(examples, _JUDGED_AT_ONCE), answered)
    return task.measure(collected, examples.labels, "validation", "torch")[0].value


def with_targets(task: Task, module: nn.Module, batch: dict[str, torch.Tensor], **options: object) -> ModelOutput:
    """Return the module's output for a labeled batch, with the targets that the loss needs. Raises `StageError`."""
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
    """Return the task's loss of a batch. Without labels, the model's own predictions are the labels."""
    if "labels" not in batch:
        outputs = forward(module, batch)
        batch = {**batch, "labels": task.predicted_labels(outputs, batch)}
        if not task.targets(batch["labels"]):
            return task.loss(outputs, batch["labels"])
    return task.loss(with_targets(task, module, batch), batch["labels"])
