"""The floor of a sentence encoder is held on what it finds, with texts and pairs in their places."""

from __future__ import annotations

import numpy as np
import onnx
import sentences
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.stages.onnx_int8.accuracy_aware import merit_of
from compress.stages.onnx_int8.quantizer import calibration_set
from compress.tasks.registry import get_task

TASK = get_task(sentences.TASK)


def lookup(table: np.ndarray) -> onnx.ModelProto:
    """A graph whose token embeddings are the rows of ``table``."""
    axes = ["batch_size", "sequence_length"]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, axes)
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*axes, table.shape[1]])
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])]
    graph = helper.make_graph(nodes, "g", [ids], [output], [numpy_helper.from_array(table, "table")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def test_merit_is_the_recall_of_the_examples_in_their_order() -> None:
    model = sentences.encoder()
    table = np.random.default_rng(0).normal(size=(len(model.tokenizer), sentences.WIDTH)).astype(np.float32)
    # Pairs that have little to do with their texts, so that few of them are found.
    rows = sentences.pairs(60).set_column(1, "pair", sentences.pairs(60, seed=5)["pair"])
    examples = TASK.encode(rows, model.processor, None, 24)
    assert len(set(examples.lengths().tolist())) > 3
    embeddings = np.stack([table[one["input_ids"]].mean(axis=0) for one in examples.inputs])
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = embeddings[:60] @ embeddings[60:].T
    expected = np.mean((scores >= scores.diagonal()[:, None]).sum(axis=1) <= 10)
    assert 0.05 < expected < 0.8
    assert merit_of(TASK, examples)(lookup(table)) == expected


def test_pairs_are_no_classes_to_choose_calibration_examples_by() -> None:
    model, context = sentences.encoder(), sentences.context()
    graph = lookup(np.ones((len(model.tokenizer), sentences.WIDTH), np.float32))
    chosen = calibration_set(OnnxModel(graph, FLOAT_GRAPH, model.companions()), context, 12)
    assert (len(chosen.feeds), chosen.labels) == (12, 0)
