"""Quantization time, perplexity, size and decode speed of 4-bit SmolLM2-135M, compared with other tools.

    python benchmarks/smollm2.py                       # ours and llama.cpp
    python benchmarks/smollm2.py --peers               # also Optimum and auto-round; downloads several GB once
    python benchmarks/smollm2.py --recipe recipes/smollm2-int4.yaml --output smollm2.json

The recipe (default: `recipes/smollm2-int4.yaml`) runs with an empty cache; `seconds` is the time of its stages without
the pipeline's checks. GPTQ without guidance on the linear layers, with 4 bits in groups of 64, is run and evaluated
like the other tools. The recipe's quantized checkpoint is written as GGUF with the same integers (Q4_0) and as OpenVINO
IR. The decode speeds of fp32 ONNX, 4-bit ONNX, IR and GGUF are measured in one interleaved session; llama.cpp is its
official release for this processor with the same number of threads. `at least` and `aim` are the project's goals.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from peers.environment import UnavailableError
from peers.language_peers import CONTEXT, OURS, PEERS, TOKENS, PeerResult, float_onnx
from peers.language_setting import LanguageSetting
from peers.llama_cpp_library import llama_cpp_library

from compress.benchmark.generation import measure_generation
from compress.benchmark.session import BenchmarkResult
from compress.formats.gguf.export import write_companions, write_gguf
from compress.formats.gguf.llama_cpp_library import VARIABLE
from compress.formats.openvino.decoder import write_decoder
from compress.formats.quiet_output import quiet_libraries
from compress.formats.targets import TARGETS
from compress.models.checkpoint import QuantizedCheckpoint
from compress.pipeline.cache import Cache
from compress.pipeline.run import Run, run
from compress.recipe.loading import read_recipe
from compress.recipe.recipe import Benchmark, Recipe
from compress.report.progress import ConsoleProgress
from compress.results.report import BASELINE, FINAL
from compress.utils.environment import environment
from compress.utils.errors import CompressError
from compress.utils.progress import Progress
from compress.utils.storage import size_bytes

RECIPE = Path(__file__).parents[1] / "recipes" / "smollm2-int4.yaml"
STEP = f"time_per_output_token_context_{CONTEXT}"
ONNX, FLOAT, LLAMA_CPP, OPENVINO = "4-bit ONNX", "fp32 ONNX", "llama.cpp Q4_0", "4-bit OpenVINO"
OPTIMUM, AUTO_ROUND = "Optimum + gptqmodel", "auto-round"


@dataclass(frozen=True)
class Line:
    """One line of the table; ``measured`` is None if not measured, and ``how`` has details or the reason."""

    what: str
    at_least: str
    aim: str
    measured: float | None
    unit: str = ""
    how: str = ""


@dataclass(frozen=True)
class RecipeRun:
    """A run of a recipe, with the folder of its quantized checkpoint."""

    run: Run
    checkpoint: Path

    @property
    def seconds(self) -> float:
        """Seconds of all stages except the export."""
        return sum(stage.seconds for stage in self.run.report.stages if stage.name != "onnx")

    def value(self, metric: str, model: str = FINAL) -> float | None:
        """Return a value of the report, on the CPU."""
        row = self.run.report.find(model, metric, "cpu")
        return None if row is None else row.value


def run_recipe(recipe: Recipe, folder: Path, artifacts: Path, progress: Progress) -> RecipeRun:
    """Run ``recipe`` and return it with the output of the last stage before the export."""
    done = run(recipe, folder, artifacts, progress, remeasure=True)
    last = [stage for stage in done.report.stages if stage.name != "onnx"][-1]
    entry = Cache(artifacts / "cache").peek(last.key)
    assert entry is not None, "outputs of stages are cached"
    return RecipeRun(done, entry.folder)


def export_gguf(checkpoint: Path, folder: Path) -> Path:
    """Write a quantized checkpoint as GGUF with the same integers."""
    folder.mkdir()
    source = QuantizedCheckpoint(checkpoint)
    write_companions(source, folder)
    write_gguf(source, folder / "model.gguf")
    return folder


def export_openvino(checkpoint: Path, folder: Path, prompt: Sequence[int]) -> Path:
    """Write a quantized checkpoint as OpenVINO IR with the same integers, verified on the halves of a prompt."""
    folder.mkdir()
    write_decoder(QuantizedCheckpoint(checkpoint), "fp32", 8, np.array(prompt).reshape(2, -1), 1e-3).model.save(folder)
    return folder


def decode_together(
    artifacts: Mapping[str, Path], text: Sequence[int], threads: int, seconds: float, progress: Progress
) -> BenchmarkResult:
    """Measure the decode speed of all artifacts in one interleaved session, with llama.cpp's official release."""
    os.environ[VARIABLE] = str(llama_cpp_library())
    return measure_generation(
        artifacts,
        dict.fromkeys(artifacts, text),
        TARGETS["cpu"],
        Benchmark(contexts=(CONTEXT,), tokens=TOKENS, threads=threads, seconds=seconds),
        LLAMA_CPP,
        progress,
        seed=0,
        other_targets={LLAMA_CPP: TARGETS["llama-cpp"], OPENVINO: TARGETS["openvino"]},
    )


def run_quantizers(
    names: Sequence[str], setting: LanguageSetting
) -> tuple[dict[str, tuple[PeerResult, float]], dict[str, str]]:
    """Run quantizers; return each result with its perplexity, and the reasons for quantizers that are unavailable."""
    quantized, reasons = {}, {}
    for name in names:
        setting.progress.note(f"-- {name}")
        try:
            result = PEERS[name](setting)
            quantized[name] = (result, setting.perplexity_of_checkpoint(result.artifact))
        except (UnavailableError, CompressError) as error:
            reasons[name] = " ".join(str(error).split())
    return quantized, reasons


