"""Import of ONNX graphs that other tools wrote: read, check, normalize, and rename for transformers' clients.

The rewrites of this package expect a normal form: weights are initializers and not Constant nodes, functions are
inlined, constant expressions are folded, batch normalisation is part of the preceding convolution, and the operator set
has per-channel scales. Inputs, outputs, their names and axes stay, and so do operators of other domains. The normalized
graph must give the same answers as the original.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes import common

from compress.formats.onnx.graph_edits import optimize_basic
from compress.formats.onnx.graph_reader import INTEGER_OPERATORS
from compress.formats.onnx.int8.observers import open_session
from compress.formats.onnx.int8.select_nodes import OLDEST_OPSET
from compress.formats.onnx.model import all_graphs
from compress.formats.onnx.runtimes.onnxruntime import FAILURES
from compress.formats.onnx.synthesize_inputs import synthesize_inputs
from compress.formats.quiet_output import suppress_output
from compress.models.graph_inputs import GraphInputs
from compress.tasks.task import LOGITS
from compress.utils.errors import ModelError, first_line

_TOLERANCE = 1e-3
"""Largest difference of an output's entry from the original's, as a share of its spread: sums in another order."""
_GROWTH, _OVERHEAD_BYTES = 1.02, 65_536
"""Growth of a file that constant folding may cause; small tables are folded too."""
_MOVES = frozenset(("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Concat"))
"""Operators that are folded however large the constant is."""
CHECK_SEEDS = (1, 2)
"""Seeds of the random inputs on which both graphs are compared."""


@dataclass(frozen=True)
class ImportedGraph:
    """A graph that a recipe can start from, with its inputs, the changes, and the steps that failed."""

    graph: onnx.ModelProto
    inputs: GraphInputs
    changes: tuple[str, ...]
    failures: tuple[str, ...] = ()


def import_graph(file: Path) -> ImportedGraph:
    """Read and normalize the graph of ``file``. Raises `ModelError` if it is broken, too new, or has no outputs."""
    original = read_graph_file(file)
    session = _open(original, file)
    # An unknown graph does not state sizes and values of its inputs, so they are found by trial.
    inputs = synthesize_inputs(original, session)
    # Apply the normalization steps; a step counts if the graph still opens, gives the same answers and is no larger.
    graph, changes, failures = original, list[str](), list[str]()
    feeds = [] if inputs.unproven else [inputs.draw(seed) for seed in CHECK_SEEDS]
    expected = [run_session(session, feed) for feed in feeds]
    # Folding would turn the integers of a quantized graph into floats.
    quantized = any(node.op_type in INTEGER_OPERATORS for node in original.graph.node)
    # The alternatives of a step are tried in order until one of them works.
    for ways, computes in _STEPS:
        if computes and (not feeds or quantized):
            continue
        for step in ways:
            try:
                with suppress_output("logs"):
                    changed, change = step(ir.from_proto(graph))
                changed_graph = ir.to_proto(changed)
            except _LIBRARY_FAILURES as error:
                # A pass that fails on a graph leaves it as it was; a stage that needs the step says what is missing.
                failures.append(f"{step.__name__.strip('_')}: {first_line(error)}")
                continue
            if change is not None and changed_graph.ByteSize() <= original.ByteSize() * _GROWTH + _OVERHEAD_BYTES:
                if _same_answers(changed_graph, feeds, expected):
                    graph, changes = changed_graph, [*changes, change]
                else:
                    failures.append(f"{change}, but the answers changed")
            break
    return ImportedGraph(graph, inputs, tuple(changes), tuple(failures))


def read_graph_file(file: Path) -> onnx.ModelProto:
    """Read a whole graph with its weights, external ones included. Raises `ModelError`."""
    from google.protobuf.message import DecodeError

    from compress.formats.onnx.stored_tensors import read_tensors

    # The external data is checked before onnx opens it, which would follow any path.
    read_tensors(file, file.parent)
    try:
        graph = onnx.load(file)
    except (DecodeError, onnx.checker.ValidationError, OSError) as error:
        raise ModelError(
            f"The graph cannot be read: {first_line(error)}",
            where=str(file),
            expected="a whole .onnx file, and beside it the files that its weights lie in",
            hint="fetch or export it again",
        ) from error
    # A diverged training leaves NaN in weights. Infinity may be a mask.
    for tensor in (tensor for subgraph in all_graphs(graph.graph) for tensor in subgraph.initializer):
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise ModelError(
                f"The tensor {tensor.name!r} holds NaN.",
                where=str(file),
                expected="finite weights",
                hint="export another checkpoint: a training run that diverged leaves such weights",
            )
    if not graph.graph.output:
        raise ModelError(
            "The graph has no outputs.",
            where=str(file),
            expected="at least one output",
            hint="export the model again, and name what it returns",
        )
    return graph


def _open(graph: onnx.ModelProto, file: Path) -> onnxruntime.InferenceSession:
    """Open the graph. Raises `ModelError` if its operator set is too new or ONNX Runtime refuses it."""
    opset = next((entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")), 0)
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise ModelError(
            f"The graph has ONNX operator set {opset}, which is newer than onnx {onnx.__version__} supports.",
            where=str(file),
            expected=f"operator set {newest} or older (onnx {onnx.__version__})",
            hint="export it with an older one, such as opset_version=21, or install newer onnx and onnxruntime",
        )
    try:
        return open_session(graph)
    except FAILURES as error:
        raise ModelError(
            f"ONNX Runtime {onnxruntime.__version__} does not open the graph: {first_line(error)}",
            where=str(file),
            expected="a graph of operators that ONNX Runtime has, all of their inputs there",
            hint="export it again; operators of one's own need a library that compress does not load",
        ) from error


_LIBRARY_FAILURES = (
    *(ValueError, RuntimeError, NotImplementedError, TypeError, AttributeError, KeyError, IndexError),
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    *FAILURES,
)
Step = Callable[[ir.Model], tuple[ir.Model, str | None]]
"""Changes the graph in place or returns a new one, with a description of the change; None if nothing was changed."""


def _same_answers(
    graph: onnx.ModelProto, feeds: Sequence[Mapping[str, np.ndarray]], expected: Sequence[Sequence[np.ndarray]]
) -> bool:
    """Return whether the graph gives the expected answers."""
    try:
        session = open_session(graph)
        actual = [run_session(session, feed) for feed in feeds]
    except FAILURES:
        return False
    return all(all(map(outputs_match, ours, theirs)) for ours, theirs in zip(expected, actual, strict=True))


def run_session(session: onnxruntime.InferenceSession, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return every output."""
    outputs: list[np.ndarray] = session.run(None, dict(feed))
    return outputs


