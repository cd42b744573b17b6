"""A short way to build ONNX graphs, and classifiers of chosen cost and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compress.tasks.task import Examples

VOCABULARY = 100


def onnx_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    weights: Mapping[str, Any] | None = None,
    opset: int = 20,
    domains: Sequence[str] = (),
    ir_version: int = 10,
) -> onnx.ModelProto:
    """Return a model from nodes, inputs and outputs by name, and stored arrays.

    An input or output is a list of axes or `None`, for float32, or a pair of another type and such a list.
    """
    ends = [
        [
            helper.make_tensor_value_info(name, *(entry if isinstance(entry, tuple) else (TensorProto.FLOAT, entry)))
            for name, entry in entries.items()
        ]
        for entries in (inputs, outputs)
    ]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    graph = helper.make_graph(nodes, "graph", *ends, stored)
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def write_classifier(folder: Path, width: int, layers: int, extra_rows: int = 0) -> Path:
    """Write a classifier from input_ids [n, length] to logits [n, 2] as ``folder/onnx/model.onnx``.

    It has an embedding, ``layers`` square matrix products and the mean over tokens. ``extra_rows`` enlarges the
    embedding, and so the file, without more computation.
    """
    generator = np.random.default_rng(0)
    table = np.zeros((VOCABULARY + extra_rows, width), np.float32)
    table[:VOCABULARY] = generator.normal(size=(VOCABULARY, width))
    square = (generator.normal(size=(width, width)) / np.sqrt(width)).astype(np.float32)
    head = generator.normal(size=(width, 2)).astype(np.float32)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["hidden_0"])]
    for i in range(layers):
        nodes.append(helper.make_node("MatMul", [f"hidden_{i}", "square"], [f"product_{i}"]))
        nodes.append(helper.make_node("Tanh", [f"product_{i}"], [f"hidden_{i + 1}"]))
    nodes.append(helper.make_node("ReduceMean", [f"hidden_{layers}"], ["mean"], axes=[1], keepdims=0))
    nodes.append(helper.make_node("MatMul", ["mean", "head"], ["logits"]))
    ids = {"input_ids": (TensorProto.INT64, ["batch", "length"])}
    stored = {"table": table, "square": square, "head": head}
    model = onnx_model(nodes, ids, {"logits": ["batch", 2]}, stored, opset=17, ir_version=8)
    (folder / "onnx").mkdir(parents=True)
    onnx.save(model, folder / "onnx" / "model.onnx")
    return folder


def make_examples(count: int, seed: int = 0) -> Examples:
    """Return examples of 4 to 40 tokens with an attention mask, which is no input of the graphs."""
    generator = np.random.default_rng(seed)
    inputs = [
        {"input_ids": generator.integers(1, VOCABULARY, length), "attention_mask": np.ones(length, np.int64)}
        for length in generator.integers(4, 41, count)
    ]
    return Examples(inputs=inputs, padding={"input_ids": 0, "attention_mask": 0})
