"""Speed of generating synthetic conversations with a chat model (`teacher_writes`), in torch and openvino-genai.

    python benchmarks/teacher_writing.py                              # sample:smollm2, 128 conversations
    python benchmarks/teacher_writing.py --conversations 256 --turns 3 --output writing.json

Seconds are those of the whole stage; for openvino-genai this includes writing, verifying and opening the IR. The model
runs in bf16 if matrix products are faster in it. The two runtimes alternate. Run it on an idle machine.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from peers.language_setting import LanguageSetting

from compress.formats.quiet_output import quiet_libraries
from compress.models.model import TorchModel
from compress.stages.training.sequences import TokenSequences
from compress.stages.training.settings import TeacherWrites
from compress.stages.training.synthetic_data import with_synthetic_text
from compress.tasks.task import Examples
from compress.utils.environment import environment
from compress.utils.progress import SilentProgress
from compress.utils.torch_device import uses_bf16

RUNTIMES = ("torch", "openvino")


def time_generation(setting: LanguageSetting, runtime: Any, conversations: int, seed: int) -> dict[str, float]:
    """Return the number of tokens that a runtime generates, and the seconds."""
    teacher: TorchModel = setting.task.load(setting.source, None, False)
    window = {"input_ids": np.zeros(setting.length, np.int64)}
    windows = TokenSequences(Examples([window], {"input_ids": 0}), Examples([window], {"input_ids": 0}))
    with tempfile.TemporaryDirectory() as scratch:
        context = replace(setting.context(Path(scratch)), seed=seed)
        start = time.perf_counter()
        settings = TeacherWrites(conversations=conversations, runtime=runtime)
        with_synthetic_text(windows, settings, teacher, teacher.processor, context, uses_bf16("fastest"))
        seconds = time.perf_counter() - start
    counts = [re.search(r"wrote ([\d,]+) tokens", line) for line in context.notes]
    return {"tokens": sum(int(count[1].replace(",", "")) for count in counts if count), "seconds": seconds}


def main(
    model: Annotated[str, typer.Option(help="Chat model.")] = "sample:smollm2",
    conversations: Annotated[int, typer.Option(min=1)] = 128,
    turns: Annotated[int, typer.Option(min=1)] = 2,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    output: Annotated[Path | None, typer.Option(help="File for the results as JSON.")] = None,
) -> None:
    """Time both runtimes alternately."""
    quiet_libraries()
    torch.set_num_threads(threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        setting = LanguageSetting(model, "sample:wiki", Path(folder), threads, 4, 64, SilentProgress())
        for turn in range(turns):
            for runtime in RUNTIMES[:: 1 if turn % 2 == 0 else -1]:
                rows.append({"runtime": runtime, **time_generation(setting, runtime, conversations, turn)})
                row = rows[-1]
                typer.echo(
                    f"{runtime}: {row['tokens']:,} tokens in {row['seconds']:.0f} s, "
                    f"{row['tokens'] / row['seconds']:.0f} tokens/s"
                )
    if output is not None:
        output.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    typer.run(main)