def outputs_match(expected: np.ndarray, actual: np.ndarray) -> bool:
    """Return whether an output equals the original's up to the order of sums. Text outputs are not compared."""
    if not isinstance(expected, np.ndarray) or expected.shape != actual.shape:
        return isinstance(expected, list) and isinstance(actual, list)
    if expected.dtype.kind != "f":
        return bool((expected == actual).all())
    expected_values, actual_values = expected.astype(np.float64), actual.astype(np.float64)
    # A constant output has no spread; its magnitude takes the place.
    spread = float(expected_values.std()) or float(np.abs(expected_values).max(initial=0)) or 1.0
    return bool(np.allclose(expected_values, actual_values, rtol=_TOLERANCE, atol=_TOLERANCE * spread, equal_nan=True))


def _inline(model: ir.Model) -> tuple[ir.Model, str | None]:
    """Replace calls of the file's functions by their nodes."""
    count = len(model.functions)
    if count:
        common.InlinePass()(model)
    return model, f"{count} functions inlined" if count else None


def _lift(model: ir.Model) -> tuple[ir.Model, str | None]:
    """Turn Constant nodes into initializers, and remove initializers from the inputs."""
    count = sum(node.op_type == "Constant" for graph in model.graphs() for node in graph)
    listed = sum(value.is_initializer() for value in model.graph.inputs)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveInitializersFromInputsPass()(model)
    return model, f"{count} constants made initializers" if count or listed else None


def _convert(model: ir.Model) -> tuple[ir.Model, str | None]:
    """Convert to an operator set with per-channel scales by onnx's converter. Raises `RuntimeError` if it fails."""
    from onnx import version_converter

    opset = model.opset_imports.get("", OLDEST_OPSET)
    if opset >= OLDEST_OPSET:
        return model, None
    proto = ir.to_proto(model)
    # The converter does not raise the IR version, and operator set 13 needs IR version 7.
    proto.ir_version = max(proto.ir_version, 7)
    converted = ir.from_proto(version_converter.convert_version(proto, OLDEST_OPSET))
    return converted, f"operator set {opset} converted to {OLDEST_OPSET}"


