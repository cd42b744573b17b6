"""ONNX graphs of chosen cost and size, for the tests of the benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compress.tasks.task import Examples

VOCABULARY = 100


def write_classifier(folder: Path, width: int, layers: int, extra_rows: int = 0) -> Path:
    """input_ids [n, length] -> logits [n, 2]: an embedding, ``layers`` square products, the mean over tokens.

    ``extra_rows`` makes the embedding, and so the file, larger without more work.
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
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [
            numpy_helper.from_array(array, name)
            for array, name in ((table, "table"), (square, "square"), (head, "head"))
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "onnx").mkdir(parents=True)
    onnx.save(model, folder / "onnx" / "model.onnx")
    return folder


def make_examples(count: int, seed: int = 0) -> Examples:
    """Examples of 4 to 40 tokens, with an attention mask that the graphs don't have."""
    generator = np.random.default_rng(seed)
    inputs = [
        {"input_ids": generator.integers(1, VOCABULARY, length), "attention_mask": np.ones(length, np.int64)}
        for length in generator.integers(4, 41, count)
    ]
    return Examples(inputs=inputs, padding={"input_ids": 0, "attention_mask": 0})
