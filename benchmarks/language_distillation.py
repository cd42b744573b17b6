"""What distillation gives back to SmolLM2-135M with some of its blocks gone: tokens a second, memory, perplexity.

    python benchmarks/language_distillation.py teach FOLDER --budget 3m        # trains, and saves the student
    python benchmarks/language_distillation.py judge FOLDER [--of cut]         # on smollm2-int4's test windows
    python benchmarks/language_distillation.py states FOLDER --tokens 20480    # a second student, states known or not

Hardware: any; the figures in the notes of a release name theirs. The wiki sample must be fetched.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.architectures.transformer import keep_layers
from compress.checkpoints.torch_model import TorchModel
from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.formats.silence import quiet_libraries
from compress.progress import SilentProgress
from compress.sources.source import resolve_model
from compress.stage.stage import Context
from compress.stages.distill import Distill
from compress.tasks.evaluation import Evaluation
from compress.tasks.registry import get_task

LENGTH, BLOCKS = 512, 30
DROPPED = (20, 22, 24, 26)
TASK = get_task("text-generation")


class _Told(SilentProgress):
    def note(self, message: str) -> None:
        """Say it at once."""
        sys.stdout.write(f"{message}\n")
        sys.stdout.flush()


def main() -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("teach", "judge", "states"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budget")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--of", choices=("student", "cut", "teacher"), default="student", help="whom to judge")
    parser.add_argument("--drop", type=int, nargs="+", default=list(DROPPED))
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other fields of the stage")
    options = parser.parse_args()
    quiet_libraries()
    kept = [place for place in range(BLOCKS) if place not in options.drop]
    if options.command == "judge":
        _judge(options.folder, options.of, kept)
        return
    fields: dict[str, Any] = {"batch_size": 2, "learning_rate": 1e-4, "temperature": 1.0, "precision": "fastest"}
    fields |= {"budget": options.budget} if options.budget else {"tokens": options.tokens or 20 * 2 * LENGTH}
    fields |= dict(field.split("=") for field in options.set)
    stage = Distill.model_validate({**fields, "student": {"layers": kept}})
    if options.command == "teach":
        student = _taught(stage, options.folder / "work", None)
        student.save(options.folder)
        return
    for name in ("first", "second", "none"):
        chosen = stage.model_copy(update={"keep_states": name != "none"})
        began = time.perf_counter()
        _taught(chosen, options.folder / name, options.folder / "states")
        sys.stdout.write(f"{name}: {time.perf_counter() - began:.1f} s in all\n")


def _taught(stage: Distill, scratch: Path, shared: Path | None) -> TorchModel:
    context = _context(scratch, shared)
    began = time.perf_counter()
    student = stage.run(_model(), context)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    sys.stdout.write(f"{time.perf_counter() - began:.1f} s, {torch.get_num_threads()} threads, peak {peak:.2f} GB\n")
    return student


def _model() -> TorchModel:
    return TASK.load(resolve_model("sample:smollm2", progress=SilentProgress()), None, False)


def _context(scratch: Path, shared: Path | None) -> Context:
    data = load_dataset(DataConfig(source="sample:wiki", max_length=LENGTH), TASK.columns, Path(), SilentProgress())
    made = Context(TASK, data, LENGTH, 0, _Told(), lambda label: _model(), Path, scratch)
    return made if shared is None else replace(made, shared=lambda key: shared / key)


def _judge(folder: Path, name: str, kept: list[int]) -> None:
    model = TorchModel.load(folder, TASK) if name == "student" else _model()
    if name == "cut":
        keep_layers(model.module, kept)
    rows, kept_file = _context(folder, None).data.split("test"), folder / f"{name}.json"
    losses = json.loads(kept_file.read_text()) if kept_file.is_file() else []
    windows = TASK.held_out(rows, model.processor, None, LENGTH, Evaluation(windows=20)).inputs
    for window in windows[len(losses) :]:
        ids = torch.from_numpy(window["input_ids"])[None]
        with torch.inference_mode():
            losses.append(float(model.module(input_ids=ids, labels=ids).loss))
        folder.mkdir(parents=True, exist_ok=True)
        kept_file.write_text(json.dumps(losses))  # a killed run goes on
    sys.stdout.write(f"{name}: perplexity {np.exp(np.mean(losses)):.2f} on {len(losses)} windows of {LENGTH}\n")


if __name__ == "__main__":
    main()
