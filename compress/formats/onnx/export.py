"""The one seam through which torch models become ONNX graphs: Hugging Face's exporters (`transformers.exporters`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import torch

from compress.errors import StageError
from compress.formats.onnx.fusions import optimize_graph
from compress.formats.silence import silence
from compress.tasks.forward import tensors
from compress.tasks.task import Examples

if TYPE_CHECKING:
    from compress.checkpoints.torch_model import TorchModel

_AXES = ("batch_size", "sequence_length")
_SMALLEST_LENGTH = 2
_PRODUCER = "compress"


@dataclass(frozen=True)
class Exported:
    """A graph, and how often each rewrite matched in it."""

    graph: onnx.ModelProto
    rewrites: dict[str, int] = field(default_factory=dict)


def export_onnx(
    model: TorchModel, examples: Examples, opset: int | None, fusions: bool, leave_out: Collection[str] = ()
) -> Exported:
    """Trace ``model`` with dynamic batch and length; ``fusions`` targets ONNX Runtime's CPU operators.

    Inputs that may not be padded, such as images, keep the shape that they have; only their batch is free.

    ``leave_out`` names rewrites of `compress.formats.onnx.fusions` to do without, for measuring what each is worth.
    Two examples of different length are traced together, because a batch of one would freeze the batch axis. The
    graph carries no stack traces or paths, so the same weights give the same bytes. Raises `StageError`.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    sample = _two_lengths(examples)
    inputs = {name: value for name, value in tensors(examples, sample).items() if name in examples.padding}
    longest = getattr(model.module.config, "max_position_embeddings", 512)
    batch = torch.export.Dim(_AXES[0], min=1, max=65536)
    length = torch.export.Dim(_AXES[1], min=_SMALLEST_LENGTH, max=longest)
    config = OnnxConfig(
        dynamic=True,
        dynamic_shapes={
            name: {0: batch} if examples.padding[name] is None else {0: batch, 1: length} for name in inputs
        },
        opset_version=opset,
        ort_fusions="cpu" if fusions else None,
    )
    module = model.module.eval()
    try:
        with silence("prints"):
            program: ir.Model = OnnxExporter().export(module, inputs, config).program
    except (RuntimeError, ValueError, TypeError) as error:
        raise StageError(
            f"The model cannot be exported to ONNX: {error}", mend="try another opset, or fusions: false"
        ) from error
    rewrites = optimize_graph(program, leave_out) if fusions else {}
    _name_axes(program)
    _tell_shapes(program)
    _strip(program)
    return Exported(ir.to_proto(program), rewrites)


def _two_lengths(examples: Examples) -> list[int]:
    lengths = examples.lengths()
    return [int(lengths.argmin()), int(lengths.argmax())] if len(lengths) > 1 else [0, 0]


def _name_axes(model: ir.Model) -> None:
    """Call the free axes by their names, in place; tracing gives them numbered symbols such as ``s43``."""
    graph = model.graph
    symbols = {
        str(axis): name
        for value in graph.inputs
        for axis, name in zip(value.shape or (), _AXES, strict=False)
        if isinstance(axis, ir.SymbolicDim)
    }
    for value in (*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            # Several values may share one shape, and some shapes are frozen.
            value.shape = ir.Shape([_renamed(axis, symbols) for axis in value.shape])


def _renamed(axis: int | ir.SymbolicDim, symbols: Mapping[str, str]) -> int | str | None:
    if isinstance(axis, int):
        return axis
    return None if axis.value is None else re.sub(r"\w+", lambda found: symbols.get(found[0], found[0]), axis.value)


def _tell_shapes(model: ir.Model) -> None:
    """Stored tensors are recorded with the shapes that they have, in place.

    transformers records a scale of one element as a scalar, and shape inference refuses such a graph.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.shape = ir.Shape(value.const_value.shape)


def _strip(model: ir.Model) -> None:
    model.producer_name, model.producer_version, model.doc_string = _PRODUCER, None, None
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for output in node.outputs:
                output.metadata_props.clear()
