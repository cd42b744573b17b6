"""Speed-up of each graph rewrite: the sample encoder, full and pruned, with all rewrites and without each of them.

    python benchmarks/rewrites.py            # about four minutes on two idle cores

All variants are timed in one interleaved session. The baseline is the exporter without rewrites.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from compress.benchmark.session import measure_side_by_side
from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.data.samples.fetch import sample_directory
from compress.formats.onnx.export import ATTENTION, export_onnx
from compress.formats.onnx.fusions import REWRITES
from compress.formats.onnx.int8.dynamic import quantize_embeddings, quantize_products, quantize_rows_in_order
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.formats.quiet_output import quiet_libraries
from compress.formats.targets import TARGETS
from compress.models.model import TorchModel
from compress.models.structure import blocks
from compress.models.transformer_pruning import keep_heads, keep_layers, keep_neurons
from compress.recipe.recipe import Benchmark
from compress.tasks.registry import TASKS
from compress.tasks.task import Examples
from compress.utils.progress import SilentProgress

ALL_REWRITES = (ATTENTION, *REWRITES)
BASELINE = "exporter only"
VARIANTS = {BASELINE: ALL_REWRITES, "all rewrites": (), **{f"without {name}": (name,) for name in ALL_REWRITES}}
"""Rewrites that each variant leaves out."""


def main() -> None:
    """Print a table: model, variant, latency with interval, and the speed-up over the baseline."""
    quiet_libraries()
    task = TASKS["text-classification"]
    data = load_dataset(DataConfig(source="sample:movie-reviews"), task.columns, Path(), SilentProgress())
    torch.manual_seed(0)
    for name, pruned, quantized in (("6 layers fp32", False, False), ("3 layers pruned int8", True, True)):
        model = task.load(sample_directory("minilm"), data.labels, trust_remote_code=False)
        if pruned:
            _prune(model)
        rows = task.encode(data.split("test"), model.processor, data.labels, 128)
        _compare(name, model, rows, quantized)


def _prune(model: TorchModel) -> None:
    keep_layers(model.module, [0, 2, 5])
    keep_heads(model.module, [range(block.prunable_units // 2) for block in blocks(model.module)])
    keep_neurons(model.module, [torch.arange(384) for _ in blocks(model.module)])


def _compare(name: str, model: TorchModel, examples: Examples, quantized: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for variant, leave_out in VARIANTS.items():
            folder = folders[variant] = Path(scratch) / variant.replace(" ", "-")
            folder.mkdir()
            graph = export_onnx(model, examples, None, fusions=True, leave_out=leave_out).graph
            if quantized:
                graph = quantize_products(graph, per_channel=True, reduce_range=False)
                quantize_rows_in_order(graph)
                quantize_embeddings(graph, 8)
            OnnxModel(graph, FLOAT_GRAPH, model.companions()).save(folder)
        result = measure_side_by_side(
            folders,
            dict.fromkeys(folders, examples),
            TARGETS["cpu"],
            Benchmark(seconds=6),
            BASELINE,
            SilentProgress(),
            seed=0,
        )
    rows = {(row.model, row.metric): row for row in result.measurements}
    for variant in VARIANTS:
        latency, ratio = rows[variant, "latency_ms"], rows[variant, "speedup"]
        interval = f"{latency.low:.3f} to {latency.high:.3f}" if latency.low and latency.high else ""
        sys.stdout.write(f"{name:18s} {variant:28s} {latency.value:.3f} ms ({interval})  {ratio.value:.2f}x\n")
    sys.stdout.write("\n".join(result.notes) + "\n")


if __name__ == "__main__":
    main()
