"""ONNX graphs in the style of other exporters: weights in Constant nodes, old opsets, branches, several inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

OPSETS = (11, 17, 23)
CHANNELS, SIDE, CLASSES = 8, 8, 5
Value = onnx.ValueInfoProto


def value(name: str, axes: Sequence[int | str | None], dtype: int = TensorProto.FLOAT) -> Value:
    """Return the description of a graph input or output."""
    return helper.make_tensor_value_info(name, dtype, axes)


def constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    """Return a Constant node that holds ``array``."""
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, f"{name}_value"))


def model(nodes: Sequence[onnx.NodeProto], inputs: Sequence[Value], outputs: Sequence[Value], opset: int = 17,
          stored: Sequence[onnx.TensorProto] = (), domains: Sequence[str] = ()) -> onnx.ModelProto:  # fmt: skip
    """Return a model whose nodes have no names."""
    graph = helper.make_graph(nodes, "foreign", inputs, outputs, stored)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10 if opset > 20 else 7)


def classifier(opset: int = 17, half: bool = False) -> onnx.ModelProto:
    """Return a graph from `x` [n, 3, 8, 8] to `scores` [n, 5] whose weights are all in Constant nodes.

    It has a convolution, batch normalization, ReLU and a matrix product. The weights of the product pass through a
    `Transpose`, as in a framework that stores them in the other order.
    """
    random = np.random.default_rng(0)
    kind, dtype = (np.float16, TensorProto.FLOAT16) if half else (np.float32, TensorProto.FLOAT)

    def draw(*shape: int, low: float = -0.5) -> np.ndarray:
        return random.uniform(low, 0.5, shape).astype(kind)

    stored = {
        "kernel": draw(CHANNELS, 3, 3, 3),
        "scale": draw(CHANNELS) + kind(1),
        "shift": draw(CHANNELS),
        "mean": draw(CHANNELS),
        "variance": draw(CHANNELS, low=0.1),
        "shape": np.array([-1, CHANNELS * 64], np.int64),
        "head": draw(CLASSES, CHANNELS * 64),
    }
    nodes = [
        *(constant(name, array) for name, array in stored.items()),
        helper.make_node("Conv", ["x", "kernel"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["features", "scale", "shift", "mean", "variance"], ["normal"]),
        helper.make_node("Relu", ["normal"], ["positive"]),
        helper.make_node("Reshape", ["positive", "shape"], ["flat"]),
        helper.make_node("Transpose", ["head"], ["columns"], perm=[1, 0]),
        helper.make_node("MatMul", ["flat", "columns"], ["scores"]),
    ]
    return model(nodes, [value("x", ["n", 3, SIDE, SIDE], dtype)], [value("scores", ["n", CLASSES], dtype)], opset)


def scores(graph: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Return the expected output of `classifier` in float32, computed by torch."""
    nodes = (node for node in graph.graph.node if node.op_type == "Constant")
    stored = {node.output[0]: torch.from_numpy(numpy_helper.to_array(node.attribute[0].t).copy()) for node in nodes}
    kernel, scale, shift, mean, variance, head = (
        stored[name].float() for name in ("kernel", "scale", "shift", "mean", "variance", "head")
    )
    features = functional.conv2d(torch.from_numpy(images).float(), kernel, padding=1)
    positive = functional.batch_norm(features, mean, variance, scale, shift).relu()
    return np.asarray(positive.flatten(1) @ head.T)


def branching(opset: int = 17) -> onnx.ModelProto:
    """Return a graph from `signal` and `rate` to `energy`: an If whose branches multiply by different matrices."""
    random = np.random.default_rng(1)
    branches = {
        f"{name}_branch": helper.make_graph(
            [
                constant(f"{name}_weight", random.normal(size=(64, 32)).astype(np.float32)),
                helper.make_node("MatMul", ["signal", f"{name}_weight"], [f"{name}_energy"]),
            ],
            name,
            [],
            [value(f"{name}_energy", [1, 32])],
        )
        for name in ("then", "else")
    }
    nodes = [
        constant("fast", np.array(16_000, np.int64)),
        helper.make_node("Equal", ["rate", "fast"], ["is_fast"]),
        helper.make_node("If", ["is_fast"], ["energy"], **branches),
    ]
    return model(
        nodes, [value("signal", [1, 64]), value("rate", [], TensorProto.INT64)], [value("energy", [1, 32])], opset
    )


def embedding() -> onnx.ModelProto:
    """Return a graph from `ids` and `attention_mask` [n, length] to `vectors` [n, length, 64].

    It has a lookup, a matrix product and GELU, which is an operator of ONNX Runtime's own domain.
    """
    random = np.random.default_rng(2)
    stored = [
        numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name)
        for name, shape in (("table", (40, 64)), ("square", (64, 64)))
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "square"], ["product"]),
        helper.make_node("Gelu", ["product"], ["bent"], domain="com.microsoft"),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        constant("last", np.array([-1], np.int64)),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["bent", "column"], ["vectors"]),
    ]
    inputs = [value(name, ["n", "length"], TensorProto.INT64) for name in ("ids", "attention_mask")]
    outputs = [value("vectors", ["n", "length", 64])]
    return model(nodes, inputs, outputs, stored=stored, domains=["com.microsoft"])


def write(graph: onnx.ModelProto, folder: Path, name: str = "theirs.onnx") -> Path:
    """Write the graph as ``folder/name`` and return the path."""
    onnx.save_model(graph, folder / name)
    return folder / name
