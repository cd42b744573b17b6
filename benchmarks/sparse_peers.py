"""Wanda and SparseGPT with 50% sparsity on a language model: our implementation compared with the authors' code.

    git clone https://github.com/locuslab/wanda AUTHORS       # MIT; includes SparseGPT
    python benchmarks/sparse_peers.py AUTHORS                 # 64 windows of 512 tokens of the wiki sample
    python benchmarks/sparse_peers.py AUTHORS --write         # also write results/

Both use the same float32 weights, calibration windows and sparsity, and are evaluated on the same windows of the test
split. The authors' code runs unchanged except for three adaptations: blocks get their rotary embeddings from the model,
as in current versions of transformers; there is one device; and the calibration text is ours.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from peers.language_setting import LanguageSetting

from compress.formats.quiet_output import quiet_libraries
from compress.models.checkpoint import Checkpoint
from compress.stages.sparsify.stages import SparsifyDecoder
from compress.utils.environment import processor
from compress.utils.progress import SilentProgress

RESULTS = Path(__file__).parent / "results" / "sparse-language-models.json"
PATTERNS = {"50%": (0.5, None), "2:4": (None, "2:4")}


def main(
    authors: Annotated[Path, typer.Argument(help="Checkout of locuslab/wanda.")],
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    windows: Annotated[int, typer.Option(help="Test windows.")] = 20,
    model: Annotated[str, typer.Option(help="Llama-like model.")] = "sample:smollm2",
    patterns: Annotated[list[str], typer.Option("--pattern", help="Sparsity: 50% or 2:4.")] = list(PATTERNS),  # noqa: B006
    write: Annotated[bool, typer.Option("--write", help="Write the results to results/.")] = False,
) -> None:
    """Compare perplexity and seconds of each method."""
    if unknown := [name for name in patterns if name not in PATTERNS]:
        raise typer.BadParameter(f"{', '.join(unknown)}; known are {', '.join(PATTERNS)}", param_hint="--pattern")
    quiet_libraries()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        setting = LanguageSetting(model, "sample:wiki", Path(scratch), torch.get_num_threads(), 32, 0, SilentProgress(),
                                  samples=samples, windows=windows)  # fmt: skip
        dense = setting.perplexity_of_checkpoint(setting.source)
        for method in ("wanda", "sparsegpt"):
            for label, (share, pattern) in ((label, PATTERNS[label]) for label in patterns):
                ours, seconds = _run_ours(setting, method, share, pattern)
                theirs, their_seconds = _run_authors(setting, authors, method, share, pattern)
                row = [f"{method}, {label}", f"{theirs:.2f} in {their_seconds:.0f} s", f"{ours:.2f} in {seconds:.0f} s",
                       f"{ours / theirs - 1:+.2%}"]  # fmt: skip
                rows.append(row)
                typer.echo(" | ".join(row))
    typer.echo(f"dense: {dense:.2f}")
    if write:
        page = {
            "title": "Zeros in language models",
            "order": 22,
            "command": "python benchmarks/sparse_peers.py AUTHORS --write",
            "machine": f"{processor()}, {torch.get_num_threads()} threads",
            "measured": f"{date.today():%Y-%m-%d}",
            "text": f"SmolLM2-135M with 50% sparsity in its blocks, {samples} calibration windows of "
            f"{setting.length} tokens of wiki; perplexity on {windows} windows of the test split, {dense:.2f} for the "
            "dense model. The authors' code is that of locuslab/wanda.",
            "tables": [{"title": "", "columns": ["method", "the authors' code", "ours", "difference"], "rows": rows}],
        }
        RESULTS.write_text(json.dumps(page, indent=1) + "\n")


def _run_ours(setting: LanguageSetting, method: str, share: float | None, pattern: str | None) -> tuple[float, float]:
    """Return perplexity and seconds of the stage `sparsify_decoder`."""
    zeros = {"pattern": pattern} if pattern else {"sparsity": share}
    fields = {"method": method, "samples": setting.samples, "sequence_length": setting.length, "precision": "fp32"}
    stage = SparsifyDecoder.model_validate({**zeros, **fields})
    with tempfile.TemporaryDirectory(dir=setting.folder) as scratch:
        start = time.perf_counter()
        pruned = stage.run(Checkpoint(setting.source), setting.context(Path(scratch)))
        seconds = time.perf_counter() - start
        return setting.perplexity_of_checkpoint(pruned.folder), seconds


def _run_authors(
    setting: LanguageSetting, authors: Path, method: str, share: float | None, pattern: str | None
) -> tuple[float, float]:
    """Return perplexity and seconds of the authors' `prune_wanda` or `prune_sparsegpt`."""
    prune = _authors_function(authors, method, setting)
    loaded = setting.task.load(setting.source, None, False)
    model = loaded.module
    model.seqlen, model.hf_device_map = setting.length, {}
    handles = [
        layer.register_forward_pre_hook(_add_rotary_embeddings(model), with_kwargs=True) for layer in model.model.layers
    ]
    zeros, group = map(int, pattern.split(":")) if pattern else (0, 0)
    arguments = Namespace(nsamples=setting.samples, seed=0, sparsity_ratio=share or 0.5, use_variant=False)
    start = time.perf_counter()
    prune(arguments, model, None, torch.device("cpu"), zeros, group)
    seconds = time.perf_counter() - start
    for handle in handles:
        handle.remove()
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        loaded.save(Path(folder))
        return setting.perplexity_of_checkpoint(Path(folder)), seconds


def _authors_function(authors: Path, method: str, setting: LanguageSetting) -> Callable[..., None]:
    """Import the authors' function, with our calibration windows and without CUDA synchronization."""
    sys.path.insert(0, str(authors))
    # Replace the authors' data loader, which is not used.
    sys.modules.setdefault("lib.data", Namespace(get_loaders=None))  # type: ignore[arg-type]
    import lib.prune  # type: ignore[import-not-found]

    ids = torch.from_numpy(np.load(setting.calibration)).long()
    lib.prune.get_loaders = lambda *_, **__: ([(window[None],) for window in ids], None)
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None
    function: Callable[..., None] = getattr(lib.prune, f"prune_{method}")
    return function


def _add_rotary_embeddings(model: Any) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Return a hook that passes the model's rotary embeddings to a block."""

    def hook(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if named.get("position_embeddings") is None:
            position_ids = named.get("position_ids")
            named["position_embeddings"] = model.model.rotary_emb(arguments[0], position_ids=position_ids)
        return arguments, named

    return hook


if __name__ == "__main__":
    typer.run(main)
