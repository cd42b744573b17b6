"""Which of a graph's weighted operators ONNX Runtime runs on 8-bit integers, and why it does not run the others so."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from compress.models.fusions.graph import constant
from compress.runtimes.onnxruntime_profile import own_name, write_optimized

INTEGER = frozenset(
    (
        *("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QAttention"),
        *("QLinearConv", "ConvInteger", "DynamicQuantizeLSTM", "GatherBlockQuantized"),
    )
)
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Attention", "MultiHeadAttention")
_CONVOLUTIONS = ("Conv", "FusedConv", "ConvTranspose")
_SMALL = 1024
_ONLY_WEIGHTS = "its weights are dequantized in each call, since its input is float"


@dataclass(frozen=True)
class Kernel:
    """An operator with stored weights, as it really runs. ``why`` and ``help`` are empty for an integer kernel."""

    name: str
    operator: str
    integer: bool
    why: str = ""
    help: str = ""


def read_kernels(graph: Path, threads: int = 1) -> list[Kernel]:
    """Of the graph that ONNX Runtime makes of the file ``graph``. Raises `ModelError` for one that does not open."""
    with tempfile.TemporaryDirectory(prefix="compress-kernels-") as folder:
        model = ir.load(write_optimized(graph, Path(folder), threads))
        return list(_kernels(model))


def _kernels(model: ir.Model) -> Iterator[Kernel]:
    for node in model.graph:
        name = own_name(str(node.name)) or str(node.name)
        if node.op_type in INTEGER or (node.op_type == "MatMulNBits" and _rounds_activations(node)):
            yield Kernel(name, node.op_type, integer=True)
        elif node.op_type == "MatMulNBits":
            yield Kernel(name, node.op_type, False, _ONLY_WEIGHTS, "quantize: {method: static}")
        elif node.op_type in ("Gather", *_PRODUCTS, *_CONVOLUTIONS):
            reason = _reason(node)
            if reason is not None:
                yield Kernel(name, node.op_type, False, *reason)


def _rounds_activations(node: ir.Node) -> bool:
    return bool(node.attributes.get_int("accuracy_level", 0) == 4)


def _reason(node: ir.Node) -> tuple[str, str] | None:
    """Why a weighted operator is in float, and what would help; ``None`` for one that has no weights."""
    stored = [(place, value) for place, value in enumerate(node.inputs[:2]) if value is not None]
    packed = [value for _, value in stored if _from_integers(value)]
    if node.op_type == "Gather":
        if not packed:
            return None
        return (
            "the whole table is dequantized in each call",
            "quantize: {embedding_bits: 8} writes GatherBlockQuantized",
        )
    if packed:
        if not all(_dequantized(value) for _, value in stored):
            return _ONLY_WEIGHTS, "quantize: {method: static}"
        return (
            "its integers are dequantized and multiplied in float: ONNX Runtime fuses no such pair here",
            "quantize the float model with `quantize: {method: static}`, which writes integer operators",
        )
    sizes = [array.size for place, value in stored if place and (array := constant(value)) is not None]
    if not sizes or max(sizes) < _SMALL:
        return None
    if any(_dequantized(value) for _, value in stored):
        return "its weights are float", "quantize its weights too"
    return "it is not quantized", "quantize the model, or leave it so if an accuracy floor put it back"


def _dequantized(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "DequantizeLinear"


def _from_integers(value: ir.Value | None) -> bool:
    """Whether a stored tensor of integers is dequantized for this, perhaps after a change of shape."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Transpose", "Reshape", "Identity") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "DequantizeLinear" and constant(node.inputs[0]) is not None
