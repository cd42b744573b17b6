"""What 4-bit SmolLM2-135M costs and gives, against other people's tools in the same session: the table of the README.

    python benchmarks/smollm2.py                       # ours and llama.cpp
    python benchmarks/smollm2.py --peers               # Optimum and auto-round too; downloads several GB at first
    python benchmarks/smollm2.py --recipe recipes/smollm2-int4.yaml --output smollm2.json

Measured on the recipe named (by default `recipes/smollm2-int4.yaml`), run from an empty cache, so that `seconds` are
those of this session and of stages alone, without the pipeline's checks; and on GPTQ alone, quick, on the linear layers
at 4 bits in groups of 64, which is run, timed and judged as the peers are. The integers of the recipe's last quantized
checkpoint are then written as GGUF, which is Q4_0 to the bit, and as OpenVINO's IR, and fp32 ONNX, 4-bit ONNX, IR and
GGUF generate in turns; llama.cpp is its project's own release for this processor, given the same number of threads.
`at least` and `aim` are what the project set itself.
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
from peers.language_peers import CONTEXT, OURS, PEERS, TOKENS, Made, float_onnx
from peers.language_setting import LanguageSetting
from peers.llama_cpp_library import llama_cpp_library

from compress.benchmark.generation import measure_generation
from compress.benchmark.session import BenchmarkResult
from compress.cli.output import ConsoleProgress
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
    """One line of the table; ``found`` is None where it was not measured, and ``how`` says why or with what."""

    what: str
    at_least: str
    aim: str
    found: float | None
    unit: str = ""
    how: str = ""


@dataclass(frozen=True)
class Ours:
    """A recipe's run, with the seconds of its stages and where its quantized checkpoint lies."""

    run: Run
    checkpoint: Path

    @property
    def seconds(self) -> float:
        """Of all stages but the export."""
        return sum(stage.seconds for stage in self.run.report.stages if stage.name != "onnx")

    @property
    def peak_bytes(self) -> int:
        """The largest of any stage but the export."""
        return max(stage.peak_rss_bytes for stage in self.run.report.stages if stage.name != "onnx")

    def value(self, metric: str, model: str = FINAL) -> float | None:
        """A row of the report, on the processor."""
        row = self.run.report.find(model, metric, "cpu")
        return None if row is None else row.value


def take(recipe: Recipe, folder: Path, artifacts: Path, progress: Progress) -> Ours:
    """Run ``recipe`` and find the output of its last stage before the export."""
    done = run(recipe, folder, artifacts, progress, remeasure=True)
    last = [stage for stage in done.report.stages if stage.name != "onnx"][-1]
    entry = Cache(artifacts / "cache").peek(last.key)
    assert entry is not None, "a stage's output is kept"
    return Ours(done, entry.folder)


def as_gguf(checkpoint: Path, folder: Path) -> Path:
    """The integers of a quantized checkpoint for llama.cpp."""
    folder.mkdir()
    source = QuantizedCheckpoint(checkpoint)
    write_companions(source, folder)
    write_gguf(source, folder / "model.gguf")
    return folder


def as_openvino(checkpoint: Path, folder: Path, prompt: Sequence[int]) -> Path:
    """The integers of a quantized checkpoint for OpenVINO, proven on the halves of a prompt."""
    folder.mkdir()
    write_decoder(QuantizedCheckpoint(checkpoint), "fp32", 8, np.array(prompt).reshape(2, -1), 1e-3).model.save(folder)
    return folder


def decode_together(
    artifacts: Mapping[str, Path], text: Sequence[int], threads: int, seconds: float, progress: Progress
) -> BenchmarkResult:
    """Generation of all in turns, against llama.cpp, which runs as its own release."""
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


def quantizers(names: Sequence[str], setting: LanguageSetting) -> tuple[dict[str, tuple[Made, float]], dict[str, str]]:
    """What quantizers of checkpoints left, with its perplexity; and why one didn't run."""
    quantized, reasons = {}, {}
    for name in names:
        setting.progress.note(f"-- {name}")
        try:
            left = PEERS[name](setting)
            quantized[name] = (left, setting.perplexity_of_checkpoint(left.artifact))
        except (UnavailableError, CompressError) as error:
            reasons[name] = " ".join(str(error).split())
    return quantized, reasons


