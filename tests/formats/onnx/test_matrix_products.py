"""Products whose batch axes the runtime cannot turn are taken apart, and compute what the operator is defined to."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.matrix_products import unfold_batch_transposes

VALUES = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)


def product(weight: np.ndarray, **attributes: object) -> onnx.ModelProto:
    """[3, 4, 5] with its batch axis moved, times ``weight``."""
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", transBatchA=1, **attributes)
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(VALUES.shape))
    target = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "product", [source], [target], [numpy_helper.from_array(weight, "w")])
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=9)


def run(model: onnx.ModelProto) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: np.ndarray = session.run(None, {"x": VALUES})[0]
    return outputs


@pytest.mark.parametrize(("attributes", "operator"), [({}, "MatMul"), ({"alpha": 2.0}, "FusedMatMul")])
def test_a_product_with_plain_weights_runs_as_it_is_defined(attributes: dict[str, float], operator: str) -> None:
    weight = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32)
    model = product(weight, **attributes)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="same rank"):
        run(model)
    program = ir.from_proto(model)
    assert unfold_batch_transposes(program) == 1
    assert [node.op_type for node in program.graph] == ["Transpose", operator]
    expected = attributes.get("alpha", 1.0) * VALUES.transpose(1, 0, 2) @ weight
    np.testing.assert_allclose(run(ir.to_proto(program)), expected, rtol=1e-5)


def test_what_the_runtime_turns_by_itself_stays() -> None:
    weight = np.random.default_rng(1).normal(size=(4, 5, 2)).astype(np.float32)
    program = ir.from_proto(product(weight))
    assert unfold_batch_transposes(program) == 0
    np.testing.assert_allclose(run(ir.to_proto(program)), VALUES.transpose(1, 0, 2) @ weight, rtol=1e-5)
