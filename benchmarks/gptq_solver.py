"""Measure time and error of each option of the GPTQ solver, on layers with the shapes of SmolLM2-135M.

    python benchmarks/gptq_solver.py                      # about a minute on one idle core
    python benchmarks/gptq_solver.py --bits 3 --rows 576 --columns 1536

Weights are random and heavy-tailed, inputs are correlated with a few large channels (fixed seed). The error is
tr(E H E^T) / tr(W H W^T) for the Hessian of the calibration inputs, and for that of unseen inputs of the same
distribution (16 windows of 512 tokens each). Times are the median of three calls on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from compress.numerics.gptq import GptqSettings, output_error, quantize_gptq, round_to_nearest
from compress.numerics.integer_grid import QuantizedWeight

# (out, in) -> number of layers: q and o, k and v, gate and up, down, in each of 30 blocks.
SHAPES = {(576, 576): 60, (192, 576): 60, (1536, 576): 60, (576, 1536): 30}
TOKENS = 16 * 512


@dataclass(frozen=True)
class Problem:
    """A weight, the Hessian of the calibration inputs, and the Hessian of unseen inputs."""

    weight: torch.Tensor
    hessian: torch.Tensor
    unseen_hessian: torch.Tensor


def main() -> None:
    """Print time and errors for each shape and variant, and the time of the whole model for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--columns", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = {(options.rows, options.columns): 1} if options.rows and options.columns else SHAPES
    solvers = _variants(GptqSettings(options.bits, options.group_size, not options.asymmetric))
    total_seconds = dict.fromkeys(solvers, 0.0)
    for shape, count in shapes.items():
        problem = _random_problem(*shape)
        for name, solve in solvers.items():
            seconds, quantized = _time(solve, problem)
            total_seconds[name] += seconds * count
            restored = quantized.dequantize()
            hessians = problem.hessian, problem.unseen_hessian
            error, unseen = (output_error(problem.weight, restored, hessian) for hessian in hessians)
            label = f"{shape[0]:>5} x {shape[1]:<5} {name:26s}"
            sys.stdout.write(f"{label} {seconds * 1000:8.1f} ms  error {error:.6f}  unseen {unseen:.6f}\n")
    for name, seconds in total_seconds.items():
        sys.stdout.write(f"all {sum(shapes.values()):4} layers {name:26s} {seconds:8.1f} s\n")


def _variants(settings: GptqSettings) -> dict[str, Callable[[Problem], QuantizedWeight]]:
    def gptq(**changes: bool | int) -> Callable[[Problem], QuantizedWeight]:
        changed = replace(settings, **changes)
        return lambda problem: quantize_gptq(problem.weight, problem.hessian, changed).quantized

    def nearest(changed: GptqSettings) -> Callable[[Problem], QuantizedWeight]:
        return lambda problem: round_to_nearest(problem.weight, changed, problem.hessian.diagonal())

    return {
        "nearest, full range": nearest(replace(settings, scale_search=False)),
        "nearest, searched scales": nearest(settings),
        "gptq, full range": gptq(act_order=False, scale_search=False),
        "gptq, searched scales": gptq(act_order=False),
        "gptq, act-order": gptq(),
    }


def _random_problem(rows: int, columns: int) -> Problem:
    generator = torch.Generator().manual_seed(rows * columns)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = 0.02 * normal(rows, columns) * torch.exp(0.5 * normal(rows, columns))
    mixing = torch.arange(1, columns + 1)[:, None].float() ** -0.8 * normal(columns, columns) / columns**0.5
    channel_scale = torch.exp(0.8 * normal(columns))
    samples = [(normal(TOKENS, columns) @ mixing + 0.05 * normal(TOKENS, columns)) * channel_scale for _ in range(2)]
    return Problem(weight, *(inputs.T @ inputs / TOKENS for inputs in samples))


def _time(solve: Callable[[Problem], QuantizedWeight], problem: Problem) -> tuple[float, QuantizedWeight]:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        quantized = solve(problem)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), quantized


if __name__ == "__main__":
    main()
