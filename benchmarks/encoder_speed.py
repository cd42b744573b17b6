"""Measure the speed-up of INT8 encoders and image models over plain fp32 graphs, at a realistic width, on one thread.

    python benchmarks/encoder_speed.py [NAMES...] [--output FILE]

The two graphs run interleaved on one example at a time (texts of 128 tokens). Results are medians in ms. Weights are
random, nothing is downloaded.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).parent / "architectures"))

from onnx_encoders import quantize
from tiny_encoders import IMAGES, TEXTS, VOCABULARY, build, examples_of


def _session(graph: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def measure(name: str, length: int = 128, seconds: float = 8.0) -> tuple[float, float]:
    """Return the median latencies in ms of the plain fp32 graph and of the fused INT8 graph, interleaved."""
    from compress.formats.onnx.export import export_onnx
    from compress.models.model import TorchModel

    model = TorchModel(build(name, real=True), None)
    examples = examples_of(name, 32, longest=length)
    plain = export_onnx(model, examples, None, fusions=False).graph
    sessions = [
        _session(plain),
        _session(quantize(name, export_onnx(model, examples, None, fusions=True).graph, examples)),
    ]
    ids = np.random.default_rng(0).integers(5, VOCABULARY, (1, length))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)} if name not in IMAGES else examples.batch([0])
    samples: list[list[float]] = [[], []]
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(samples[0]) < 12:
        for session, latencies in zip(sessions, samples, strict=True):
            inputs = {entry.name: feed[entry.name] for entry in session.get_inputs()}
            start = time.perf_counter()
            session.run(None, inputs)
            latencies.append(time.perf_counter() - start)
    plain_ms, int8_ms = (float(np.median(latencies[2:]) * 1e3) for latencies in samples)
    return plain_ms, int8_ms


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Model families; default: all.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the latencies as JSON.")] = None,
) -> None:
    """Print a line for each family, then the median speed-up."""
    speeds: dict[str, tuple[float, float]] = {}
    for name in names or [*TEXTS, *IMAGES]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            try:
                plain, int8 = speeds[name] = pool.apply(measure, (name,))
            except Exception as error:  # noqa: BLE001 - the other families are still measured
                typer.echo(f"{name:22s} {type(error).__name__}: {str(error).splitlines()[0][:120]}")
                continue
        typer.echo(f"{name:22s} {plain:7.2f} -> {int8:7.2f} ms  {plain / int8:.2f}x")
        if output:
            output.write_text(json.dumps(speeds, indent=1))
    for kind, group in (("texts", TEXTS), ("images", IMAGES)):
        ratios = [plain / int8 for name, (plain, int8) in speeds.items() if name in group]
        if ratios:
            typer.echo(f"{kind}: median {median(ratios):.2f}x speed-up of {len(ratios)} families")


if __name__ == "__main__":
    typer.run(main)
