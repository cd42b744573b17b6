"""Conversion of a graph to OpenVINO's IR, with weights unchanged, in float16, or in 8 bits by NNCF."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.formats.openvino.genai import reason
from compress.formats.openvino.model import IR_FILE, OpenVinoModel
from compress.formats.quiet_output import suppress_output
from compress.utils.errors import StageError

if TYPE_CHECKING:
    import onnx
    from openvino import Model, Node

Precision = Literal["fp32", "fp16", "int8"]
_GROUP = 32
"""Weights of a row that share a scale and a zero point in 4 bits; `onnx_int8` uses blocks of the same size."""
_MOST_INPUTS_A_SCALE, _STEP = 256, 32
_NOT_TABLES = ("MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")


def to_openvino(
    graph: onnx.ModelProto, companions: Mapping[str, bytes], precision: Precision, table_bits: int = 8
) -> OpenVinoModel:
    """Convert a graph of standard ONNX operators to IR; equal inputs give identical bytes.

    In int8, the weights of products, convolutions and embedding tables have a scale and a zero point per channel.
    OpenVINO's processor plugin rounds their inputs in each call, as ONNX Runtime's dynamic INT8 does. The IR states how
    many inputs share a scale (`DYNAMIC_QUANTIZATION_GROUP_SIZE`).

    Args:
        graph: ONNX graph.
        companions: Other files of the model folder.
        precision: Type of the weights.
        table_bits: Bits of embedding tables in int8; 4 uses a scale for every 32 weights where a row is a multiple of
            32.

    Raises:
        StageError: OpenVINO cannot read the graph.
    """
    import onnx
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        onnx.save_model(graph, source)
        try:
            model = openvino.Core().read_model(source)
        except RuntimeError as error:
            raise StageError(
                f"OpenVINO cannot read the graph: {reason(error)}",
                expected="operators of ONNX itself",
                hint="see OpenVINO's list of supported operators, or leave this target out",
            ) from error
        if precision == "int8":
            model = compress_to_int8(model, table_bits)
            # Let as many inputs share a scale as all products allow; smaller groups add partial sums in float.
            widths = {
                weights[-1 if operator.get_attributes()["transpose_b"] else -2]
                for operator in model.get_ordered_ops()
                if operator.get_type_name() == "MatMul"
                and len(weights := _shape_of_weights(operator.input_value(1).get_node())) == 2
            }
            # A group must divide the width of every product.
            shared = math.gcd(*widths)
            sizes = [size for size in range(_STEP, min(shared, _MOST_INPUTS_A_SCALE) + 1, _STEP) if shared % size == 0]
            if sizes:
                model.set_rt_info(f"{sizes[-1]}", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        return OpenVinoModel(serialize_ir(model, IR_FILE, precision == "fp16"), companions)


def serialize_ir(model: Model, name: str, halves: bool = False) -> dict[str, bytes]:
    """Return the XML file ``name`` and the weights file beside it, with float32 values as float16 if ``halves``."""
    import openvino

    for index, operator in enumerate(model.get_ordered_ops()):
        # Default names contain a counter of the whole process; the operator's index makes them reproducible.
        if re.fullmatch(rf"{operator.get_type_name()}_\d+", operator.get_friendly_name()):
            operator.set_friendly_name(f"{operator.get_type_name()}_{index}")
    with tempfile.TemporaryDirectory() as folder:
        xml_file = Path(folder) / name
        openvino.save_model(model, xml_file, compress_to_fp16=halves)
        return {path.name: path.read_bytes() for path in (xml_file, xml_file.with_suffix(".bin"))}


def compress_to_int8(model: Model, table_bits: int) -> Model:
    """Return the graph with float weights in 8 bits, and its tables in 4 if ``table_bits`` is 4, by NNCF."""
    with suppress_output("prints"):
        import nncf

        modes = nncf.CompressWeightsMode
        if table_bits == 4 and any(_is_table(operator) for operator in model.get_ordered_ops()):
            others = nncf.IgnoredScope(types=list(_NOT_TABLES), validate=False)
            in_groups = {"group_size": _GROUP, "ratio": 1.0, "all_layers": True, "ignored_scope": others}
            model = nncf.compress_weights(model, mode=modes.INT4_ASYM, **in_groups)
        return nncf.compress_weights(model, mode=modes.INT8_ASYM)


def _is_table(operator: Any) -> bool:
    """Return whether an operator looks up rows of a stored matrix whose length is a multiple of a group."""
    if operator.get_type_name() != "Gather":
        return False
    source = operator.input_value(0).get_node()
    if source.get_type_name() != "Constant" or not source.get_element_type().is_real():
        return False
    shape = list(source.get_output_shape(0))
    return len(shape) == 2 and shape[1] % _GROUP == 0


def _shape_of_weights(node: Node) -> list[int]:
    """Return the shape of a stored matrix behind its scale and zero point, or an empty list for a computed one."""
    shape = node.get_output_partial_shape(0)
    while node.get_type_name() != "Constant":
        if node.get_type_name() not in ("Convert", "Multiply", "Subtract", "Reshape"):
            return []
        node = node.input_value(0).get_node()
    return list(shape.to_shape()) if shape.is_static else []
