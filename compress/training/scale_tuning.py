"""Tuning what a quantized model has beside its integers: scales, norms and biases."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.checkpoints.checkpoint import TABLES, QuantizedCheckpoint
from compress.checkpoints.quantized_module import grids, learn_vectors, load_module
from compress.checkpoints.safetensors_file import read_tensor
from compress.checkpoints.shards import write_changed
from compress.errors import StageError
from compress.training.config import ScaleTuning
from compress.training.processes import is_first
from compress.training.recovery import Lesson, make_windows

if TYPE_CHECKING:
    from compress.stage.stage import Context


def tune_scales(checkpoint: QuantizedCheckpoint, settings: ScaleTuning, context: Context) -> QuantizedCheckpoint:
    """A copy of ``checkpoint`` in the scratch folder, whose scales, norms and biases were trained.

    Of several processes the first one writes it.
    """
    windows = make_windows(checkpoint, settings, context)
    module = load_module(checkpoint)
    learn(module, checkpoint, settings)
    lesson = Lesson.between(module, context.earlier(settings.teacher), windows, settings, settings.learning_rate)
    lesson.teach(context, "tune_scales")
    if not is_first():
        return checkpoint
    folder = context.scratch / "tuned"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_changed(checkpoint, folder, *tuned_tensors(module, checkpoint))
    return QuantizedCheckpoint(folder)


def learn(module: nn.Module, checkpoint: QuantizedCheckpoint, settings: ScaleTuning) -> None:
    """Make trainable what ``settings`` asks for, in place. Raises `StageError` where that is nothing."""
    for name, grid in grids(module):
        grid.log_ratio.requires_grad_(settings.embeddings if name in checkpoint.tables else settings.scales)
    if settings.norms:
        learn_vectors(module, checkpoint)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise StageError(
            "There is nothing to tune.",
            expected="quantized layers, or norms, that the stage's fields let learn",
            mend="set scales, norms or embeddings to true",
        )


@torch.no_grad()
def tuned_tensors(
    module: nn.Module, checkpoint: QuantizedCheckpoint
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the module learned, under the checkpoint's names: its own tensors, and those of its tables."""
    changed: dict[str, torch.Tensor] = {}
    tables: dict[str, torch.Tensor] = {}
    for name, grid in grids(module):
        scales = grid.scales().T.to(torch.float16)
        if name in checkpoint.tables:
            tables[f"{name}.scales"] = _padded(checkpoint, f"{name}.scales", scales)
            weight = f"{name}.weight"
            changed[weight] = grid.weight(torch.float32).to(checkpoint.stored(weight).dtype)
        else:
            changed[f"{name}.scales"] = scales
    for name, child in module.named_modules():
        if hasattr(child, "parametrizations"):
            for attribute in child.parametrizations:
                full = f"{name}.{attribute}"
                changed[full] = getattr(child, attribute).to(checkpoint.stored(full).dtype)
    return changed, tables


def _padded(checkpoint: QuantizedCheckpoint, name: str, scales: torch.Tensor) -> torch.Tensor:
    """The scales [groups, rows] with the rows that the file adds after them, as they stand there."""
    stored = read_tensor(checkpoint.folder / TABLES, name)
    return torch.cat([scales, stored[:, scales.shape[1] :]], dim=1)
