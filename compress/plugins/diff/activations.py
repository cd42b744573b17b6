"""Comparison of intermediate values: the modules of two PyTorch models, or the operators of two model files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.formats.model_file import format_of, model_file, model_files
from compress.formats.onnx.model import OnnxModel
from compress.formats.registry import FORMATS
from compress.formats.runtime import Session
from compress.inspection.layer_comparison import NOISE, Gap, compare_parts, gives_values, open_value_graph
from compress.inspection.layers import node_modules
from compress.plugins.diff.answers import runnable_target
from compress.plugins.diff.record import Activations, ModuleDifference
from compress.utils.progress import Progress

if TYPE_CHECKING:
    from torch import nn

_MOST = 200
"""Number of modules in a record, in the order of computation."""


def compare_modules(sessions: Sequence[Session], batches: Sequence[Mapping[str, np.ndarray]]) -> Activations | None:
    """Compare the outputs of all leaf modules that both models have, in the order of computation.

    Args:
        sessions: Runtime sessions of both models.
        batches: Inputs to run, each by input name.

    Returns:
        Difference of each module's output, and notes about modules that could not be compared. None if a model is not
        loaded as a PyTorch module in this process.
    """
    modules: list[nn.Module] = [getattr(session, "module", None) for session in sessions]  # type: ignore[misc]
    if not all(hasattr(module, "named_modules") for module in modules):
        return None
    # Containers repeat the outputs of their children, so that only leaf modules are compared.
    names = [{name for name, module in model.named_modules() if not any(module.children())} for model in modules]
    shared = names[0] & names[1]
    gaps: dict[str, Gap] = {}
    shapes: set[str] = set()
    # Record the outputs of both models for one batch, and add up their squared differences.
    for batch in batches:
        old, new = (_outputs(*side, batch, shared) for side in zip(modules, sessions, strict=True))
        for name, value in old.items():
            if name in new and value.shape == new[name].shape:
                gaps.setdefault(name, Gap()).add(value, new[name])
            else:
                shapes.add(name)
    differences = [ModuleDifference(module=name, error=min(gap.error, 1e9)) for name, gap in gaps.items()]
    first = next((difference for difference in differences if difference.error > NOISE), None)
    unshared = sorted(names[0] ^ names[1])
    notes = [f"{len(unshared)} modules exist in only one of the models, such as {unshared[0]}"] if unshared else []
    notes += [f"{len(shapes)} modules have outputs of different shapes, such as {min(shapes)}"] if shapes else []
    return Activations(
        first=first.module if first else None,
        error=first.error if first else 0.0,
        modules=tuple(differences[:_MOST]),
        notes=tuple(notes),
    )


def compare_files(
    before: Path, after: Path, batches: Sequence[Mapping[str, np.ndarray]], progress: Progress
) -> Activations | None:
    """Compare the operators of an ONNX graph in floating point with a model file that was written from such a graph.

    Args:
        before: Model file or folder with the graph.
        after: Model file or folder of any format that returns intermediate values.
        batches: Inputs to run, each by input name.
        progress: Shows the comparison.

    Returns:
        Operators that differ by more than their bit widths explain, or None if the file was not written from an ONNX
        graph or the batches lack inputs of the graph.

    Raises:
        CompressError: A file cannot be opened.
    """
    import onnx

    target = runnable_target(after)
    formats = format_of(before), FORMATS[format_of(after)]
    from_graph = OnnxModel.kind in (formats[1].name, formats[1].written_from)
    if formats[0] != OnnxModel.kind or not from_graph or not gives_values(target) or len(model_files(before)) > 1:
        return None
    file = model_file(before)
    graph = onnx.load(file)
    input_names = {entry.name for entry in graph.graph.input} - {entry.name for entry in graph.graph.initializer}
    # Random inputs do not cover graphs with further inputs, such as caches.
    if any(not input_names <= batch.keys() for batch in batches):
        return None
    inputs = [{name: batch[name] for name in input_names} for batch in batches]
    comparison = compare_parts(graph, node_modules(file), open_value_graph(after, target), inputs, progress)
    if comparison is None:
        return None
    differences = [
        ModuleDifference(module=entry.layer or entry.name, error=min(entry.error, 1e9))
        for entry in comparison.departures
    ]
    verb = "departs" if len(differences) == 1 else "depart"
    note = f"{len(differences)} of {comparison.parts} operators {verb} by more than their bits explain"
    first, error = (differences[0].module, differences[0].error) if differences else (None, 0.0)
    return Activations(first=first, error=error, modules=tuple(differences[:_MOST]), notes=(note,))


def _outputs(
    module: nn.Module, session: Session, batch: Mapping[str, np.ndarray], names: set[str]
) -> dict[str, np.ndarray]:
    """Return the outputs of the named modules in their first call."""
    import torch

    from compress.models.hooks import removed_on_exit

    outputs: dict[str, np.ndarray] = {}

    def keep(name: str, _: nn.Module, __: object, output: object) -> None:
        value = output[0] if isinstance(output, tuple) and output else output
        if name not in outputs and isinstance(value, torch.Tensor) and value.is_floating_point():
            outputs[name] = value.detach().float().cpu().numpy()

    named = ((name, child) for name, child in module.named_modules() if name in names)
    with removed_on_exit(child.register_forward_hook(partial(keep, name)) for name, child in named):
        session.predict(batch)
    return outputs
