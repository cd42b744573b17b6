"""A language model cut by each rule, before anything is taught: parameters, perplexity, seconds.

    python benchmarks/cut_rules.py            # SmolLM2, a third of its neurons or four blocks; wiki
    python benchmarks/cut_rules.py --write    # and puts the figures into results/

Perplexity is that of float32 weights on windows of the test split, which no rule has read. Hardware: any.
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
RULES: dict[str, dict[str, Any]] = {
    **{
        f"{label} blocks, {rule}": {"layers": count, "samples": 64, **fields}
        for label, count in {"four": 4, "six": 6}.items()
        for rule, fields in {
            "block_influence (ShortGPT)": {"layer_importance": "block_influence", "compensate": False},
            "neighbours": {"compensate": False},
            "block_influence, compensated": {"layer_importance": "block_influence"},
            "neighbours, compensated (ReplaceMe)": {},
        }.items()
    },
    "four blocks, greedy": {"layers": 4, "layer_importance": "greedy", "samples": 2, "compensate": False},
    "six blocks, neighbours, compensated, 16 windows": {"layers": 6},
    "a third of the neurons, activation (Minitron)": {"feed_forward": 1 / 3, "width_importance": "activation"},
    "a third of the neurons, obs": {"feed_forward": 1 / 3, "samples": 16},
    "a third of the neurons, obs, 48 windows": {"feed_forward": 1 / 3, "samples": 48},
    "a third of the heads, activation (Minitron)": {"heads": 1 / 3, "width_importance": "activation"},
    "a third of the heads, obs": {"heads": 1 / 3, "samples": 16},
}


def main(
    windows: Annotated[int, typer.Option(help="Windows of the test split.")] = 20,
    model: Annotated[str, typer.Option(help="A language model.")] = "sample:smollm2",
    write: Annotated[bool, typer.Option("--write", help="Put the figures into results/.")] = False,
) -> None:
    """Cut the model by each rule, and judge what is left."""
    quiet_libraries()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        setting = LanguageSetting(model, "sample:wiki", Path(scratch), torch.get_num_threads(), 32, 0, SilentProgress(),
                                  windows=windows)  # fmt: skip
        whole = setting.perplexity_of_checkpoint(setting.source)
        rows.append(["all of it", _millions(setting.source), f"{whole:.2f}", ""])
        for rule, fields in RULES.items():
            stage = PruneDecoder.model_validate({"precision": "fastest", **fields})
            with tempfile.TemporaryDirectory(dir=setting.folder) as work:
                began = time.perf_counter()
                pruned = stage.run(Checkpoint(setting.source), setting.context(Path(work)))
                seconds = time.perf_counter() - began
                perplexity = setting.perplexity_of_checkpoint(pruned.folder)
                rows.append(
                    [
                        rule,
                        _millions(pruned.folder),
                        f"{perplexity:.2f} ({perplexity / whole - 1:+.0%})",
                        f"{seconds:.0f} s",
                    ]
                )
            typer.echo(" | ".join(rows[-1]))
    if write:
        page = {
            "title": "Cut language models",
            "order": 3,
            "command": "python benchmarks/cut_rules.py --write",
            "machine": f"{processor()}, {torch.get_num_threads()} threads",
            "measured": f"{date.today():%Y-%m-%d}",
            "text": "SmolLM2-135M-Instruct by each rule of `prune_decoder`, before any training or rounding. "
            f"Perplexity of {windows} windows of the test split of wiki; rules read windows of 512 tokens of train.",
            "tables": [{"title": "", "columns": ["what goes", "parameters", "perplexity", "seconds"], "rows": rows}],
        }
        RESULTS.write_text(json.dumps(page, indent=1) + "\n")


def _millions(folder: Path) -> str:
    checkpoint = Checkpoint(folder)
    return f"{sum(checkpoint.stored(name).numel() for name in checkpoint.files) / 1e6:.1f} M"


if __name__ == "__main__":
    typer.run(main)
