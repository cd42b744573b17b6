"""Operators of a graph that ONNX Runtime runs on 8-bit integers, and the reasons why others run in float."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from compress.formats.onnx.graph_edits import constant
from compress.formats.onnx.graph_reader import CONVOLUTIONS
from compress.formats.onnx.runtimes.profile import original_name, write_optimized

INTEGER = frozenset(
    (
        *("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QAttention"),
        *("QLinearConv", "ConvInteger", "DynamicQuantizeLSTM", "GatherBlockQuantized"),
    )
)
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Attention", "MultiHeadAttention")
_SMALL = 1024
_ONLY_WEIGHTS = "its weights are dequantized in each call because its input is float"
_STATIC = "onnx_int8: {method: static}"
_EMBEDDING = "onnx_int8: {embedding_bits: 8} writes GatherBlockQuantized"


@dataclass(frozen=True)
class WeightedKernel:
    """Operator with stored weights as it actually runs. ``why`` and ``help`` are empty for an integer kernel."""

    name: str
    operator: str
    integer: bool
    why: str = ""
    help: str = ""


def read_kernels(graph: Path, threads: int = 1) -> list[WeightedKernel]:
    """Return the weighted operators of the optimized form of the file ``graph``, including those in subgraphs.

    Raises `ModelError` if the file does not open.
    """
    with tempfile.TemporaryDirectory(prefix="compress-kernels-") as folder:
        model = ir.load(write_optimized(graph, Path(folder), threads))
        nodes = ir.traversal.RecursiveGraphIterator(model.graph)
        return [kernel for node in nodes if (kernel := kernel_of(node)) is not None]


def kernel_of(node: ir.Node) -> WeightedKernel | None:
    """Return the kind of kernel of a node of an optimized graph; ``None`` for a node without weights."""
    name = original_name(str(node.name)) or str(node.name)
    # Weight-only products compute in integers only if activations are rounded too (accuracy_level 4).
    if node.op_type in INTEGER or (
        node.op_type == "MatMulNBits" and bool(node.attributes.get_int("accuracy_level", 0) == 4)
    ):
        return WeightedKernel(name, node.op_type, integer=True)
    if node.op_type == "MatMulNBits":
        return WeightedKernel(name, node.op_type, False, _ONLY_WEIGHTS, _STATIC)
    reason = _reason(node) if node.op_type in ("Gather", *PRODUCTS, *CONVOLUTIONS) else None
    return None if reason is None else WeightedKernel(name, node.op_type, False, *reason)


def _reason(node: ir.Node) -> tuple[str, str] | None:
    """Return why a weighted operator runs in float, and a remedy; ``None`` for an operator without weights."""
    stored = [(index, value) for index, value in enumerate(node.inputs[:2]) if value is not None]
    # A weight that is dequantized in the optimized graph was not fused into an integer operator.
    packed = [value for _, value in stored if _from_integers(value)]
    if node.op_type == "Gather":
        return ("the whole table is dequantized in each call", _EMBEDDING) if packed else None
    if packed:
        if not all(_dequantized(value) for _, value in stored):
            return _ONLY_WEIGHTS, _STATIC
        remedy = f"`{_STATIC}` of the float model, which writes integer operators and unsigned activations"
        return f"its integers are dequantized and multiplied in float: {_why_apart(node)}", remedy
    sizes = [array.size for index, value in stored if index and (array := constant(value)) is not None]
    # Small constant factors are not worth quantizing.
    if not sizes or max(sizes) < _SMALL:
        return None
    if any(_dequantized(value) for _, value in stored):
        return "its weights are float", "quantize its weights too"
    return "it is not quantized", "quantize the model, or keep it if an accuracy floor left it in float"


def _why_apart(node: ir.Node) -> str:
    """Return why ONNX Runtime creates no integer operator from a product of two dequantized inputs.

    Its selectors (`qdq_selectors.cc`) require one integer type for inputs and outputs, unsigned bytes on x86 (signed
    ones are converted only if a single operator reads them), a quantized bias, and nothing between a convolution and
    its QuantizeLinear except an activation made redundant by the quantized range.
    """
    readers = [use.node for value in node.outputs for use in value.uses()]
    quantizers = [user for user in readers if user.op_type == "QuantizeLinear"]
    # The integer types of the input and of every consumer. Without a zero point they are unsigned bytes.
    converters = [converter for converter in (_dequantizer(node.inputs[0]), *quantizers) if converter is not None]
    zeros = [converter.inputs[2] for converter in converters if len(converter.inputs) > 2]
    types = [zero.dtype if zero.const_value is None else zero.const_value.dtype for zero in zeros if zero is not None]
    if ir.DataType.INT8 in types:
        return "its activations are int8, which ONNX Runtime does not convert on x86 if several operators read them"
    if node.op_type in CONVOLUTIONS and len(node.inputs) > 2 and not _dequantized(node.inputs[2]):
        return "its bias is float"
    if node.op_type == "FusedConv":
        return "an activation function is between it and its QuantizeLinear"
    if node.op_type in CONVOLUTIONS and not quantizers:
        return "its output is not quantized, and no integer convolution kernel has float output"
    return "ONNX Runtime does not fuse this pair"


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _dequantized(value: ir.Value | None) -> bool:
    return _dequantizer(value) is not None


def _from_integers(value: ir.Value | None) -> bool:
    """Return True if a value is a dequantized stored tensor, possibly reshaped."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Transpose", "Reshape", "Identity") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "DequantizeLinear" and constant(node.inputs[0]) is not None
