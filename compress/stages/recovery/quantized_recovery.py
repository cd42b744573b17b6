"""What a quantized checkpoint learns beside its integers: scales, norms and biases, or a LoRA adapter."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.models.checkpoint import TABLES, QuantizedCheckpoint, write_with_changes
from compress.models.lora_adapter import (
    ADAPTER,
    check_adapter,
    check_fits,
    copy_adapter,
    import_peft,
    refuse_second,
    write_adapter,
)
from compress.models.quantized_module import (
    build_empty_module,
    load_quantized_module,
    make_vectors_trainable,
    named_scaled_integers,
)
from compress.models.safetensors_file import read_tensor
from compress.stages.base import Context
from compress.stages.recovery.settings import AdapterTraining, ScaleTuning
from compress.stages.recovery.trainer import RecoveryTrainer, recovery_sequences
from compress.stages.training.processes import is_first
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from peft import PeftModel


def tune_scales(checkpoint: QuantizedCheckpoint, settings: ScaleTuning, context: Context) -> QuantizedCheckpoint:
    """Train scales, norms and biases of a copy of ``checkpoint`` in the scratch folder.

    ``checkpoint`` itself where that predicts no better. Of several processes the first one writes it.
    """
    module = load_quantized_module(checkpoint)
    learn(module, checkpoint)
    trainer = _trainer(module, checkpoint, settings, context)
    helped = trainer.helped(trainer.train(context, "tune_scales"))
    if not helped:
        context.note("tune_scales: no improvement, so the model is unchanged; a lower learning_rate may help")
    if not is_first() or not helped:
        return checkpoint
    folder = _empty(context.scratch / "tuned")
    write_with_changes(checkpoint, folder, *tuned_tensors(module, checkpoint))
    return QuantizedCheckpoint(folder)


def _trainer(
    module: PreTrainedModel, checkpoint: QuantizedCheckpoint, settings: ScaleTuning | AdapterTraining, context: Context
) -> RecoveryTrainer:
    windows = recovery_sequences(checkpoint, settings, context)
    return RecoveryTrainer.between(module, context.earlier(settings.teacher), windows, settings)


def learn(module: nn.Module, checkpoint: QuantizedCheckpoint) -> None:
    """Make scales, norms and biases trainable, in place."""
    for _, grid in named_scaled_integers(module):
        grid.log_ratio.requires_grad_(True)
    make_vectors_trainable(module, checkpoint)


@torch.no_grad()
def tuned_tensors(
    module: nn.Module, checkpoint: QuantizedCheckpoint
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the trained tensors under the checkpoint's names: the module's own, and those of its tables."""
    changed: dict[str, torch.Tensor] = {}
    tables: dict[str, torch.Tensor] = {}
    for name, grid in named_scaled_integers(module):
        scales = grid.scales().T.to(torch.float16)
        if name in checkpoint.tables:
            # The scales [groups, rows] with the rows that the file appends, as stored there.
            stored = read_tensor(checkpoint.folder / TABLES, f"{name}.scales")
            tables[f"{name}.scales"] = torch.cat([scales, stored[:, scales.shape[1] :]], dim=1)
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


def train_adapter(checkpoint: QuantizedCheckpoint, settings: AdapterTraining, context: Context) -> QuantizedCheckpoint:
    """Train an adapter in a copy of ``checkpoint`` in the scratch folder; the base keeps its bytes.

    Of several processes the first one writes it.
    """
    refuse_second(checkpoint.folder)
    module = load_quantized_module(checkpoint)
    adapted = adapt(module, settings, context.seed)
    trainer = _trainer(module, checkpoint, settings, context)
    recovered = trainer.train(context, "lora_recovery")
    if not trainer.helped(recovered):
        raise StageError(f"Training did not help: {recovered}.", hint="lower learning_rate, or leave the stage out")
    if not is_first():
        return checkpoint
    folder = _copy(checkpoint, context.scratch)
    write_adapter(adapted, folder / ADAPTER)
    return QuantizedCheckpoint(folder)


def adapt(module: PreTrainedModel, settings: AdapterTraining, seed: int) -> PeftModel:
    """Put new adapters around linear layers of ``module``, in place. Raises `StageError` where names match none."""
    peft = import_peft("stage 'lora_recovery'")
    # Every name of ``target_modules`` is the end of a linear layer's name, as peft matches them.
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    for target in settings.target_modules or ():
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            ends = sorted({name.rpartition(".")[2] for name in layers})
            raise StageError(
                f"No linear layer's name ends in {target!r}.",
                where="target_modules",
                expected=f"such as {', '.join(ends)}",
            )
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        target_modules="all-linear" if settings.target_modules is None else list(settings.target_modules),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's own calls of what transformers will remove
        adapted: PeftModel = peft.get_peft_model(module, config)
    return adapted


def attach(checkpoint: QuantizedCheckpoint, adapter: Path, context: Context) -> QuantizedCheckpoint:
    """Copy ``checkpoint`` into the scratch folder with ``adapter`` in it, untouched. Raises `ModelError`."""
    refuse_second(checkpoint.folder)
    config = check_adapter(adapter)
    check_fits(adapter, build_empty_module(checkpoint))
    folder = _copy(checkpoint, context.scratch)
    copy_adapter(adapter, folder / ADAPTER)
    context.progress.note(f"attach_lora: an adapter of rank {config.get('r')} in {ADAPTER}/, not merged")
    return QuantizedCheckpoint(folder)


def _copy(checkpoint: QuantizedCheckpoint, scratch: Path) -> Path:
    folder = _empty(scratch / "adapted")
    checkpoint.save(folder)
    return folder


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
