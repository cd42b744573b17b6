"""float16 graphs: what is converted, what stays, and what is refused with its reason."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel
from pydantic import ValidationError

from compress.formats.onnx.float16 import to_float16
from compress.stages.cast import Cast
from compress.utils.errors import StageError


def network(largest: float = 1.0, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    weight = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    weight[0, 0] = largest
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="product"),
        helper.make_node("Softmax", ["product"], ["y"], name="softmax"),
    ]
    values = [helper.make_tensor_value_info(name, kind, ["rows", 8]) for name in ("x", "y")]
    stored = helper.make_tensor("w", kind, weight.shape, weight.ravel())
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [stored])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(graph: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    answer: np.ndarray = session.run(None, {"x": x})[0]
    return answer


def test_weights_are_rounded_and_clients_give_and_get_float32() -> None:
    half = to_float16(network())
    (stored,) = half.graph.initializer
    exact = numpy_helper.to_array(network().graph.initializer[0])
    np.testing.assert_array_equal(numpy_helper.to_array(stored), exact.astype(np.float16))
    x = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    actual = run(half, x)
    assert actual.dtype == np.float32 and 0 < np.abs(actual - run(network(), x)).max() < 5e-3


def test_weights_that_float16_cannot_hold_are_refused_unless_kept() -> None:
    with pytest.raises(StageError, match="'w' holds values beyond"):
        to_float16(network(1e5))
    with pytest.raises(StageError, match="no weights to convert to float16"):
        to_float16(network(1e5), ["MatMul"])


def test_bf16_is_refused_since_no_runtime_here_computes_in_it() -> None:
    with pytest.raises(ValidationError, match="no bf16 kernels"):
        Cast(dtype="bf16")
    with pytest.raises(NoKernel):
        run(network(kind=TensorProto.BFLOAT16), np.zeros((1, 8), np.float32))