def lines(
    main: Ours, decode: BenchmarkResult, found: Mapping[str, tuple[Made, float]], reasons: Mapping[str, str]
) -> list[Line]:
    """The table."""
    quick, optimum, auto = found.get(OURS), found.get(OPTIMUM), found.get(AUTO_ROUND)
    float_perplexity, perplexity = main.value("perplexity", BASELINE), main.value("perplexity")
    over, quick_over = _over(perplexity, float_perplexity), _over(quick and quick[1], float_perplexity)
    bits = main.value("bits_per_parameter")
    versus_peer = reasons.get(OPTIMUM, "" if optimum is None else f"{optimum[0].seconds:.0f} s")
    versus_auto = reasons.get(
        AUTO_ROUND, "" if auto is None else f"auto-round: {auto[1]:.2f} in {auto[0].seconds:.0f} s"
    )
    faster = optimum[0].seconds / quick[0].seconds if optimum and quick else None
    quick_how = reasons.get(OURS, "")
    if quick is not None:
        quick_how = f"{quick[1]:.2f}, {quick[0].seconds:.0f} s, {(quick[0].peak_bytes or 0) / 1e9:.2f} GB"
    main_how = f"{perplexity:.2f} against {float_perplexity:.2f}, {bits:.2f} bits a parameter, {main.seconds:.0f} s"
    size = size_bytes(main.run.folder / "model")
    return [
        Line("time of the quick GPTQ against Optimum + gptqmodel", "5x", "10x", faster, "x", versus_peer),
        Line("perplexity over fp32", "+12%", "+5%", over, "%", f"{main_how}; {versus_auto}"),
        Line("perplexity of the quick GPTQ over fp32", "+25%", "+18%", quick_over, "%", quick_how),
        Line("ONNX folder", "82 MB", "75 MB", size / 1e6, "MB"),
        Line("decode against fp32 ONNX", "3.5x", "5x", _ratio(decode, ONNX, FLOAT), "x"),
        Line("decode against llama.cpp", "0.9x", "1.1x", _best(decode), "x", _speeds(decode)),
    ]


def _over(perplexity: float | None, of: float | None) -> float | None:
    """By how many percent ``perplexity`` is larger."""
    return None if perplexity is None or of is None else 100 * (perplexity / of - 1)


def _ratio(result: BenchmarkResult, name: str, other: str) -> float:
    """How many times as many tokens a second, by the speedups that both have over llama.cpp."""
    rows = {row.model: row.value for row in result.measurements if row.metric == f"speedup_{STEP}"}
    rows[LLAMA_CPP] = 1.0
    return rows[name] / rows[other]


def _best(result: BenchmarkResult) -> float:
    """The faster of our own files against llama.cpp."""
    return max(_ratio(result, name, LLAMA_CPP) for name in (ONNX, OPENVINO))


def _speeds(result: BenchmarkResult) -> str:
    metric = f"tokens_per_second_context_{CONTEXT}"
    return ", ".join(f"{row.model} {row.value:.0f}/s" for row in result.measurements if row.metric == metric)


def table(found: Sequence[Line]) -> str:
    """The lines in Markdown."""
    rows = ["| what | at least | aim | found | how |", "|---|---|---|---|---|"]
    for line in found:
        value = "not measured" if line.found is None else f"{line.found:.2f} {line.unit}".strip()
        rows.append(f"| {line.what} | {line.at_least} | {line.aim} | {value} | {line.how} |")
    return "\n".join(rows)


def main(
    recipe: Annotated[Path, typer.Option(help="The recipe to measure.")] = RECIPE,
    with_peers: Annotated[bool, typer.Option("--peers", help="Run Optimum and auto-round too.")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="Sampling of each model's decoding.")] = 5.0,
    artifacts: Annotated[Path | None, typer.Option(help="Take stages from its cache, with their seconds.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write everything as JSON.")] = None,
) -> None:
    """Run everything and print the table."""
    quiet_libraries()
    progress = ConsoleProgress()
    chosen = read_recipe(recipe)
    threads = chosen.benchmark.threads
    with tempfile.TemporaryDirectory(prefix="compress-smollm2-") as name:
        scratch = Path(name)
        main_run = take(chosen, recipe.parent, artifacts or scratch / "artifacts", progress)
        setting = LanguageSetting(chosen.model, str(chosen.data.source), scratch, threads, 4, 64, progress)
        made_for = {
            LLAMA_CPP: as_gguf(main_run.checkpoint, scratch / "gguf"),
            ONNX: main_run.run.folder / "model",
            OPENVINO: as_openvino(main_run.checkpoint, scratch / "openvino", setting.prompt(CONTEXT)),
            FLOAT: float_onnx(setting).artifact,
        }
        decode = decode_together(made_for, setting.prompt(CONTEXT), threads, seconds, progress)
        others = (OPTIMUM, AUTO_ROUND)
        quantized, reasons = quantizers((OURS, *others) if with_peers else (OURS,), setting)
        reasons = reasons if with_peers else {**reasons, **dict.fromkeys(others, "not run: --peers")}
        table_lines = lines(main_run, decode, quantized, reasons)
    if output is not None:
        everything: dict[str, Any] = {
            "lines": [asdict(line) for line in table_lines],
            "notes": decode.notes,
            "environment": environment(),
        }
        output.write_text(json.dumps(everything, indent=1), encoding="utf-8")
    typer.echo(table(table_lines))


if __name__ == "__main__":
    typer.run(main)
