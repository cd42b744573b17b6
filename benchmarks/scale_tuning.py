"""Time and quality of variants of `tune_scales` on a quantized SmolLM2 checkpoint.

    python benchmarks/scale_tuning.py                      # all variants: half an hour on two idle cores
    python benchmarks/scale_tuning.py --only default short # some of them
    python benchmarks/scale_tuning.py --steps 40           # fewer steps

Every variant trains on as many tokens as the default and is evaluated on the same held-out windows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.formats.quiet_output import quiet_libraries
from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.models.model import TorchModel
from compress.models.quantized_module import load_quantized_module
from compress.sources.resolve import resolve_model
from compress.stages.base import Context
from compress.stages.gptq.stage import Gptq
from compress.stages.recovery.quantized_recovery import learn
from compress.stages.recovery.stages import TuneScales
from compress.stages.recovery.trainer import RecoveryTrainer, TokenSequences, recovery_sequences
from compress.tasks.registry import TASKS
from compress.utils.progress import SilentProgress

TASK = "text-generation"
STEPS, BATCH, LENGTH = 100, 2, 512
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "learning rate x 2": {"learning_rate": 4e-3},
    "learning rate / 2": {"learning_rate": 1e-3},
    "short": {"sequence_length": LENGTH // 2, "batch_size": 2 * BATCH},
    "twice the steps": {"batch_size": BATCH // 2},
    "half the steps": {"batch_size": 2 * BATCH},
}


def main() -> None:
    """Print a table: variant, steps, seconds, and KL divergence and perplexity before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the default variant")
    parser.add_argument("--start", type=Path, help="quantized SmolLM2 (default: quantize it first)")
    options = parser.parse_args()
    quiet_libraries()
    sys.stdout.write(f"{'variant':<22}{'steps':>6}{'seconds':>9}{'KL':>18}{'perplexity':>18}\n")
    with tempfile.TemporaryDirectory() as scratch:
        context, source = _context(Path(scratch))
        if options.start:
            start = QuantizedCheckpoint(options.start)
        else:
            start = Gptq(bits=4, group_size=64, embedding_bits=4).run(source, context)
        held_out = recovery_sequences(start, TuneScales(sequence_length=LENGTH), context).held_out
        for name in options.only:
            tokens = options.steps * BATCH * LENGTH
            fields = {"batch_size": BATCH, "sequence_length": LENGTH, **VARIANTS[name]}
            steps = tokens // (fields["batch_size"] * fields["sequence_length"])
            sys.stdout.write(f"{name:<22}{_measure(TuneScales(**fields, steps=steps), start, context, held_out)}\n")
            sys.stdout.flush()


def _context(scratch: Path) -> tuple[Context, Checkpoint]:
    task, progress = TASKS[TASK], SilentProgress()
    source = Checkpoint(resolve_model("sample:smollm2", progress=progress))
    data = load_dataset(DataConfig(source="sample:wiki", max_length=LENGTH), task.columns, Path(), progress)
    context = Context(
        task, data, LENGTH, 0, progress, lambda label: TorchModel.load(source.folder, TASKS[TASK]), Path, scratch
    )
    return context, source


def _measure(stage: TuneScales, start: QuantizedCheckpoint, context: Context, held_out: Any) -> str:
    torch.manual_seed(0)
    windows = TokenSequences(recovery_sequences(start, stage, context).train, held_out)
    module = load_quantized_module(start)
    learn(module, start)
    trainer = RecoveryTrainer.between(module, context.earlier("start"), windows, stage)
    start_time = time.perf_counter()
    before, after = trainer.train(context, "tune_scales")
    seconds = time.perf_counter() - start_time
    return (
        f"{stage.steps:>6}{seconds:>9.0f}{before.divergence:>9.4f} -> {after.divergence:.4f}"
        f"{before.perplexity:>9.2f} -> {after.perplexity:.2f} ({after.teacher_perplexity:.2f})"
    )


if __name__ == "__main__":
    main()
