"""Compare quantizers of language models on the same model, calibration text and evaluation.

    python benchmarks/llm_peers.py                                   # all; the first run downloads several GB
    python benchmarks/llm_peers.py --only "llama.cpp Q4_0" --only "ONNX Runtime RTN"
    python benchmarks/llm_peers.py --bits 3 --samples 64 --only "auto-round, 200 iterations"
    git clone https://github.com/OpenGVLab/EfficientQAT AUTHORS
    python benchmarks/llm_peers.py --efficient-qat AUTHORS --bits 2 --group-size 32 --samples 64 \\
        --only "compress, block_qat" --only "EfficientQAT, Block-AP"

The model is the sample `smollm2`. Calibration uses 16 windows of 512 tokens of the train split of `wiki` (those of the
stage `gptq`), evaluation 20 windows of 512 tokens of its test split. Weights have 4 bits, symmetric, in groups of 64.
`--bits`, `--group-size` and `--samples` change this for the quantizers that support it. Quantizers that need other
packages run in separate environments in the user's cache.

- `seconds` include loading the weights and writing the result, but not imports.
- `peak memory` is that of the quantizing process.
- `perplexity` of ONNX and GGUF files is measured in their runtime, that of checkpoints by transformers in fp32 on the
  dequantized weights. NNCF's compressed model is evaluated in the process that created it.
- `bytes` are those of the whole folder with the tokenizer, or of the self-contained file of llama.cpp.
- `tokens/s` are measured after 128 tokens of text: ONNX and GGUF interleaved in one session, checkpoints one after the
  other by transformers and gptqmodel.

A quantizer that cannot be installed or run has a row with the reason.
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
from compress.formats.quiet_output import quiet_libraries
from compress.formats.targets import TARGETS
from compress.recipe.recipe import Benchmark
from compress.report.progress import ConsoleProgress
from compress.utils.environment import environment
from compress.utils.errors import CompressError

BASELINE = "fp32"


@dataclass(frozen=True)
class Row:
    """Results of one quantizer; ``reason`` explains missing values."""

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
    """Run a quantizer and evaluate its model."""
    try:
        quantized = float_onnx(setting) if peer == BASELINE else PEERS[peer](setting)
        row = Row(peer, quantized.seconds, quantized.peak_bytes, bytes=quantized.bytes, packages=quantized.packages)
        if quantized.losses:
            perplexity, runtime = math.exp(fmean(quantized.losses)), "its own process"
        elif quantized.target is None:
            perplexity, runtime = setting.perplexity_of_checkpoint(quantized.artifact), "transformers"
        else:
            runtime = quantized.target.runtime
            perplexity = setting.perplexity(quantized.artifact, quantized.target)
        return replace(row, perplexity=perplexity, evaluated_by=runtime), quantized
    except (UnavailableError, CompressError) as error:
        return Row(peer, reason=" ".join(str(error).split())), None


def time_interleaved(models: Mapping[str, PeerResult], setting: LanguageSetting, seconds: float) -> dict[str, float]:
    """Return the tokens per second of the models with a runtime, measured interleaved."""
    targets = {name: model.target for name, model in models.items() if model.target is not None}
    if not targets:
        return {}
    result = measure_generation(
        {name: models[name].artifact for name in targets},
        dict.fromkeys(targets, setting.prompt(CONTEXT)),
        TARGETS["cpu"],
        Benchmark(contexts=(CONTEXT,), tokens=TOKENS, threads=setting.threads, seconds=seconds),
        next(iter(targets)),
        setting.progress,
        seed=0,
        other_targets=targets,
    )
    metric = f"tokens_per_second_context_{CONTEXT}"
    return {row.model: row.value for row in result.measurements if row.metric == metric}


def time_checkpoints(models: Mapping[str, PeerResult], setting: LanguageSetting) -> dict[str, float]:
    """Return the tokens per second of checkpoints, measured by transformers or by the quantizer itself."""
    speeds = {}
    for name, model in models.items():
        if model.tokens_per_second is not None:
            speeds[name] = model.tokens_per_second
        elif model.target is None:
            try:
                speeds[name] = decode_in_transformers(model, setting)
            except UnavailableError as error:
                setting.progress.note(f"{name} cannot be decoded: {error}")
    return speeds


def main(
    only: Annotated[list[str] | None, typer.Option(help="Quantizers to run; default: all.")] = None,
    model: Annotated[str, typer.Option(help="Model, as in a recipe.")] = "sample:smollm2",
    data: Annotated[str, typer.Option(help="Text data, as in a recipe.")] = "sample:wiki",
    threads: Annotated[int, typer.Option(min=1, help="Threads of all runs.")] = 2,
    bits: Annotated[int, typer.Option(min=2, max=8, help="Bits per weight.")] = 4,
    group_size: Annotated[int, typer.Option(min=16, help="Weights per scale.")] = 64,
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 16,
    seconds: Annotated[float, typer.Option(min=0.1, help="Sampling time of tokens/s per model.")] = 3.0,
    decode: Annotated[bool, typer.Option(help="Measure tokens/s.")] = True,
    efficient_qat: Annotated[Path | None, typer.Option(help="A checkout of OpenGVLab/EfficientQAT.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
) -> None:
    """Run the quantizers and print the table."""
    quiet_libraries()
    names = only or list(PEERS)
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}; known: {', '.join(PEERS)}", param_hint="--only")
    with tempfile.TemporaryDirectory(prefix="compress-peers-") as scratch:
        setting = LanguageSetting(
            model, data, Path(scratch), threads, bits, group_size, ConsoleProgress(), samples=samples,
            authors=efficient_qat,
        )  # fmt: skip
        rows: list[Row] = []
        models: dict[str, PeerResult] = {}
        for name in (BASELINE, *names):
            setting.progress.note(f"-- {name}")
            row, quantized = quantize(name, setting)
            rows.append(row)
            models |= {} if quantized is None else {name: quantized}
        speeds = time_interleaved(models, setting, seconds) | time_checkpoints(models, setting) if decode else {}
    rows = [replace(row, tokens_per_second=speeds.get(row.peer)) for row in rows]
    if output is not None:
        output.write_text(json.dumps({"rows": [asdict(row) for row in rows], "environment": environment()}, indent=1))
    typer.echo(table(rows))


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
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
