"""Somebody's graph under the names that transformers' clients know, and for batches of any size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir

from compress.formats.onnx.import_onnx import PROOFS, Start, answers, near
from compress.formats.onnx.int8.observers import open_session
from compress.formats.onnx.runtimes.onnxruntime import FAILURES
from compress.models.graph_inputs import GraphInputs
from compress.tasks.task import LOGITS

_PIXELS = "pixel_values"


def for_clients(start: Start) -> Start:
    """The same under the names that transformers knows, and for batches of any size, as far as its answers allow.

    An image goes in as `pixel_values`, and one output [batch, classes] comes out as `logits`; other graphs keep their
    names. A first axis of 1 is freed where two calls at once are proven to be answered as one by one.
    """
    model = ir.from_proto(start.graph)
    changes = list(start.changes)
    renamed = []
    for values, rank, name in ((model.graph.inputs, 4, _PIXELS), (model.graph.outputs, 2, LOGITS)):
        value = values[0]
        if len(values) == 1 and value.shape is not None and len(value.shape) == rank and value.name != name:
            renamed.append(f"{value.name} is called {name}")
            value.name = name
    graph = ir.to_proto(model) if renamed else start.graph
    inputs = replace(start.inputs, inputs=tuple(
        replace(one, name=str(value.name)) for one, value in zip(start.inputs.inputs, model.graph.inputs, strict=True)
    ))  # fmt: skip
    freed = _with_free_batch(graph, inputs)
    if freed is not None:
        graph, changes = freed, [*changes, "batches of any size"]
    return replace(start, graph=graph, inputs=inputs, changes=(*changes, *renamed))


def _with_free_batch(graph: onnx.ModelProto, inputs: GraphInputs) -> onnx.ModelProto | None:
    """``graph`` with a free first axis in place of 1 everywhere; None where it has none or then answers otherwise."""
    if inputs.unproven or not all(one.axes and one.axes[0] == 1 for one in inputs.inputs):
        return None
    model = ir.from_proto(graph)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and len(value.shape) and value.shape[0] == 1:
            value.shape = ir.Shape(["batch", *value.shape[1:]])
    for node in model.graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None
    made = ir.to_proto(model)
    calls = [inputs.draw(seed) for seed in PROOFS]
    together = {name: np.concatenate([call[name] for call in calls]) for name in calls[0]}
    try:
        session = open_session(made)
        single = [answers(session, call) for call in calls]
        found = answers(session, together)
    except FAILURES:
        return None
    expected = (np.concatenate(parts) for parts in zip(*single, strict=True))
    return made if all(near(one, other) for one, other in zip(expected, found, strict=True)) else None
