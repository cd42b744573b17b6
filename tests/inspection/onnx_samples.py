"""Builders of tiny ONNX models for the tests of inspection."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(path: Path, nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto]) -> Path:
    """Write an ONNX file with the nodes and initializers, without graph inputs and outputs, and return its path."""
    graph = helper.make_graph(nodes, "g", [], [], initializer=tensors)
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def tensor(name: str, values: np.ndarray) -> onnx.TensorProto:
    """Return an initializer with raw data."""
    return numpy_helper.from_array(values, name)


def classifier(path: Path) -> Path:
    """Write an embedding, a quantized and a float layer with opaque names, and a head, like ONNX Runtime does."""
    nodes = [
        helper.make_node("Gather", ["m.embeddings.words.weight_quantized", "ids"], ["rows"]),
        helper.make_node(
            "DequantizeLinear",
            ["rows", "m.embeddings.words.weight_scale", "m.embeddings.words.weight_zero_point"],
            ["x"],
        ),
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node("MatMulInteger", ["xq", "val_7_quantized", "xz", "val_7_zero_point"], ["y"]),
        helper.make_node("Cast", ["y"], ["yf"], to=1),
        helper.make_node("Mul", ["xs", "val_7_scale"], ["ys"]),
        helper.make_node("Mul", ["yf", "ys"], ["yd"]),
        helper.make_node("Split", ["yd", "val_9"], ["q", "k"], axis=-1),
        helper.make_node("Add", ["q", "m.encoder.layer.0.attention.query.bias"], ["q2"]),
        helper.make_node("Add", ["m.encoder.layer.0.attention.key.bias", "k"], ["k2"]),
        helper.make_node("MatMul", ["q2", "onnx::MatMul_3"], ["f"]),
        helper.make_node("Add", ["f", "m.encoder.layer.0.output.dense.bias"], ["f2"]),
        helper.make_node("Gemm", ["f2", "classifier.weight", "classifier.bias"], ["out"]),
    ]
    tensors = [
        tensor("m.embeddings.words.weight_quantized", np.ones((10, 4), np.uint8)),
        tensor("m.embeddings.words.weight_scale", np.float32(0.5).reshape(())),
        tensor("m.embeddings.words.weight_zero_point", np.uint8(1).reshape(())),
        tensor("val_7_quantized", np.ones((4, 8), np.int8)),
        tensor("val_7_scale", np.ones(8, np.float32)),
        tensor("val_7_zero_point", np.zeros(8, np.int8)),
        tensor("val_9", np.array([4, 4], np.int64)),
        tensor("m.encoder.layer.0.attention.query.bias", np.ones(4, np.float32)),
        tensor("m.encoder.layer.0.attention.key.bias", np.ones(4, np.float32)),
        tensor("onnx::MatMul_3", np.ones((4, 6), np.float32)),
        tensor("m.encoder.layer.0.output.dense.bias", np.ones(6, np.float32)),
        tensor("classifier.weight", np.ones((6, 2), np.float32)),
        tensor("classifier.bias", np.ones(2, np.float32)),
    ]
    return save(path, nodes, tensors)


def with_external_data(folder: Path) -> Path:
    """Write `a.weight` (3 x 4 fp32), `b.weight` at the same offset of `m.data`, and `c.weight` after them."""
    (folder / "m.data").write_bytes(np.arange(12, dtype=np.float32).tobytes() + np.ones(2, np.float32).tobytes())
    places = {"a.weight": ((3, 4), 0, 48), "b.weight": ((3, 4), 0, 48), "c.weight": ((2,), 48, 8)}
    return save(folder / "m.onnx", [], [outside(name, *location) for name, location in places.items()])


def outside(name: str, shape: tuple[int, ...], offset: int, length: int, location: str = "m.data") -> onnx.TensorProto:
    """Return an initializer with external data."""
    proto = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": str(offset), "length": str(length)}.items():
        proto.external_data.add(key=key, value=value)
    return proto
