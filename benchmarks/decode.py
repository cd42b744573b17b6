"""Decode speed of a decoder as ONNX: fp32 against four bits, in one interleaved session.

    python benchmarks/decode.py                          # sample:smollm2, rounded to nearest; about six minutes
    python benchmarks/decode.py --quantized FOLDER       # the integers of a quantized checkpoint
    python benchmarks/decode.py --variants               # 8-bit against fp32 arithmetic, the last token only

The speed does not depend on which integers they are, only on their bits and groups.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from compress.benchmark.generation import measure_generation
from compress.formats.onnx.decoder import GraphSettings, export_decoder
from compress.formats.quiet_output import quiet_libraries
from compress.formats.targets import TARGETS
from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.numerics.gptq import GptqSettings, round_to_nearest
from compress.numerics.integer_grid import QuantizedWeight
from compress.recipe.recipe import Benchmark
from compress.sources.resolve import resolve_model
from compress.utils.progress import SilentProgress
from compress.utils.storage import size_bytes

BASELINE = "fp32"
METRICS = ("time_per_output_token_ms", "tokens_per_second", "time_to_first_token_ms")


@dataclass(frozen=True)
class Rounded(Checkpoint):
    """A float checkpoint that gives its linear layers and its table as four bits in groups of 64."""

    def quantized(self, module: str) -> QuantizedWeight | None:
        """Rounded to nearest."""
        if not module.endswith(("_proj", "embed_tokens", "lm_head")) or f"{module}.weight" not in self.files:
            return None
        return round_to_nearest(self.stored(f"{module}.weight").float(), GptqSettings(scale_search=False))


def main() -> None:
    """Print sizes, times with intervals, and ratios to fp32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample:smollm2")
    parser.add_argument("--quantized", type=Path)
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    chosen = parser.parse_args()
    quiet_libraries()
    source = Checkpoint(resolve_model(chosen.model))
    few = QuantizedCheckpoint(chosen.quantized) if chosen.quantized else Rounded(source.folder)
    variants: dict[str, tuple[Checkpoint, GraphSettings]] = {
        BASELINE: (source, GraphSettings()),
        "4 bits": (few, GraphSettings()),
    }
    if chosen.variants:
        variants["4 bits, fp32 arithmetic"] = (few, GraphSettings(accuracy_level=1))
        variants["4 bits, last token only"] = (few, GraphSettings(last_token_only=True))
    settings = Benchmark(
        contexts=(chosen.context,), tokens=chosen.tokens, threads=chosen.threads, seconds=chosen.seconds
    )
    with tempfile.TemporaryDirectory() as scratch:
        _compare({name: _written(*variant, Path(scratch) / name) for name, variant in variants.items()}, settings)


def _written(checkpoint: Checkpoint, settings: GraphSettings, folder: Path) -> Path:
    folder.mkdir()
    export_decoder(checkpoint, settings).save(folder)
    return folder


def _compare(folders: dict[str, Path], settings: Benchmark) -> None:
    result = measure_generation(folders, {}, TARGETS["cpu"], settings, BASELINE, SilentProgress(), seed=0)
    rows = {(row.model, row.metric): row for row in result.measurements}
    (context,) = settings.contexts
    for name, folder in folders.items():
        sys.stdout.write(f"{name}: {size_bytes(folder) / 1e6:.1f} MB\n")
        for metric in (*METRICS, "speedup_time_per_output_token", "speedup_time_to_first_token"):
            row = rows.get((name, f"{metric}_context_{context}"))
            if row is not None:
                interval = f" ({row.low:.3f} to {row.high:.3f})" if row.low is not None and row.high is not None else ""
                sys.stdout.write(f"  {metric:32s} {row.value:.3f}{interval} {row.unit}\n")
    sys.stdout.write("\n".join(result.notes) + "\n")


if __name__ == "__main__":
    main()
