"""LoRA adapters on a quantized checkpoint: trained here, or brought along."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.checkpoints.adapter import (
    ADAPTER,
    check_adapter,
    check_fits,
    copy_adapter,
    import_peft,
    refuse_second,
    write_adapter,
)
from compress.checkpoints.checkpoint import QuantizedCheckpoint
from compress.checkpoints.quantized_module import empty_module, load_module
from compress.errors import StageError
from compress.training.config import AdapterTraining
from compress.training.processes import is_first
from compress.training.recovery import Lesson, make_windows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from compress.stage.stage import Context


def train_adapter(checkpoint: QuantizedCheckpoint, settings: AdapterTraining, context: Context) -> QuantizedCheckpoint:
    """A copy of ``checkpoint`` in the scratch folder with a trained adapter in it; the base keeps its bytes.

    Of several processes the first one writes it.
    """
    refuse_second(checkpoint.folder)
    windows = make_windows(checkpoint, settings, context)
    module = load_module(checkpoint)
    adapted = adapt(module, settings, context.seed)
    teacher = context.earlier(settings.teacher)
    lesson = Lesson.between(module, teacher, windows, settings, settings.learning_rate, settings.objective)
    lesson.teach(context, "lora")
    if not is_first():
        return checkpoint
    folder = _copy(checkpoint, context.scratch)
    write_adapter(adapted, folder / ADAPTER)
    return QuantizedCheckpoint(folder)


def adapt(module: PreTrainedModel, settings: AdapterTraining, seed: int) -> PeftModel:
    """Put new adapters around linear layers of ``module``, in place. Raises `StageError` where names match none."""
    peft = import_peft("stage 'lora'")
    _check_targets(module, settings)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear" if settings.target_modules is None else list(settings.target_modules),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's own calls of what transformers will remove
        adapted: PeftModel = peft.get_peft_model(module, config)
    return adapted


def _check_targets(module: nn.Module, settings: AdapterTraining) -> None:
    """Every name of ``target_modules`` is the end of a linear layer's name, as peft matches them."""
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    for target in settings.target_modules or ():
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            ends = sorted({name.rpartition(".")[2] for name in layers})
            raise StageError(
                f"No linear layer's name ends in {target!r}.",
                where="target_modules",
                expected=f"such as {', '.join(ends)}",
            )


def attach(checkpoint: QuantizedCheckpoint, adapter: Path, context: Context) -> QuantizedCheckpoint:
    """A copy of ``checkpoint`` in the scratch folder with ``adapter`` in it, untouched. Raises `ModelError`."""
    refuse_second(checkpoint.folder)
    config = check_adapter(adapter)
    check_fits(adapter, empty_module(checkpoint))
    folder = _copy(checkpoint, context.scratch)
    copy_adapter(adapter, folder / ADAPTER)
    context.progress.note(f"attach_lora: an adapter of rank {config.get('r')} in {ADAPTER}/, not merged")
    return QuantizedCheckpoint(folder)


def _copy(checkpoint: QuantizedCheckpoint, scratch: Path) -> Path:
    folder = scratch / "adapted"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkpoint.save(folder)
    return folder