def make_lines(
    main: RecipeRun,
    decode: BenchmarkResult,
    quantized: Mapping[str, tuple[PeerResult, float]],
    reasons: Mapping[str, str],
) -> list[Line]:
    """Return the lines of the table."""
    quick, optimum, auto = quantized.get(OURS), quantized.get(OPTIMUM), quantized.get(AUTO_ROUND)
    float_perplexity, perplexity = main.value("perplexity", BASELINE), main.value("perplexity")
    over, quick_over = _increase(perplexity, float_perplexity), _increase(quick and quick[1], float_perplexity)
    bits = main.value("bits_per_parameter")
    versus_peer = reasons.get(OPTIMUM, "" if optimum is None else f"{optimum[0].seconds:.0f} s")
    versus_auto = reasons.get(
        AUTO_ROUND, "" if auto is None else f"auto-round: {auto[1]:.2f} in {auto[0].seconds:.0f} s"
    )
    faster = optimum[0].seconds / quick[0].seconds if optimum and quick else None
    quick_how = reasons.get(OURS, "")
    if quick is not None:
        quick_how = f"{quick[1]:.2f}, {quick[0].seconds:.0f} s, {(quick[0].peak_bytes or 0) / 1e9:.2f} GB"
    main_how = f"{perplexity:.2f} against {float_perplexity:.2f}, {bits:.2f} bits per parameter, {main.seconds:.0f} s"
    size = size_bytes(main.run.folder / "model")
    best = max(_ratio(decode, name, LLAMA_CPP) for name in (ONNX, OPENVINO))
    metric = f"tokens_per_second_context_{CONTEXT}"
    speeds = ", ".join(f"{row.model} {row.value:.0f}/s" for row in decode.measurements if row.metric == metric)
    return [
        Line("time of the quick GPTQ against Optimum + gptqmodel", "5x", "10x", faster, "x", versus_peer),
        Line("perplexity over fp32", "+12%", "+5%", over, "%", f"{main_how}; {versus_auto}"),
        Line("perplexity of the quick GPTQ over fp32", "+25%", "+18%", quick_over, "%", quick_how),
        Line("ONNX folder", "82 MB", "75 MB", size / 1e6, "MB"),
        Line("decode against fp32 ONNX", "3.5x", "5x", _ratio(decode, ONNX, FLOAT), "x"),
        Line("decode against llama.cpp", "0.9x", "1.1x", best, "x", speeds),
    ]


def _increase(perplexity: float | None, reference: float | None) -> float | None:
    """Return the increase of perplexity in percent."""
    return None if perplexity is None or reference is None else 100 * (perplexity / reference - 1)


def _ratio(result: BenchmarkResult, name: str, other: str) -> float:
    """Return the ratio of tokens per second, from the speed-ups over llama.cpp."""
    rows = {row.model: row.value for row in result.measurements if row.metric == f"speedup_{STEP}"}
    rows[LLAMA_CPP] = 1.0
    return rows[name] / rows[other]


def format_table(lines: Sequence[Line]) -> str:
    """Return the lines as a Markdown table."""
    rows = ["| quantity | at least | aim | measured | details |", "|---|---|---|---|---|"]
    for line in lines:
        value = "not measured" if line.measured is None else f"{line.measured:.2f} {line.unit}".strip()
        rows.append(f"| {line.what} | {line.at_least} | {line.aim} | {value} | {line.how} |")
    return "\n".join(rows)


def main(
    recipe: Annotated[Path, typer.Option(help="Recipe to measure.")] = RECIPE,
    with_peers: Annotated[bool, typer.Option("--peers", help="Also run Optimum and auto-round.")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="Sampling time for each model.")] = 5.0,
    artifacts: Annotated[Path | None, typer.Option(help="Use the cached stages of this folder.")] = None,
    output: Annotated[Path | None, typer.Option(help="File for the results as JSON.")] = None,
) -> None:
    """Measure everything and print the table."""
    quiet_libraries()
    progress = ConsoleProgress()
    chosen = read_recipe(recipe)
    threads = chosen.benchmark.threads
    with tempfile.TemporaryDirectory(prefix="compress-smollm2-") as name:
        scratch = Path(name)
        main_run = run_recipe(chosen, recipe.parent, artifacts or scratch / "artifacts", progress)
        setting = LanguageSetting(chosen.model, str(chosen.data.source), scratch, threads, 4, 64, progress)
        folders = {
            LLAMA_CPP: export_gguf(main_run.checkpoint, scratch / "gguf"),
            ONNX: main_run.run.folder / "model",
            OPENVINO: export_openvino(main_run.checkpoint, scratch / "openvino", setting.prompt(CONTEXT)),
            FLOAT: float_onnx(setting).artifact,
        }
        decode = decode_together(folders, setting.prompt(CONTEXT), threads, seconds, progress)
        others = (OPTIMUM, AUTO_ROUND)
        quantized, reasons = run_quantizers((OURS, *others) if with_peers else (OURS,), setting)
        reasons = reasons if with_peers else {**reasons, **dict.fromkeys(others, "not run: --peers")}
        lines = make_lines(main_run, decode, quantized, reasons)
    if output is not None:
        everything: dict[str, Any] = {
            "lines": [asdict(line) for line in lines],
            "notes": decode.notes,
            "environment": environment(),
        }
        output.write_text(json.dumps(everything, indent=1), encoding="utf-8")
    typer.echo(format_table(lines))


if __name__ == "__main__":
    typer.run(main)
