"""INT8 of encoders and image models against their plain fp32 graphs, at a realistic width, on one thread.

    python benchmarks/encoder_speed.py [NAMES...] [--output FILE]

One example at a time (texts of 128 tokens), the two in turns: medians in ms. Weights are random, nothing is downloaded.
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

from onnx_encoders import quantized
from tiny_encoders import IMAGES, TEXTS, VOCABULARY, build, examples_of


def _session(graph: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def timed(name: str, length: int = 128, seconds: float = 8.0) -> tuple[float, float]:
    """Medians in ms, one example at a time and in turns: the plain fp32 graph, and INT8 of the fused one."""
    from compress.formats.onnx.export import export_onnx
    from compress.models.model import TorchModel

    model = TorchModel(build(name, real=True), None)
    examples = examples_of(name, 32, longest=length)
    plain = export_onnx(model, examples, None, fusions=False).graph
    sessions = [
        _session(plain),
        _session(quantized(name, export_onnx(model, examples, None, fusions=True).graph, examples)),
    ]
    ids = np.random.default_rng(0).integers(5, VOCABULARY, (1, length))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)} if name not in IMAGES else examples.batch([0])
    samples: list[list[float]] = [[], []]
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(samples[0]) < 12:
        for session, taken in zip(sessions, samples, strict=True):
            given = {entry.name: feed[entry.name] for entry in session.get_inputs()}
            start = time.perf_counter()
            session.run(None, given)
            taken.append(time.perf_counter() - start)
    plain_ms, int8_ms = (float(np.median(taken[2:]) * 1e3) for taken in samples)
    return plain_ms, int8_ms


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Families; default: all.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write everything as JSON.")] = None,
) -> None:
    """A line for each family, then the median of the ratios."""
    speeds: dict[str, tuple[float, float]] = {}
    for name in names or [*TEXTS, *IMAGES]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            try:
                plain, int8 = speeds[name] = pool.apply(timed, (name,))
            except Exception as error:  # noqa: BLE001 - what can't be timed is told, and the others go on
                typer.echo(f"{name:22s} {type(error).__name__}: {str(error).splitlines()[0][:120]}")
                continue
        typer.echo(f"{name:22s} {plain:7.2f} -> {int8:7.2f} ms  {plain / int8:.2f}x")
        if output:
            output.write_text(json.dumps(speeds, indent=1))
    for kind, group in (("texts", TEXTS), ("images", IMAGES)):
        ratios = [plain / int8 for name, (plain, int8) in speeds.items() if name in group]
        if ratios:
            typer.echo(f"{kind}: median {median(ratios):.2f}x of {len(ratios)}")


if __name__ == "__main__":
    typer.run(main)
