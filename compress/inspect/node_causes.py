"""What each node of an optimized graph takes its time for, and, where 8 bits stand in the way, why and what helps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from compress.inspect.integer_kernels import CONVOLUTIONS, INTEGER, PRODUCTS, kernel_of

Part = Literal["products", "conversions", "rest"]
_CONVERTS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_STATIC = "quantize: {method: static}"
_KEEP = "keep such layers in float: `quantize: {keep: [...]}`, with the layers' names"


@dataclass(frozen=True)
class Cause:
    """Why a node takes time that the float file does not spend; ``help`` is empty where nothing does."""

    why: str
    help: str = ""


FASTER = Cause("integer kernels are faster than those in float")
OTHER = Cause("other operators")
APART = Cause(
    "operators that ONNX Runtime fuses in the float file stay apart here",
    "quantize our own export (stage `export`) with `quantize: {method: static}`: its fusions stay",
)


def part_of(node: ir.Node) -> Part:
    """Products with weights and attention; what turns floats into integers and back; all else."""
    if node.op_type == "GatherBlockQuantized":
        return "rest"
    if node.op_type in (*PRODUCTS, *CONVOLUTIONS, "MatMulNBits") or node.op_type in INTEGER:
        return "products"
    return "conversions" if node.op_type in _CONVERTS or _scales_back(node) else "rest"


def product_cause(node: ir.Node) -> Cause:
    """Of a product, or a convolution, that is slower than in float."""
    kernel = kernel_of(node)
    if kernel is not None and not kernel.integer:
        return Cause(kernel.why, kernel.help)
    if node.op_type in (*PRODUCTS, *CONVOLUTIONS):
        return Cause("it is in float here too, and slower: its neighbours want another layout, or it lost a fusion", "")
    if node.op_type == "ConvInteger":
        return Cause("ConvInteger, which a convolution becomes whose range is found in each call, is slow", _STATIC)
    if _depthwise(node):
        return Cause("the 8-bit kernel for depthwise convolutions is slower than the float one at this shape", _KEEP)
    return Cause("the 8-bit kernel is slower than the float one at this shape", _KEEP)


def conversion_cause(node: ir.Node) -> Cause:
    """Of a node that the float file does not have."""
    apart = _float_reader(node)
    if apart is not None:
        return product_cause(apart)
    if node.op_type == "DynamicQuantizeLinear":
        return Cause("the range of every input is found in each call", _STATIC)
    if node.op_type == "QuantizeLinear":
        return Cause("floats are rounded to integers before a product", "")
    if node.op_type == "DequantizeLinear":
        if node.inputs[0] is not None and node.inputs[0].const_value is not None:
            readers = {use.node.op_type for value in node.outputs for use in value.uses()}
            if "Gather" in readers:
                return Cause(
                    "a whole table is dequantized in each call",
                    "quantize: {embedding_bits: 8} writes GatherBlockQuantized",
                )
            return Cause("stored integers are dequantized in each call", _STATIC)
        return Cause("integers are turned back into floats for operators that have no 8-bit kernel", "")
    return Cause("an integer product is scaled back to float by operators of its own", _STATIC)


def _scales_back(node: ir.Node, depth: int = 3) -> bool:
    """Whether a Cast or Mul only makes floats of what an integer product gave, or scales of scales."""
    if node.op_type not in ("Cast", "Mul"):
        return False
    makers = [value.producer() for value in node.inputs if value is not None]
    if any(maker is not None and maker.op_type in ("ConvInteger", "MatMulInteger") for maker in makers):
        return True
    if node.op_type == "Mul" and any(
        maker is not None and maker.op_type == "DynamicQuantizeLinear" for maker in makers
    ):
        return True
    return depth > 0 and any(
        maker is not None and maker.op_type in ("Cast", "Mul") and _scales_back(maker, depth - 1) for maker in makers
    )


def _float_reader(node: ir.Node, depth: int = 3) -> ir.Node | None:
    """The product in float that a conversion is for, directly or through what undoes it."""
    for value in node.outputs:
        for use in value.uses():
            reader = use.node
            if reader.op_type in (*PRODUCTS, *CONVOLUTIONS):
                kernel = kernel_of(reader)
                if kernel is not None and not kernel.integer and _reads_integers(reader):
                    return reader
            if depth and reader.op_type in ("DequantizeLinear", "Transpose", "Reshape"):
                found = _float_reader(reader, depth - 1)
                if found is not None:
                    return found
    return None


def _reads_integers(node: ir.Node) -> bool:
    makers = [value.producer() for value in node.inputs if value is not None]
    return any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)


def _depthwise(node: ir.Node) -> bool:
    """Whether an integer convolution has as many groups as channels."""
    if node.op_type != "QLinearConv":
        return False
    weight = node.inputs[3]
    group = node.attributes.get_int("group", 1)
    return group > 1 and weight is not None and weight.const_value is not None and weight.const_value.shape[0] == group
