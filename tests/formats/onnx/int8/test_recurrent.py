"""LSTMs in integers: stored weights, weights that are put together of constants, and none that would grow."""

from __future__ import annotations

import foreign_graphs
import numpy as np
import pytest
import torch
from onnx import helper
from recurrent_graph import WIDTH, recurrent

from compress.formats.onnx.int8.dynamic import quantize_recurrent
from compress.formats.onnx.int8.observers import open_session


@pytest.mark.parametrize("in_pieces", [True, False])
@pytest.mark.full_range
def test_an_lstm_answers_in_integers_as_torch_does_and_takes_less(in_pieces: bool) -> None:
    graph, module = recurrent(in_pieces)
    quantized, count = quantize_recurrent(graph, per_channel=True, reduce_range=False)
    assert count == 1 and quantized.ByteSize() < 0.45 * graph.ByteSize()
    sound = np.random.default_rng(0).normal(size=(12, 1, WIDTH)).astype(np.float32)
    (actual,) = open_session(quantized).run(None, {"x": sound})
    expected = np.asarray(module(torch.from_numpy(sound))[0].detach())[:, None]
    error = np.sqrt(np.square(actual - expected).mean()) / expected.std()
    assert 0 < error < 0.02


def test_a_graph_without_an_lstm_is_left_as_it_is() -> None:
    graph = foreign_graphs.embedding()
    assert quantize_recurrent(graph, per_channel=True, reduce_range=False) == (graph, 0)


@pytest.mark.full_range
def test_operators_of_a_set_that_the_graph_does_not_name() -> None:
    graph, _ = recurrent(in_pieces=False)
    graph.graph.node.append(helper.make_node("Gelu", ["y"], ["z"], domain="com.microsoft"))
    graph.graph.output[0].name = "z"
    assert all(entry.domain != "com.microsoft" for entry in graph.opset_import)
    quantized, count = quantize_recurrent(graph, per_channel=True, reduce_range=False)
    sound = np.random.default_rng(0).normal(size=(12, 1, WIDTH)).astype(np.float32)
    (expected,), (actual,) = (open_session(opened).run(None, {"x": sound}) for opened in (graph, quantized))
    assert count == 1 and np.sqrt(np.square(actual - expected).mean()) < 0.02 * expected.std()
