"""Graphs of embedding models: pooling of sentence embeddings as last nodes, and CLIP's encoders as separate graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import helper, numpy_helper
from onnx.utils import Extractor

from compress.models.sentence_modules import Dense, SentenceModules
from compress.tasks.task import LAST_HIDDEN_STATE, SENTENCE_EMBEDDING
from compress.utils.errors import StageError

_MASK = "attention_mask"
_SHORTEST = 1e-12
"""Smallest norm to divide by, as in torch's `normalize`."""
_POOLED = ("mean", "cls")

TOWERS = {"text_model": ("input_ids", "text_embeds"), "vision_model": ("pixel_values", "image_embeds")}
"""Encoder by the file name that transformers.js and optimum use: the input that it reads, and its output."""


class _Tail:
    """Writer for nodes and constants with unique names at the end of a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self._names: Iterator[str] = (f"sentence_embedding_{number}" for number in range(1 << 16))

    def node(self, operator: str, *inputs: str, **attributes: object) -> str:
        """Append a node and return the name of its output."""
        name = next(self._names)
        self.graph.node.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: ArrayLike, kind: type[np.generic] = np.float32) -> str:
        """Store an array and return its name."""
        name = next(self._names)
        array = np.array(value, dtype=kind, order="C")
        self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name


def add_sentence_embedding(model: onnx.ModelProto, modules: SentenceModules) -> None:
    """Add the output `sentence_embedding` [batch, dimensions] beside `last_hidden_state`, in place.

    Raises `StageError` for a pooling that is not supported; the consumer then has to pool.
    """
    if len(modules.modes) != 1 or modules.modes[0] not in _POOLED:
        raise StageError(
            f"Pooling by {', '.join(modules.modes)} is not supported in the graph.",
            expected=f"one of {', '.join(_POOLED)}",
            hint="leave sentence_embedding: false; sentence-transformers pools what the graph gives",
        )
    tail = _Tail(model.graph)
    if modules.modes == ("mean",):
        # The sum over the tokens that the mask selects is the product of the mask, as a row, and the hidden states.
        mask = tail.node("Cast", _MASK, to=onnx.TensorProto.FLOAT)
        row = tail.node("Unsqueeze", mask, tail.constant([1], np.int64))
        total = tail.node("Squeeze", tail.node("MatMul", row, LAST_HIDDEN_STATE), tail.constant([1], np.int64))
        count = tail.node("ReduceSum", mask, tail.constant([1], np.int64), keepdims=1)
        value = tail.node("Div", total, tail.node("Max", count, tail.constant(1)))
    else:
        # The first token, for texts that are padded at the end.
        value = tail.node("Gather", LAST_HIDDEN_STATE, tail.constant(0, np.int64), axis=1)
    for step in modules.steps:
        if isinstance(step, Dense):
            value = tail.node("MatMul", value, tail.constant(step.weight.T))
            value = value if step.bias is None else tail.node("Add", value, tail.constant(step.bias))
            value = tail.node("Tanh", value) if step.activation else value
        else:
            squares = tail.node("ReduceSum", tail.node("Mul", value, value), tail.constant([1], np.int64), keepdims=1)
            # The Euclidean norm is bounded below as in torch, so that zero vectors stay zero.
            length = tail.node("Max", tail.node("Sqrt", squares), tail.constant(_SHORTEST))
            value = tail.node("Div", value, length)
    # The last node's output becomes the graph's second output.
    model.graph.node[-1].output[0] = SENTENCE_EMBEDDING
    shape = [model.graph.output[0].type.tensor_type.shape.dim[0].dim_param or None, modules.dimensions]
    model.graph.output.append(helper.make_tensor_value_info(SENTENCE_EMBEDDING, onnx.TensorProto.FLOAT, shape))


def split_towers(graph: onnx.ModelProto) -> Mapping[str, onnx.ModelProto]:
    """Return the graphs `text_model` and `vision_model`, float or quantized as ``graph`` is.

    Raises:
        StageError: The graph has other inputs or outputs.
    """
    inputs, outputs = ({value.name for value in values} for values in (graph.graph.input, graph.graph.output))
    if any(input_name not in inputs or output_name not in outputs for input_name, output_name in TOWERS.values()):
        raise StageError(
            f"The graph has the inputs {', '.join(sorted(inputs))} and the outputs {', '.join(sorted(outputs))}.",
            expected="input_ids, pixel_values, text_embeds and image_embeds",
        )
    encoders = {}
    for name, (input_name, output_name) in TOWERS.items():
        read = [input_name, _MASK] if input_name == "input_ids" and _MASK in inputs else [input_name]
        encoders[name] = Extractor(graph).extract_model(read, [output_name])
    return encoders
