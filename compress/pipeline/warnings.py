"""Notes of a report on sparse files and on processors without VNNI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from compress.formats.onnx.model import OnnxModel
from compress.formats.runtime import HasExecutionNote, get_runtime
from compress.formats.target_profile import Target, find_processor
from compress.pipeline.target_session import TargetSession
from compress.recipe.recipe import Recipe
from compress.results.report import Measurement
from compress.utils.environment import processor_class

if TYPE_CHECKING:
    import onnx

CPU = "CPUExecutionProvider"
_KINDS = ("fp32", "int8")


def run_remarks(session: TargetSession) -> list[str]:
    """Return the runtime's remarks on files that it does not run as stored, each once with its models."""
    runtime = get_runtime(session.target.runtime)
    if not isinstance(runtime, HasExecutionNote):
        return []
    labels_by_remark: dict[str, list[str]] = {}
    for label, folder in session.artifacts.items():
        remark = runtime.remark(folder)
        if remark is not None:
            labels_by_remark.setdefault(remark, []).append(label)
    return [f"{', '.join(labels)}: {remark}" for remark, labels in labels_by_remark.items()]


def processor_notes(session: TargetSession) -> list[str]:
    """Return a note on the measured speed of INT8 products if the processor has no VNNI and the model is quantized."""
    elsewhere = session.profile.device or session.target.provider != CPU
    if find_processor("cpu").sums_in_32_bits or elsewhere or not has_integers(session.runner.recipe):
        return []
    from compress.benchmark.machine import PRODUCTS, product_rates

    kinds = {kind: [product_rates(kind, *shape, session.benchmark.threads) for shape in PRODUCTS] for kind in _KINDS}
    faster = [fmean(rates) / fmean(floats) for rates, floats in zip(kinds["int8"], kinds["fp32"], strict=True)]
    return [
        f"{session.target.name}: {processor_class()} has no VNNI: products of 8-bit integers are {min(faster):.1f} to "
        f"{max(faster):.1f} times as fast as those of float there, and their sums may saturate "
        "(`reduce_range` of the stage avoids it)"
    ]


def has_integers(recipe: Recipe) -> bool:
    """Return True if a stage of the recipe writes integers into a graph."""
    return any(stage.output_spec().integer_graph for stage in recipe.stages)


def float_label(recipe: Recipe) -> str | None:
    """Return the label of the float graph that a recipe exports, or None if it exports none."""
    for label, stage in zip(recipe.labels(), recipe.stages, strict=True):
        if issubclass(stage.output_type, OnnxModel) and not stage.output_spec().integer_graph:
            return label
    return None


_NOTABLE = 0.05
_SAME = 0.02
"""A file within this share of the baseline's speed counts as equally fast."""


def sparse_notes(
    recipe: Recipe, artifacts: Mapping[str, Path], rows: Sequence[Measurement], target: Target
) -> list[str]:
    """Return a note for each stage whose float file has many zero weights, with its measured speed.

    No supported runtime has a kernel that skips zeros. Files are read only if a stage sets weights to zero.

    Args:
        recipe: The recipe.
        artifacts: Folder of each model by label.
        rows: Measurements of the target.
        target: The target.
    """
    if target.format != OnnxModel.kind or not any(stage.output_spec().sparse for stage in recipe.stages):
        return []
    speeds = {row.model: row for row in rows if row.metric == "speedup"}
    lines = []
    for label in recipe.labels():
        if label not in artifacts or label == recipe.baseline:
            continue
        share = zero_share(OnnxModel.load(artifacts[label], recipe.task).graphs.values())
        if share < _NOTABLE:
            continue
        line = (
            f"{target.name}: {share:.0%} of the weights of {label} are zeros, which no kernel of {target.runtime} skips"
        )
        if row := speeds.get(label):
            known_interval = row.low is not None and row.high is not None
            interval = f", {row.low:.2f} to {row.high:.2f}" if known_interval else ""
            line += f"; it is {row.value:.2f} times as fast as the baseline{interval}"
            inside = known_interval and (row.low or 0) <= 1 <= (row.high or 0)
            line += ": they gain nothing" if inside or abs(row.value - 1) <= _SAME else ""
        lines.append(line)
    return lines


def zero_share(graphs: Iterable[onnx.ModelProto]) -> float:
    """Return the share of zeros among all float weights with two or more axes, or 0 if there are none."""
    import numpy as np
    from onnx import numpy_helper

    zeros = of = 0
    for graph in graphs:
        for tensor in graph.graph.initializer:
            if len(tensor.dims) > 1:
                array = numpy_helper.to_array(tensor)
                if array.dtype.kind == "f":
                    zeros, of = zeros + int(array.size - np.count_nonzero(array)), of + array.size
    return zeros / of if of else 0.0
