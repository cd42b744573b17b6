"""Exported graphs against torch on padded batches of many shapes; their bytes repeat and name no path."""

from __future__ import annotations

import re
from collections import Counter
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from exports import ExportedGraph, batch, export, exported, run
from onnx import numpy_helper

import compress
from compress.formats.onnx.export import verify_parity
from compress.models.model import TorchModel
from compress.tasks.task import Examples
from compress.utils.errors import IntegrityError, ModelError

QUICK = [("bert", True), ("bert", False), ("distilbert", True), ("roberta", True)]
SLOW = [("electra", True), ("electra", False), ("distilbert", False), ("roberta", False)]


@pytest.fixture(
    params=[*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda case: f"{case[0]}-{'fused' if case[1] else 'plain'}",
)
def made(request: pytest.FixtureRequest) -> ExportedGraph:
    architecture, fusions = request.param
    return exported(architecture, fusions)


def test_the_graph_computes_what_torch_computes_at_every_shape(made: ExportedGraph):
    pad = made.model.processor.pad_token_id
    for size, length in [(1, 2), (1, 7), (2, 2), (2, 24), (3, 5), (4, 11), (5, 3), (5, 38)]:
        inputs = batch(size, length, made.model.module.config.vocab_size, pad)
        with torch.no_grad():
            expected = made.model.module(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits
        np.testing.assert_allclose(run(made.content, **inputs), expected.numpy(), atol=2e-5, err_msg=f"{size, length}")
    assert expected.std(dim=0).min() > 0.01


def test_padding_changes_nothing(made: ExportedGraph):
    pad, size = made.model.processor.pad_token_id, made.model.module.config.vocab_size
    alone = batch(1, 6, size, pad)
    wide = {"input_ids": np.full((2, 20), pad), "attention_mask": np.zeros((2, 20), np.int64)}
    for name in wide:
        wide[name][0, :6] = alone[name][0]
    wide["input_ids"][1], wide["attention_mask"][1] = 9, 1
    np.testing.assert_allclose(run(made.content, **wide)[0], run(made.content, **alone)[0], atol=2e-5)


def test_inputs_and_outputs_have_the_names_that_clients_expect(made: ExportedGraph):
    graph = made.graph().graph
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    shape = ["batch_size", "sequence_length"]
    assert axes == {"input_ids": shape, "attention_mask": shape, "logits": ["batch_size", 2]}
    onnx.checker.check_model(made.graph())


def test_no_recorded_shape_contradicts_another(made: ExportedGraph):
    graph = made.graph()
    inferred = onnx.shape_inference.infer_shapes(graph)
    inferred_names, recorded = ({value.name for value in model.graph.value_info} for model in (inferred, graph))
    assert recorded and inferred_names >= recorded


def test_the_graph_holds_no_path_or_stack_trace(made: ExportedGraph):
    homes = [Path(compress.__file__).parents[1], Path(torch.__file__).parents[1], Path(tiny.__file__).parent]
    telling = [
        rb"site-packages",
        rb"Traceback",
        rb'File "',
        rb"\w\.py\b",
        *(re.escape(str(home).encode()) for home in homes),
    ]
    assert [pattern for pattern in telling if re.search(pattern, made.content)] == []
    proto = made.graph()
    assert proto.producer_name == "compress" and not proto.producer_version and not proto.doc_string
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)


def test_the_same_weights_give_the_same_bytes():
    first = exported("bert")
    model = tiny.encoder("bert")
    again = export(model, tiny.context().encode("train", model))
    assert sha256(again.content).hexdigest() == sha256(first.content).hexdigest()


def test_without_fusions_only_standard_operators_are_used():
    assert {node.domain for node in exported("bert", False).graph().graph.node} == {""}
    assert exported("bert", False).rewrites == {}


def test_matrices_are_stored_once():
    encoder = exported("bert")
    arrays = [numpy_helper.to_array(tensor) for tensor in encoder.graph().graph.initializer]
    stored = sum(array.size for array in arrays if array.ndim == 2 and array.dtype == np.float32)
    # Folding leaves out the table of two token types.
    matrices = [parameter for parameter in encoder.model.module.parameters() if parameter.ndim == 2]
    assert stored == sum(matrix.numel() for matrix in matrices) - 2 * tiny.WIDTH


def test_parity_says_how_far_apart_the_logits_are():
    encoder = exported("bert")
    graph = encoder.graph()
    bias = next(tensor for tensor in graph.graph.initializer if tensor.name.endswith("classifier.bias"))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.25), bias.name))
    assert verify_parity(graph, encoder.model, encoder.examples, 0.3) == pytest.approx(0.25, abs=1e-4)
    assert verify_parity(encoder.graph(), encoder.model, encoder.examples, 1e-3) < 2e-5


