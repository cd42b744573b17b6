"""Operators of a graph that ONNX Runtime runs on 8-bit integers, and the reasons why others run in float.

It also classifies the nodes of an optimized graph by the purpose of their time and explains slow 8-bit nodes.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from compress.formats.onnx.graph_edits import constant
from compress.formats.onnx.runtimes.profile import original_name, write_optimized

INTEGER = frozenset(
    (
        *("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QAttention"),
        *("QLinearConv", "ConvInteger", "DynamicQuantizeLSTM", "GatherBlockQuantized"),
    )
)
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Attention", "MultiHeadAttention")
CONVOLUTIONS = ("Conv", "FusedConv", "ConvTranspose")
_SMALL = 1024
_ONLY_WEIGHTS = "its weights are dequantized in each call, since its input is float"
Part = Literal["products", "conversions", "rest"]
_STATIC = "onnx_int8: {method: static}"
_EMBEDDING = "onnx_int8: {embedding_bits: 8} writes GatherBlockQuantized"
_KEEP = "keep such layers in float: `onnx_int8: {keep: [...]}`, with the layers' names"


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
    return "it is not quantized", "quantize the model, or leave it so if an accuracy floor put it back"


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
        return "its activations are signed bytes, which ONNX Runtime leaves so on x86 where several operators read them"
    if node.op_type in CONVOLUTIONS and len(node.inputs) > 2 and not _dequantized(node.inputs[2]):
        return "its bias is float"
    if node.op_type == "FusedConv":
        return "its activation function stands between it and its QuantizeLinear"
    if node.op_type in CONVOLUTIONS and not quantizers:
        return "nothing rounds what it gives, and no kernel for convolutions gives float"
    return "ONNX Runtime fuses no such pair here"


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


@dataclass(frozen=True)
class SlowdownCause:
    """Reason why a node takes time that the float file does not spend; ``help`` is empty without a remedy."""

    why: str
    help: str = ""


FASTER = SlowdownCause("integer kernels are faster than those in float")
OTHER = SlowdownCause("other operators")
APART = SlowdownCause(
    "operators that ONNX Runtime fuses in the float file stay apart here",
    "quantize our own export (stage `onnx`) with `onnx_int8: {method: static}`: its fusions stay",
)


def part_of(node: ir.Node) -> Part:
    """Classify a node: products with weights and attention, conversions between floats and integers, or the rest."""
    # It is an integer operator but computes no product.
    if node.op_type == "GatherBlockQuantized":
        return "rest"
    if node.op_type in (*PRODUCTS, *CONVOLUTIONS, "MatMulNBits") or node.op_type in INTEGER:
        return "products"
    is_quantizer = node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
    return "conversions" if is_quantizer or _scales_back(node) else "rest"


def product_cause(node: ir.Node) -> SlowdownCause:
    """Return why a product or convolution is slower than in float."""
    # A float kernel in a quantized file has its own explanation.
    kernel = kernel_of(node)
    if kernel is not None and not kernel.integer:
        return SlowdownCause(kernel.why, kernel.help)
    if node.op_type in (*PRODUCTS, *CONVOLUTIONS):
        return SlowdownCause(
            "it is in float here too, and slower: its neighbours want another layout, or it lost a fusion"
        )
    if node.op_type == "ConvInteger":
        reason = "ConvInteger, which a convolution becomes whose range is found in each call, is slow"
        return SlowdownCause(reason, _STATIC)
    # A depthwise convolution has as many groups as channels.
    weight = node.inputs[3].const_value if node.op_type == "QLinearConv" and node.inputs[3] is not None else None
    is_depthwise = weight is not None and weight.shape[0] == node.attributes.get_int("group", 1) > 1
    kind = "8-bit kernel for depthwise convolutions" if is_depthwise else "8-bit kernel"
    return SlowdownCause(f"the {kind} is slower than the float one at this shape", _KEEP)


def conversion_cause(node: ir.Node) -> SlowdownCause:
    """Return why a node exists that the float file does not have."""
    float_product = _float_reader(node)
    if float_product is not None:
        return product_cause(float_product)
    if node.op_type == "DynamicQuantizeLinear":
        return SlowdownCause("the range of every input is found in each call", _STATIC)
    if node.op_type == "QuantizeLinear":
        return SlowdownCause("floats are rounded to integers before a product")
    if node.op_type == "DequantizeLinear":
        if node.inputs[0] is None or node.inputs[0].const_value is None:
            return SlowdownCause("integers are turned back into floats for operators that have no 8-bit kernel")
        if "Gather" in {use.node.op_type for value in node.outputs for use in value.uses()}:
            return SlowdownCause("a whole table is dequantized in each call", _EMBEDDING)
        return SlowdownCause("stored integers are dequantized in each call", _STATIC)
    return SlowdownCause("an integer product is scaled back to float by operators of its own", _STATIC)


def _scales_back(node: ir.Node, depth: int = 3) -> bool:
    """Return True if a Cast or Mul only converts an integer product to float, or multiplies scales."""
    if node.op_type not in ("Cast", "Mul") or depth < 0:
        return False
    makers = [maker for value in node.inputs if value is not None and (maker := value.producer()) is not None]
    operators = {maker.op_type for maker in makers}
    # The result of an integer product is cast and scaled.
    if operators & {"ConvInteger", "MatMulInteger"} or (node.op_type == "Mul" and "DynamicQuantizeLinear" in operators):
        return True
    return any(_scales_back(maker, depth - 1) for maker in makers)


def _float_reader(node: ir.Node, depth: int = 3) -> ir.Node | None:
    """Return the float product that a conversion serves, directly or through its inverse."""
    for value in node.outputs:
        for use in value.uses():
            reader = use.node
            if reader.op_type in (*PRODUCTS, *CONVOLUTIONS):
                kernel = kernel_of(reader)
                if kernel is not None and not kernel.integer and any(map(_dequantized, reader.inputs)):
                    return reader
            # Follow values through layout changes for a few steps.
            if depth and reader.op_type in ("DequantizeLinear", "Transpose", "Reshape"):
                product = _float_reader(reader, depth - 1)
                if product is not None:
                    return product
    return None
