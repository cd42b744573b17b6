"""Other people's quantizers of language models, on the same model, calibration and evaluation, in one table.

    python benchmarks/llm_peers.py                                   # everything; downloads several GB at first
    python benchmarks/llm_peers.py --only "llama.cpp Q4_0" --only "ONNX Runtime RTN"
    python benchmarks/llm_peers.py --bits 3 --samples 64 --only "auto-round, 200 iterations"
    git clone https://github.com/OpenGVLab/EfficientQAT AUTHORS
    python benchmarks/llm_peers.py --efficient-qat AUTHORS --bits 2 --group-size 32 --samples 64 \\
        --only "compress, block_qat" --only "EfficientQAT, Block-AP"

The model is the sample `smollm2`; calibration is 16 windows of 512 tokens of the train split of `wiki` (those that the
stage `gptq` draws), evaluation 20 windows of 512 tokens of its test split; 4 bits, symmetric, groups of 64 where a peer
lets one choose; other `--bits`, `--group-size` and `--samples` are those of the peers that take any. Peers that need
other packages get an environment of their own in the user's cache.

- `seconds` run from before the weights are loaded until the result is written, without imports.
- `peak memory` is that of the process that did it.
- `perplexity` of ONNX and GGUF files is measured through the runtime that runs them, of checkpoints by transformers in
  fp32 on the weights that their integers stand for; NNCF's compressed model is judged in the process that made it.
- `bytes` are those of the whole folder, tokenizer included; of llama.cpp's, which needs nothing else, of the file.
- `tokens/s` after 128 tokens of text: ONNX and GGUF in one interleaved session; checkpoints by transformers and
  gptqmodel, one after the other.

A peer that cannot be installed or run is a row with its reason.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from peers.environment import UnavailableError
from peers.language_peers import CONTEXT, PEERS, TOKENS, PeerResult, decode_in_transformers, float_onnx
from peers.language_setting import LanguageSetting

from compress.benchmark.generation import measure_generation
from compress.cli.output import ConsoleProgress
from compress.formats.quiet_output import quiet_libraries
from compress.formats.targets import TARGETS
from compress.recipe.recipe import Benchmark
from compress.utils.environment import environment
from compress.utils.errors import CompressError

START = "fp32"


@dataclass(frozen=True)
class Row:
    """What one peer took and gave; ``reason`` says why there is less."""

    peer: str
    seconds: float | None = None
    peak_bytes: int | None = None
    perplexity: float | None = None
    evaluated_by: str | None = None
    bytes: int | None = None
    tokens_per_second: float | None = None
    packages: Mapping[str, str] | None = None
    reason: str | None = None


def quantize(peer: str, setting: LanguageSetting) -> tuple[Row, PeerResult | None]:
    """Run a peer and judge what it left."""
    try:
        quantized = float_onnx(setting) if peer == START else PEERS[peer](setting)
        row = Row(peer, quantized.seconds, quantized.peak_bytes, bytes=quantized.bytes, packages=quantized.packages)
        if quantized.losses:
            return replace(row, **_judged(math.exp(fmean(quantized.losses)), "its own process")), quantized
        if quantized.target is None:
            return replace(
                row, **_judged(setting.perplexity_of_checkpoint(quantized.artifact), "transformers")
            ), quantized
        runtime = quantized.target.runtime
        return replace(row, **_judged(setting.perplexity(quantized.artifact, quantized.target), runtime)), quantized
    except (UnavailableError, CompressError) as error:
        return Row(peer, reason=" ".join(str(error).split())), None


def _judged(perplexity: float, by: str) -> dict[str, float | str]:
    return {"perplexity": perplexity, "evaluated_by": by}


def time_together(made: Mapping[str, PeerResult], setting: LanguageSetting, seconds: float) -> dict[str, float]:
    """Tokens per second of all that has a runtime of ours, in turns."""
    timed = {name: model for name, model in made.items() if model.target is not None}
    if not timed:
        return {}
    places = {name: model.target for name, model in timed.items() if model.target is not None}
    result = measure_generation(
        {name: model.artifact for name, model in timed.items()},
        dict.fromkeys(timed, setting.prompt(CONTEXT)),
        TARGETS["cpu"],
        Benchmark(contexts=(CONTEXT,), tokens=TOKENS, threads=setting.threads, seconds=seconds),
        next(iter(timed)),
        setting.progress,
        seed=0,
        other_targets=places,
    )
    metric = f"tokens_per_second_context_{CONTEXT}"
    return {row.model: row.value for row in result.measurements if row.metric == metric}


def time_alone(made: Mapping[str, PeerResult], setting: LanguageSetting) -> dict[str, float]:
    """Tokens per second of checkpoints, by transformers."""
    speeds = {}
    for name, model in made.items():
        if model.tokens_per_second is not None:
            speeds[name] = model.tokens_per_second
        elif model.target is None:
            try:
                speeds[name] = decode_in_transformers(model, setting)
            except UnavailableError as error:
                setting.progress.note(f"{name} does not decode: {error}")
    return speeds


def main(
    only: Annotated[list[str] | None, typer.Option(help="Peers to run; default: all.")] = None,
    model: Annotated[str, typer.Option(help="The model, as a recipe names it.")] = "sample:smollm2",
    data: Annotated[str, typer.Option(help="The text, as a recipe names it.")] = "sample:wiki",
    threads: Annotated[int, typer.Option(min=1, help="Threads of everyone.")] = 2,
    bits: Annotated[int, typer.Option(min=2, max=8, help="Bits of a weight.")] = 4,
    group_size: Annotated[int, typer.Option(min=16, help="Weights that share a scale.")] = 64,
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 16,
    seconds: Annotated[float, typer.Option(min=0.1, help="Sampling of tokens/s for each.")] = 3.0,
    decode: Annotated[bool, typer.Option(help="Measure tokens/s too.")] = True,
    efficient_qat: Annotated[Path | None, typer.Option(help="A checkout of OpenGVLab/EfficientQAT.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write everything as JSON.")] = None,
) -> None:
    """Run the peers and print the table."""
    quiet_libraries()
    names = only or list(PEERS)
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}; known are {', '.join(PEERS)}", param_hint="--only")
    with tempfile.TemporaryDirectory(prefix="compress-peers-") as scratch:
        setting = LanguageSetting(
            model, data, Path(scratch), threads, bits, group_size, ConsoleProgress(), samples=samples,
            authors=efficient_qat,
        )  # fmt: skip
        rows, models = [], {}
        for name in (START, *names):
            setting.progress.note(f"-- {name}")
            row, left = quantize(name, setting)
            rows.append(row)
            models |= {} if left is None else {name: left}
        speeds = time_together(models, setting, seconds) | time_alone(models, setting) if decode else {}
    rows = [replace(row, tokens_per_second=speeds.get(row.peer)) for row in rows]
    if output is not None:
        output.write_text(json.dumps({"rows": [asdict(row) for row in rows], "environment": environment()}, indent=1))
    typer.echo(table(rows))


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| peer | seconds | peak memory | perplexity | by | bytes | tokens/s |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if row.reason is not None:
            lines.append(f"| {row.peer} | {row.reason} | | | | | |")
            continue
        cells = [
            row.peer,
            "" if row.seconds is None else f"{row.seconds:.1f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f} GB",
            "" if row.perplexity is None else f"{row.perplexity:.2f}",
            row.evaluated_by or "",
            "" if row.bytes is None else f"{row.bytes:,}",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