def tampered(made: ExportedGraph, name: str, change: float) -> onnx.ModelProto:
    graph = made.graph()
    tensor = next(tensor for tensor in graph.graph.initializer if name in tensor.name and len(tensor.dims) == 2)
    array = numpy_helper.to_array(tensor).copy()
    array[:, 0] += np.float32(change)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return graph


@pytest.mark.parametrize("name", ["word_embeddings", "classifier"])
@pytest.mark.parametrize("change", [0.5, float("nan"), float("inf")])
def test_a_tampered_weight_breaks_parity(name: str, change: float):
    encoder = exported("bert")
    with pytest.raises(IntegrityError, match="logits differ from torch by") as caught:
        verify_parity(tampered(encoder, name, change), encoder.model, encoder.examples, 1e-3)
    assert caught.value.exit_code == 3 and "0.001" in str(caught.value.expected) and "fusions" in str(caught.value.hint)


def test_parity_looks_at_padded_rows():
    # A graph that ignores its mask is right for examples of one length, and for the longest; only padding shows it.
    encoder = exported("bert", False)
    graph = encoder.graph()
    ones = onnx.helper.make_node("Sign", ["ids_plus_one"], ["mask_of_ones"])
    constant = numpy_helper.from_array(np.array(1, np.int64), "one")
    plus = onnx.helper.make_node("Add", ["input_ids", "one"], ["ids_plus_one"])
    for node in graph.graph.node:
        for index, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[index] = "mask_of_ones"
    graph.graph.initializer.append(constant)
    graph.graph.node.insert(0, ones)
    graph.graph.node.insert(0, plus)
    lengths = encoder.examples.lengths()
    longest = [encoder.examples.inputs[i] for i in np.flatnonzero(lengths == lengths.max())]
    same_length = Examples(longest * 4, encoder.examples.padding)
    assert verify_parity(graph, encoder.model, same_length, 1e-3) < 2e-5
    with pytest.raises(IntegrityError):
        verify_parity(graph, encoder.model, encoder.examples, 1e-3)


def test_parity_of_a_single_example():
    encoder = exported("bert")
    assert (
        verify_parity(
            encoder.graph(), encoder.model, Examples(encoder.examples.inputs[:1], encoder.examples.padding), 1e-3
        )
        < 2e-5
    )


@pytest.mark.slow
def test_another_operator_set_can_be_asked_for():
    from compress.formats.onnx.export import export_onnx

    encoder = exported("bert")
    graph = export_onnx(encoder.model, encoder.examples, 20, fusions=False).graph
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == 20
    assert verify_parity(graph, encoder.model, encoder.examples, 1e-3) < 2e-5


@pytest.mark.slow
def test_a_single_row_can_be_traced():
    # Two equal rows are traced then; neither axis may freeze.
    model = tiny.encoder("bert", num_hidden_layers=1)
    examples = tiny.context().encode("train", model)
    graph = export(model, Examples(examples.inputs[:1], examples.padding), fusions=False)
    assert verify_parity(graph.graph(), model, examples, 1e-3) < 2e-5
    assert Counter(node.op_type for node in graph.graph().graph.node)["Softmax"] == 1


def test_a_model_that_counts_its_tokens_in_python_is_refused(monkeypatch: pytest.MonkeyPatch):
    from compress.formats.onnx.export import export_onnx

    model = tiny.encoder("bert", num_hidden_layers=1)
    forward = model.module.forward

    def counting(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        outputs = forward(input_ids=input_ids, attention_mask=attention_mask)
        outputs.logits = outputs.logits + sum(range(input_ids.shape[1]))
        return outputs

    monkeypatch.setattr(model.module, "forward", counting)
    with pytest.raises(ModelError, match="only works for one input length") as caught:
        export_onnx(model, tiny.context().encode("train", model), None, fusions=False)
    assert "BertForSequenceClassification" in str(caught.value) and "Constraints violated" not in str(caught.value)


@pytest.mark.parametrize(("said", "longest"), [(-1, 512), (None, 512), (40, 40)])
def test_the_longest_text_is_what_the_config_says_where_it_says_one(said: int | None, longest: int):
    from compress.formats.onnx.export import _free

    config = SimpleNamespace(to_dict=lambda: {"max_position_embeddings": said})
    module: Any = SimpleNamespace(config=config)
    free = _free(TorchModel(module, None), exported("bert").examples, 2)
    assert free["input_ids"][1].max == longest and free["input_ids"][1].min == 2
