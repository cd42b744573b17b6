"""Encoders and image models as ONNX graphs: equal to torch, attention as one operator, INT8 right, and its bytes.

The difference from torch is the largest of a logit on padded batches of several lengths; the error of INT8 (dynamic for
texts, static for images) is a share of the logits' spread over examples.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_encoders import IMAGES, build, examples_of, inputs
from trials import Trial

from compress.utils.errors import CompressError

_QUERIES = (
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
_RIGHT = 0.2
"""Of the spread of the logits, which INT8 may be off; further only where ONNX Runtime's own quantizer is further off.

Convolutions with random weights amplify every disturbance, unlike those that were trained.
"""


def attention_calls(name: str, module: Any) -> int:
    """How often a forward attends: calls of modules with a projection of queries, or of all three, of their own."""
    calls, handles = 0, []

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for part in module.modules():
        if any(child in _QUERIES for child, _ in part.named_children()):
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
    """Export a family, prove it, quantize it and compare."""
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
        error, size, usual = _int8(name, exported.graph, examples)
        as_usual = "" if usual is None else f", ONNX Runtime's own {usual:.0%}"
        right = error < max(_RIGHT, usual or 0.0)
        cells["INT8 error"] = f"{error:.1%}{as_usual}" if right else f"no: {error:.0%} of the spread{as_usual}"
        cells["INT8 size"] = f"{size:.0%}"
    except CompressError as refused:
        cells["INT8 error"] = f"no: {refused.what}"
    return cells


TRIAL = Trial(("ONNX", "attention", "INT8 error", "INT8 size"), judge)


def quantized(name: str, graph: Any, examples: Any) -> Any:
    """INT8 as the stage `onnx_int8` makes it: dynamic for texts, static for images."""
    from compress.formats.onnx.int8.dynamic import quantize_embeddings, quantize_products, quantize_rows_in_order
    from compress.formats.onnx.int8.settings import Int8Options
    from compress.formats.onnx.int8.static import StaticQuantizer

    if name in IMAGES:
        feeds = [examples.batch([row]) for row in range(32)]
        int8_graph = StaticQuantizer(graph, feeds, Int8Options(method="static")).quantize()
    else:
        int8_graph = quantize_products(graph, per_channel=True, reduce_range=False)
    quantize_rows_in_order(int8_graph)
    quantize_embeddings(int8_graph, 8)
    return int8_graph


def _int8(name: str, graph: Any, examples: Any) -> tuple[float, float, float | None]:
    """Error of INT8, bytes over those of fp32, and for image models with a large error that of ONNX Runtime's own."""
    int8_graph = quantized(name, graph, examples)
    fresh = examples_of(name, count=64, seed=1)
    expected = _answers(graph, fresh)
    spread = np.sqrt(((expected - expected.mean(0)) ** 2).mean())

    def error_of(other: Any) -> float:
        return float(np.sqrt(((_answers(other, fresh) - expected) ** 2).mean()) / spread)

    sizes = [sum(len(tensor.raw_data) for tensor in candidate.graph.initializer) for candidate in (int8_graph, graph)]
    error = error_of(int8_graph)
    usual = error_of(_by_onnxruntime(graph, examples)) if name in IMAGES and error >= _RIGHT else None
    return error, sizes[0] / sizes[1], usual


def _by_onnxruntime(graph: Any, examples: Any) -> Any:
    """Static INT8 by ONNX Runtime's quantizer, a scale for each channel, on the same examples."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """One example at a time."""

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


def _answers(graph: Any, examples: Any) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    batch = examples.batch(range(len(examples)))
    feed = {entry.name: batch[entry.name] for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    output: np.ndarray = examples.answers(dict(zip(names, session.run(names, feed), strict=True)), batch)
    return output
