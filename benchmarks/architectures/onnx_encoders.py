"""Test encoders and image models as ONNX graphs: equality with torch, fused attention, and error and size of INT8.

The difference from torch is the largest one of a logit on padded batches of several lengths. The error of INT8 (dynamic
for texts, static for images) is relative to the spread of the logits over examples.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_encoders import IMAGES, build, examples_of, inputs
from trials import SILENT, Trial

from compress.utils.errors import CompressError

_QUERY_PROJECTIONS = (
    "query",
    "q_proj",
    "q_lin",
    "q",
    "q_head",
    "queries",
    "qkv",
    "Wqkv",
    "in_proj",
    "query_key_value",
    "query_proj",
    "queries_keys_values",
)
_MAX_INT8_ERROR = 0.2
"""Relative to the spread of the logits. A larger error is accepted if that of ONNX Runtime's quantizer is larger still,
since convolutions with random weights amplify errors, unlike trained ones.
"""


def attention_calls(name: str, module: Any) -> int:
    """Count the attention calls in a forward pass: calls of modules with a query or QKV projection."""
    calls, handles = 0, []

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for part in module.modules():
        if any(child in _QUERY_PROJECTIONS for child, _ in part.named_children()):
            handles.append(part.register_forward_hook(count))
    handles += [
        part.register_forward_hook(count)
        for part in module.modules()
        if isinstance(getattr(part, "q", None), torch.nn.Parameter)
    ]
    with torch.no_grad():
        module(**inputs(name))
    for handle in handles:
        handle.remove()
    return calls


def judge(name: str, _: Path) -> dict[str, str]:
    """Export a model, verify it, quantize it and compare the outputs."""
    from compress.formats.onnx.export import export_onnx, verify_parity
    from compress.models.model import TorchModel

    model = TorchModel(build(name), None)
    examples = examples_of(name)
    layers = attention_calls(name, model.module)
    exported = export_onnx(model, examples, None, fusions=True)
    operators = Counter(node.op_type for node in exported.graph.graph.node)
    fused = sum(operators[kind] for kind in ("Attention", "MultiHeadAttention", "GroupQueryAttention"))
    unfused = exported.unfused or f"{fused} of {layers} layers are fused"
    attention = "none" if not layers else f"{fused} fused" if fused == layers else f"as it is: {unfused}"
    cells = {"ONNX": f"{verify_parity(exported.graph, model, examples, 1e-3):.0e}", "attention": attention}
    try:
        error, size, reference = _int8(name, exported.graph, examples)
        note = "" if reference is None else f", ONNX Runtime's own {reference:.0%}"
        accepted = error < max(_MAX_INT8_ERROR, reference or 0.0)
        cells["INT8 error"] = f"{error:.1%}{note}" if accepted else f"no: {error:.0%} of the spread{note}"
        cells["INT8 size"] = f"{size:.0%}"
    except CompressError as refusal:
        cells["INT8 error"] = f"no: {refusal.what}"
    return cells


TRIAL = Trial(("ONNX", "attention", "INT8 error", "INT8 size"), judge)


def quantize(name: str, graph: Any, examples: Any) -> Any:
    """Quantize a graph to INT8: texts by the stage `onnx_int8`, images like its static method."""
    from compress.formats.onnx.int8.dynamic import quantize_embeddings, quantize_rows_in_order
    from compress.formats.onnx.int8.settings import Int8Options
    from compress.formats.onnx.int8.static import StaticQuantizer
    from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
    from compress.stages.onnx_int8.stage import OnnxInt8

    if name not in IMAGES:
        return OnnxInt8().run(OnnxModel(graph, FLOAT_GRAPH, {}), SILENT).graph
    feeds = [examples.batch([row]) for row in range(32)]
    int8_graph = StaticQuantizer(graph, feeds, Int8Options(method="static")).quantize()
    quantize_rows_in_order(int8_graph)
    quantize_embeddings(int8_graph, 8)
    return int8_graph


def _int8(name: str, graph: Any, examples: Any) -> tuple[float, float, float | None]:
    """Return error and relative size of INT8, and ONNX Runtime's error for image models whose own error is large."""
    int8_graph = quantize(name, graph, examples)
    test_examples = examples_of(name, count=64, seed=1)
    expected = _outputs(graph, test_examples)
    spread = np.sqrt(((expected - expected.mean(0)) ** 2).mean())

    def error_of(other: Any) -> float:
        return float(np.sqrt(((_outputs(other, test_examples) - expected) ** 2).mean()) / spread)

    sizes = [sum(len(tensor.raw_data) for tensor in candidate.graph.initializer) for candidate in (int8_graph, graph)]
    error = error_of(int8_graph)
    compared = name in IMAGES and error >= _MAX_INT8_ERROR
    reference = error_of(_quantize_by_onnxruntime(graph, examples)) if compared else None
    return error, sizes[0] / sizes[1], reference


def _quantize_by_onnxruntime(graph: Any, examples: Any) -> Any:
    """Quantize a graph with ONNX Runtime's static per-channel quantizer on the same examples."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Calibration examples, one at a time."""

        def __init__(self) -> None:
            names = [entry.name for entry in graph.graph.input]
            batches = (examples.batch([row]) for row in range(32))
            self.feeds = iter([{name: batch[name] for name in names} for batch in batches])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(graph, source)
        quantize_static(source, target, Reader(), per_channel=True, weight_type=QuantType.QInt8)
        return onnx.load(target)


def _outputs(graph: Any, examples: Any) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    batch = examples.batch(range(len(examples)))
    feed = {entry.name: batch[entry.name] for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    output: np.ndarray = examples.answers(dict(zip(names, session.run(names, feed), strict=True)), batch)
    return output