def _fold(model: ir.Model) -> tuple[ir.Model, str | None]:
    """Fold constant expressions with onnxscript."""
    from onnxscript import optimizer

    node_count = _count(model)
    optimizer.optimize_ir(model, onnx_shape_inference=False, should_fold=_is_move)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    saved = node_count - _count(model)
    return model, f"{saved} nodes computed beforehand" if saved > 0 else None


def _fold_by_onnxruntime(model: ir.Model) -> tuple[ir.Model, str | None]:
    """Fold constant expressions with ONNX Runtime, which supports branches."""
    optimized = ir.from_proto(optimize_basic(ir.to_proto(model)))
    saved = _count(model) - _count(optimized)
    return optimized, f"{saved} constant nodes folded by ONNX Runtime" if saved > 0 else None


def _is_move(node: ir.Node) -> bool | None:
    """Return True for a node that only moves constants, which is folded regardless of size; None leaves the default."""
    stored = all(value is not None and value.const_value is not None for value in node.inputs)
    return True if node.op_type in _MOVES and stored else None


def _fold_batch_normalization(model: ir.Model) -> tuple[ir.Model, str | None]:
    """Fold `BatchNormalization` into the weights of the preceding convolution or product."""
    from onnxscript.rewriter import RewriteRuleSet
    from onnxscript.rewriter.rules import common as rules

    rules_to_apply = RewriteRuleSet([rules.fuse_batchnorm_into_conv_rule, rules.fuse_batchnorm_into_gemm_rule])
    count = rules_to_apply.apply_to_model(model)
    common.RemoveUnusedNodesPass()(model)
    return model, f"{count} normalizations folded into weights" if count else None


def _count(model: ir.Model) -> int:
    """Return the number of nodes, those of branches included."""
    return sum(1 for graph in model.graphs() for _ in graph)


_STEPS: tuple[tuple[tuple[Step, ...], bool], ...] = (
    ((_inline,), False),
    ((_lift,), False),
    ((_convert,), True),
    ((_lift,), False),
    ((_fold, _fold_by_onnxruntime), True),
    ((_fold_batch_normalization,), True),
)
"""Steps in order: alternatives, each tried if the one before fails, and whether the step computes new values."""


_PIXELS = "pixel_values"


def rename_for_clients(start: ImportedGraph) -> ImportedGraph:
    """Return the graph with the names that transformers' clients expect, if possible for batches of any size.

    An image input becomes `pixel_values`, and a single output [batch, classes] becomes `logits`; other graphs keep
    their names. A first axis of 1 becomes dynamic where a batch of two gives the same answers as two calls.
    """
    model = ir.from_proto(start.graph)
    changes = list(start.changes)
    renamed = []
    # A rank identifies an image input and class scores.
    for values, rank, name in ((model.graph.inputs, 4, _PIXELS), (model.graph.outputs, 2, LOGITS)):
        value = values[0]
        if len(values) == 1 and value.shape is not None and len(value.shape) == rank and value.name != name:
            renamed.append(f"{value.name} is called {name}")
            value.name = name
    graph = ir.to_proto(model) if renamed else start.graph
    pairs = zip(start.inputs.inputs, model.graph.inputs, strict=True)
    inputs = replace(start.inputs, inputs=tuple(replace(entry, name=str(value.name)) for entry, value in pairs))
    freed = _with_free_batch(graph, inputs)
    if freed is not None:
        graph, changes = freed, [*changes, "batches of any size"]
    return replace(start, graph=graph, inputs=inputs, changes=(*changes, *renamed))


def _with_free_batch(graph: onnx.ModelProto, inputs: GraphInputs) -> onnx.ModelProto | None:
    """Return ``graph`` with a dynamic first axis instead of 1; None if it has none or answers differently."""
    if inputs.unproven or not all(entry.axes and entry.axes[0] == 1 for entry in inputs.inputs):
        return None
    model = ir.from_proto(graph)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and len(value.shape) and value.shape[0] == 1:
            value.shape = ir.Shape(["batch", *value.shape[1:]])
    # Recorded shapes of values in between still have the fixed batch.
    for node in model.graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None
    batched = ir.to_proto(model)
    calls = [inputs.draw(seed) for seed in CHECK_SEEDS]
    together = {name: np.concatenate([call[name] for call in calls]) for name in calls[0]}
    try:
        session = open_session(batched)
        single = [run_session(session, call) for call in calls]
        together_outputs = run_session(session, together)
    except FAILURES:
        return None
    expected = [np.concatenate(parts) for parts in zip(*single, strict=True)]
    return batched if all(map(outputs_match, expected, together_outputs)) else None
