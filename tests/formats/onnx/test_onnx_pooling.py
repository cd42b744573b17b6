import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from compress.formats.onnx.pooling import add_sentence_embedding
from compress.models.sentence_modules import Dense, Normalize, SentenceModules
from compress.utils.errors import StageError

HIDDEN = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], np.int64)
WEIGHT = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)


def identity() -> onnx.ModelProto:
    """A graph that gives its hidden states as they come."""
    axes = ["batch_size", "sequence_length"]
    hidden = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [*axes, 4])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, axes)
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*axes, 4])
    nodes = [helper.make_node("Identity", ["hidden"], ["last_hidden_state"])]
    return helper.make_model(
        helper.make_graph(nodes, "g", [hidden, mask], [output]), opset_imports=[helper.make_opsetid("", 17)]
    )


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize(
    "steps",
    [
        (),
        (Normalize(),),
        (Dense(WEIGHT), Normalize()),
        (Dense(WEIGHT, np.array([0.5, -3], np.float32), "tanh"),),
    ],
)
def test_the_graph_gives_what_the_modules_give(mode: str, steps: tuple) -> None:
    modules = SentenceModules(4, (mode,), steps)
    graph = identity()
    add_sentence_embedding(graph, modules)
    onnx.checker.check_model(graph)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    assert session.get_outputs()[1].shape == ["batch_size", modules.dimensions]
    hidden, embedding = session.run(None, {"hidden": HIDDEN, "attention_mask": MASK})
    assert np.array_equal(hidden, HIDDEN)
    expected = modules.embed(torch.from_numpy(HIDDEN), torch.from_numpy(MASK)).numpy()
    np.testing.assert_allclose(embedding, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("modes", [("lasttoken",), ("cls", "mean")])
def test_other_pooling_is_left_to_the_consumer(modes: tuple[str, ...]) -> None:
    with pytest.raises(StageError, match=", ".join(modes)) as caught:
        add_sentence_embedding(identity(), SentenceModules(4, modes))
    assert "sentence_embedding: false" in str(caught.value)
