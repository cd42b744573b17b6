"""Compare the decode speed of a decoder in ONNX in fp32 and in 4 bits, interleaved in one session.

    python benchmarks/decode.py                          # sample:smollm2, rounded to nearest; about six minutes
    python benchmarks/decode.py --quantized FOLDER       # with the weights of a quantized checkpoint
    python benchmarks/decode.py --variants               # also fp32 arithmetic, and logits of the last token only

The speed depends on bits and group size, not on the values of the weights.
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
class RoundedCheckpoint(Checkpoint):
    """A float checkpoint whose linear layers and embeddings are read as 4 bits in groups of 64."""

    def quantized(self, module: str) -> QuantizedWeight | None:
        """Return the weight rounded to nearest, or None for other modules."""
        if not module.endswith(("_proj", "embed_tokens", "lm_head")) or f"{module}.weight" not in self.files:
            return None
        return round_to_nearest(self.stored(f"{module}.weight").float(), GptqSettings(scale_search=False))


def main() -> None:
    """Print sizes, times with intervals, and speed-ups over fp32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample:smollm2")
    parser.add_argument("--quantized", type=Path)
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    quiet_libraries()
    source = Checkpoint(resolve_model(options.model))
    quantized = QuantizedCheckpoint(options.quantized) if options.quantized else RoundedCheckpoint(source.folder)
    variants: dict[str, tuple[Checkpoint, GraphSettings]] = {
        BASELINE: (source, GraphSettings()),
        "4 bits": (quantized, GraphSettings()),
    }
    if options.variants:
        variants["4 bits, fp32 arithmetic"] = (quantized, GraphSettings(accuracy_level=1))
        variants["4 bits, last token only"] = (quantized, GraphSettings(last_token_only=True))
    settings = Benchmark(
        contexts=(options.context,), tokens=options.tokens, threads=options.threads, seconds=options.seconds
    )
    with tempfile.TemporaryDirectory() as scratch:
        _compare({name: _export(*variant, Path(scratch) / name) for name, variant in variants.items()}, settings)


def _export(checkpoint: Checkpoint, settings: GraphSettings, folder: Path) -> Path:
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
