"""Compare the pruning criteria of `prune_decoder` without any training: parameters, perplexity and seconds.

    python benchmarks/cut_rules.py            # SmolLM2 on wiki
    python benchmarks/cut_rules.py --write    # also writes the results into benchmarks/results

Perplexity is that of float32 weights on the test split, which no criterion reads. Runs on any hardware.
"""

from __future__ import annotations

import json
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peers.language_setting import LanguageSetting

from compress.formats.quiet_output import quiet_libraries
from compress.models.checkpoint import Checkpoint
from compress.stages.prune_decoder.stage import PruneDecoder
from compress.utils.environment import processor
from compress.utils.progress import SilentProgress

RESULTS = Path(__file__).parent / "results" / "cut-language-models.json"
VARIANTS: dict[str, dict[str, Any]] = {
    "four blocks": {"layers": 4, "samples": 64},
    "six blocks": {"layers": 6, "samples": 64},
    "six blocks, 16 windows": {"layers": 6},
    "a third of the neurons": {"feed_forward": 1 / 3, "samples": 16},
    "a third of the neurons, 48 windows": {"feed_forward": 1 / 3, "samples": 48},
    "a third of the heads": {"heads": 1 / 3, "samples": 16},
}


def main(
    windows: Annotated[int, typer.Option(help="Evaluated windows of the test split.")] = 20,
    model: Annotated[str, typer.Option(help="Language model, as in a recipe.")] = "sample:smollm2",
    write: Annotated[bool, typer.Option("--write", help="Write the results into benchmarks/results.")] = False,
) -> None:
    """Prune the model with each variant, and evaluate the pruned models."""
    quiet_libraries()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        setting = LanguageSetting(model, "sample:wiki", Path(scratch), torch.get_num_threads(), 32, 0, SilentProgress(),
                                  windows=windows)  # fmt: skip
        original = setting.perplexity_of_checkpoint(setting.source)
        rows.append(["original", _millions(setting.source), f"{original:.2f}", ""])
        for name, fields in VARIANTS.items():
            stage = PruneDecoder.model_validate({"precision": "fastest", **fields})
            with tempfile.TemporaryDirectory(dir=setting.folder) as work:
                began = time.perf_counter()
                pruned = stage.run(Checkpoint(setting.source), setting.context(Path(work)))
                seconds = time.perf_counter() - began
                perplexity = setting.perplexity_of_checkpoint(pruned.folder)
                change = f"{perplexity:.2f} ({perplexity / original - 1:+.0%})"
                rows.append([name, _millions(pruned.folder), change, f"{seconds:.0f} s"])
            typer.echo(" | ".join(rows[-1]))
    if write:
        page = {
            "title": "Pruned language models",
            "order": 3,
            "command": "python benchmarks/cut_rules.py --write",
            "machine": f"{processor()}, {torch.get_num_threads()} threads",
            "measured": f"{date.today():%Y-%m-%d}",
            "text": "SmolLM2-135M-Instruct pruned by each criterion of `prune_decoder`, without training. "
            f"Perplexity of {windows} windows of the test split of wiki. Criteria read 512-token windows of train.",
            "tables": [
                {"title": "", "columns": ["removed", "parameters", "perplexity", "seconds"], "rows": rows},
            ],
        }
        RESULTS.write_text(json.dumps(page, indent=1) + "\n")


def _millions(folder: Path) -> str:
    checkpoint = Checkpoint(folder)
    return f"{sum(checkpoint.stored(name).numel() for name in checkpoint.files) / 1e6:.1f} M"


if __name__ == "__main__":
    typer.run(main)
