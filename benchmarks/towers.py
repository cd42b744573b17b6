"""Size and latency of the image tower, the text tower and both, for image-text models that `compress run` wrote.

    python benchmarks/towers.py ARTIFACT... [--output FOLDER]

A pair is one image and one text. An app with precomputed prompt embeddings only runs the image tower; a text search
only runs the text tower. ARTIFACT is a model folder of the task `zero-shot-image-classification`; speed-ups are over
the first one. `--output` stores the towers of the last one, with the file names of transformers.js and Optimum.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from compress.benchmark.session import measure_side_by_side
from compress.data.columns import choose
from compress.data.samples.fetch import sample_directory
from compress.data.source import read_columns
from compress.formats.onnx.embedding_graphs import split_towers
from compress.formats.onnx.model import FLOAT_GRAPH, GRAPH_FOLDER, find_graph
from compress.formats.targets import TARGETS
from compress.models.processor import load_processor
from compress.recipe.recipe import Benchmark
from compress.report.progress import ConsoleProgress
from compress.tasks.zero_shot_image_classification import TASK
from compress.utils.storage import size_bytes

PAIR = "pair"
LENGTH = 24


def main() -> None:
    """Time pair and towers of every artifact, and print a line for each, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path, nargs="+")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--output", type=Path, help="folder for the towers of the last artifact")
    parser.add_argument("--json", action="store_true", help="write JSON")
    options = parser.parse_args()
    settings = Benchmark(threads=options.threads, seconds=options.seconds, batched=False, examples=options.rows)
    with tempfile.TemporaryDirectory() as scratch:
        parts = {
            str(artifact): write_parts(artifact, Path(scratch) / str(index))
            for index, artifact in enumerate(options.artifact)
        }
        lines = [
            line for part in (PAIR, *split_names(parts)) for line in time_part(part, parts, options.rows, settings)
        ]
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            for name in split_names(parts):
                graph = parts[str(options.artifact[-1])][name] / GRAPH_FOLDER / FLOAT_GRAPH
                shutil.copyfile(graph, options.output / f"{name}.onnx")
    sys.stdout.write(json.dumps(lines, indent=2) + "\n" if options.json else "".join(f"{line}\n" for line in lines))


def write_parts(artifact: Path, folder: Path) -> dict[str, Path]:
    """Write the artifact's graph and those of its towers to separate folders in ``folder``."""
    pair = onnx.load(find_graph(artifact))
    tower_folders = {}
    for name, graph in {PAIR: pair, **split_towers(pair)}.items():
        tower_folders[name] = folder / name
        (folder / name / GRAPH_FOLDER).mkdir(parents=True)
        onnx.save(graph, folder / name / GRAPH_FOLDER / FLOAT_GRAPH)
        for path in artifact.iterdir():
            if path.is_file():
                shutil.copyfile(path, folder / name / path.name)
    return tower_folders


def split_names(parts: Mapping[str, Mapping[str, Path]]) -> list[str]:
    """Return the names of the towers."""
    return [name for name in next(iter(parts.values())) if name != PAIR]


def time_part(
    part: str, parts: Mapping[str, Mapping[str, Path]], count: int, settings: Benchmark
) -> list[dict[str, Any]]:
    """Return size and latency of one part of every artifact, and the speed-up over the first artifact."""
    tower_folders = {label: folders[part] for label, folders in parts.items()}
    names = [column.name for column in TASK.columns]
    rows = choose(read_columns(sample_directory("fashion-captions") / "test.parquet", names), TASK.columns, {})
    examples = {
        label: TASK.encode(rows.slice(0, count), load_processor(folder), None, LENGTH)
        for label, folder in tower_folders.items()
    }
    baseline = next(iter(tower_folders))
    measurements = measure_side_by_side(
        tower_folders, examples, TARGETS["cpu"], settings, baseline, ConsoleProgress(), 0
    ).measurements
    return [
        {"part": part, "artifact": label, "graph_bytes": size_bytes(folder / GRAPH_FOLDER)}
        | {
            row.metric: [row.value, row.low, row.high]
            for row in measurements
            if row.model == label and row.metric in ("latency_ms", "speedup")
        }
        for label, folder in tower_folders.items()
    ]


if __name__ == "__main__":
    main()
