"""Half of a language model's weights to zero by Wanda and SparseGPT: ours, and the authors' own code, side by side.

    git clone https://github.com/locuslab/wanda AUTHORS       # MIT; it has SparseGPT's code too
    python benchmarks/sparse_peers.py AUTHORS                 # 64 windows of 512 tokens of the wiki sample
    python benchmarks/sparse_peers.py AUTHORS --write         # and puts the figures into results/

Both are given the same float32 weights, calibration windows and sparsity, and are judged by the same windows of the
test split. The authors' walk over the blocks runs as it is, but for three things that have moved since: a model gives
its blocks their rotary angles now, there is one device, and text comes from here.
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
    authors: Annotated[Path, typer.Argument(help="A checkout of locuslab/wanda.")],
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    windows: Annotated[int, typer.Option(help="Windows of the test split.")] = 20,
    model: Annotated[str, typer.Option(help="A Llama-like model.")] = "sample:smollm2",
    patterns: Annotated[list[str], typer.Option("--pattern", help="50%, 2:4.")] = list(PATTERNS),  # noqa: B006
    write: Annotated[bool, typer.Option("--write", help="Put the figures into results/.")] = False,
) -> None:
    """Perplexity and seconds of each method, theirs and ours."""
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
                ours, seconds = _ours(setting, method, share, pattern)
                theirs, taken = _theirs(setting, authors, method, share, pattern)
                row = [f"{method}, {label}", f"{theirs:.2f} in {taken:.0f} s", f"{ours:.2f} in {seconds:.0f} s",
                       f"{ours / theirs - 1:+.2%}"]  # fmt: skip
                rows.append(row)
                typer.echo(" | ".join(row))
    typer.echo(f"whole: {dense:.2f}")
    if write:
        page = {
            "title": "Zeros in language models",
            "order": 22,
            "command": "python benchmarks/sparse_peers.py AUTHORS --write",
            "machine": f"{processor()}, {torch.get_num_threads()} threads",
            "measured": f"{date.today():%Y-%m-%d}",
            "text": f"SmolLM2-135M with half of the weights of its blocks zero, {samples} calibration windows of "
            f"{setting.length} tokens of wiki; perplexity of {windows} windows of the test split, {dense:.2f} of the "
            "whole model. The authors' code is that of locuslab/wanda.",
            "tables": [{"title": "", "columns": ["what", "the authors' code", "ours", "apart"], "rows": rows}],
        }
        RESULTS.write_text(json.dumps(page, indent=1) + "\n")


def _ours(setting: LanguageSetting, method: str, share: float | None, pattern: str | None) -> tuple[float, float]:
    """Perplexity and seconds of the stage `sparsify_decoder`."""
    zeros = {"pattern": pattern} if pattern else {"sparsity": share}
    fields = {"method": method, "samples": setting.samples, "sequence_length": setting.length, "precision": "fp32"}
    stage = SparsifyDecoder.model_validate({**zeros, **fields})
    with tempfile.TemporaryDirectory(dir=setting.folder) as scratch:
        began = time.perf_counter()
        pruned = stage.run(Checkpoint(setting.source), setting.context(Path(scratch)))
        seconds = time.perf_counter() - began
        return setting.perplexity_of_checkpoint(pruned.folder), seconds


def _theirs(
    setting: LanguageSetting, authors: Path, method: str, share: float | None, pattern: str | None
) -> tuple[float, float]:
    """The same of the authors' functions `prune_wanda` and `prune_sparsegpt`."""
    walk = _authors_walk(authors, method, setting)
    loaded = setting.task.load(setting.source, None, False)
    model = loaded.module
    model.seqlen, model.hf_device_map = setting.length, {}
    handles = [layer.register_forward_pre_hook(_with_angles(model), with_kwargs=True) for layer in model.model.layers]
    zeros, of = map(int, pattern.split(":")) if pattern else (0, 0)
    asked = Namespace(nsamples=setting.samples, seed=0, sparsity_ratio=share or 0.5, use_variant=False)
    began = time.perf_counter()
    walk(asked, model, None, torch.device("cpu"), zeros, of)
    seconds = time.perf_counter() - began
    for handle in handles:
        handle.remove()
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        loaded.save(Path(folder))
        return setting.perplexity_of_checkpoint(Path(folder)), seconds


def _authors_walk(authors: Path, method: str, setting: LanguageSetting) -> Callable[..., None]:
    """Their function, given our windows of text; on a machine without CUDA it has nothing to wait for."""
    sys.path.insert(0, str(authors))
    # What they draw their own text with, which isn't read here.
    sys.modules.setdefault("lib.data", Namespace(get_loaders=None))  # type: ignore[arg-type]
    import lib.prune  # type: ignore[import-not-found]

    ids = torch.from_numpy(np.load(setting.calibration)).long()
    lib.prune.get_loaders = lambda *_, **__: ([(window[None],) for window in ids], None)
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None
    walk: Callable[..., None] = getattr(lib.prune, f"prune_{method}")
    return walk


def _with_angles(model: Any) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A hook that gives a block the rotary angles that its model computes for it."""

    def hook(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if named.get("position_embeddings") is None:
            places = named.get("position_ids")
            named["position_embeddings"] = model.model.rotary_emb(given[0], position_ids=places)
        return given, named

    return hook


if __name__ == "__main__":
    typer.run(main)
