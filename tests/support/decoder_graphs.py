"""Small decoders as hand-written ONNX graphs, with a numpy reference implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT


@dataclass(frozen=True)
class TinyDecoder:
    """A decoder of token and position embeddings, layers of causal attention with residuals, and an output head."""

    width: int = 16
    layers: int = 2
    heads: int = 2
    vocabulary: int = 50
    positions: int = 64
    seed: int = 0

    @property
    def head_size(self) -> int:
        """Return the width of one attention head."""
        return self.width // self.heads

    def weights(self) -> dict[str, np.ndarray]:
        """Return all parameters by name, in fp32."""
        generator = np.random.default_rng(self.seed)
        shapes = {"tokens": (self.vocabulary, self.width), "places": (self.positions, self.width)}
        for layer in range(self.layers):
            shapes |= {f"{kind}_{layer}": (self.width, self.width) for kind in ("query", "key", "value", "out")}
        shapes["head"] = (self.width, self.vocabulary)
        return {
            name: (generator.normal(size=shape) * (1 if name in ("tokens", "places") else shape[0] ** -0.5)).astype(
                np.float32
            )
            for name, shape in shapes.items()
        }

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return fp64 logits [length, vocabulary] of a sequence, computed by numpy without a cache."""
        weights = {name: array.astype(np.float64) for name, array in self.weights().items()}
        hidden = weights["tokens"][list(ids)] + weights["places"][: len(ids)]
        future = np.triu(np.ones((len(ids), len(ids)), bool), 1)
        for layer in range(self.layers):
            query, key, value = (
                (hidden @ weights[f"{kind}_{layer}"]).reshape(len(ids), self.heads, -1)
                for kind in ("query", "key", "value")
            )
            scores = np.einsum("qhs,khs->hqk", query, key) / np.sqrt(self.head_size)
            scores = np.where(future, -np.inf, scores)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            shares /= shares.sum(-1, keepdims=True)
            mixed = np.einsum("hqk,khs->qhs", shares, value).reshape(len(ids), -1)
            hidden = hidden + mixed @ weights[f"out_{layer}"]
        return np.asarray(hidden @ weights["head"])

    def continuation(self, ids: Sequence[int], count: int) -> list[int]:
        """Return the next ``count`` tokens under greedy decoding."""
        sequence = list(ids)
        for _ in range(count):
            sequence.append(int(self.logits(sequence)[-1].argmax()))
        return sequence[len(ids) :]

    def model(self, cache: bool = True) -> onnx.ModelProto:
        """Return the ONNX graph; without ``cache`` it has no past key values and no position_ids."""
        constants = {**self.weights(), **self._constants()}
        total = ["batch", "total"] if cache else ["batch", "length"]
        names = ["input_ids", "attention_mask", *(["position_ids"] if cache else [])]
        inputs = [
            helper.make_tensor_value_info(name, INT64, total if name == "attention_mask" else ["batch", "length"])
            for name in names
        ]
        outputs = [helper.make_tensor_value_info("logits", FLOAT, ["batch", "length", self.vocabulary])]
        nodes = self._embedding(cache)
        for layer in range(self.layers):
            nodes += self._attention(layer, cache)
            for kind in ("key", "value") if cache else ():
                past, present = (["batch", self.heads, axis, self.head_size] for axis in ("past", "total"))
                inputs.append(helper.make_tensor_value_info(f"past_key_values.{layer}.{kind}", FLOAT, past))
                outputs.append(helper.make_tensor_value_info(f"present.{layer}.{kind}", FLOAT, present))
        nodes.append(helper.make_node("MatMul", [f"hidden_{self.layers}", "head"], ["logits"]))
        stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        graph = helper.make_graph(nodes, "decoder", inputs, outputs, stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def write(self, folder: Path, cache: bool = True) -> Path:
        """Write the graph as ``folder/onnx/model.onnx`` and return ``folder``."""
        return write(self.model(cache), folder)

    def _constants(self) -> dict[str, np.ndarray]:
        return {
            "split": np.array([0, 0, self.heads, self.head_size]),
            "joined": np.array([0, 0, self.width]),
            "one": np.array(1),
            "zero": np.array(0),
            "scale": np.array(self.head_size**-0.5, np.float32),
            "never": np.array(-1e9, np.float32),
            "column": np.array([1]),
            "mask_axes": np.array([1, 2]),
        }

    def _embedding(self, cache: bool) -> list[onnx.NodeProto]:
        """Return nodes that compute hidden states and the attention mask [batch, 1, length, total]."""
        node = helper.make_node
        return [
            node("Shape", ["input_ids"], ["length_1"], start=1, end=2),
            node("Shape", ["attention_mask"], ["total_1"], start=1, end=2),
            node("Squeeze", ["length_1"], ["length"]),
            node("Squeeze", ["total_1"], ["total"]),
            node("Sub", ["total", "length"], ["past"]),
            node("Range", ["zero", "total", "one"], ["all_places"]),
            node("Range", ["past", "total", "one"], ["own_places"]),
            node("Gather", ["tokens", "input_ids"], ["embedded"]),
            node("Gather", ["places", "position_ids" if cache else "own_places"], ["placed"]),
            node("Add", ["embedded", "placed"], ["hidden_0"]),
            node("Unsqueeze", ["own_places", "column"], ["own_column"]),
            node("LessOrEqual", ["all_places", "own_column"], ["causal"]),
            node("Cast", ["attention_mask"], ["mask_flags"], to=TensorProto.BOOL),
            node("Unsqueeze", ["mask_flags", "mask_axes"], ["mask"]),
            node("And", ["causal", "mask"], ["visible"]),
        ]

    def _attention(self, layer: int, cache: bool) -> list[onnx.NodeProto]:
        node, i = helper.make_node, layer
        nodes = []
        for kind in ("query", "key", "value"):
            new = f"{kind}_new_{i}" if cache and kind != "query" else _state(kind, i, cache)
            nodes += [
                node("MatMul", [f"hidden_{i}", f"{kind}_{i}"], [f"{kind}_flat_{i}"]),
                node("Reshape", [f"{kind}_flat_{i}", "split"], [f"{kind}_split_{i}"]),
                node("Transpose", [f"{kind}_split_{i}"], [new], perm=[0, 2, 1, 3]),
            ]
            if cache and kind != "query":
                nodes.append(node("Concat", [f"past_key_values.{i}.{kind}", new], [_state(kind, i, cache)], axis=2))
        return [
            *nodes,
            node("Transpose", [_state("key", i, cache)], [f"key_turned_{i}"], perm=[0, 1, 3, 2]),
            node("MatMul", [_state("query", i, cache), f"key_turned_{i}"], [f"products_{i}"]),
            node("Mul", [f"products_{i}", "scale"], [f"scores_{i}"]),
            node("Where", ["visible", f"scores_{i}", "never"], [f"seen_{i}"]),
            node("Softmax", [f"seen_{i}"], [f"shares_{i}"], axis=-1),
            node("MatMul", [f"shares_{i}", _state("value", i, cache)], [f"mixed_{i}"]),
            node("Transpose", [f"mixed_{i}"], [f"mixed_turned_{i}"], perm=[0, 2, 1, 3]),
            node("Reshape", [f"mixed_turned_{i}", "joined"], [f"mixed_flat_{i}"]),
            node("MatMul", [f"mixed_flat_{i}", f"out_{i}"], [f"added_{i}"]),
            node("Add", [f"hidden_{i}", f"added_{i}"], [f"hidden_{i + 1}"]),
        ]


def _state(kind: str, layer: int, cache: bool) -> str:
    """Return the tensor name of the queries, or of the keys or values of all positions so far."""
    return f"{kind}_state_{layer}" if kind == "query" or not cache else f"present.{layer}.{kind}"


def write(model: onnx.ModelProto, folder: Path) -> Path:
    """Write a graph as ``folder/onnx/model.onnx`` and return ``folder``."""
    (folder / "onnx").mkdir(parents=True)
    onnx.save(model, folder / "onnx" / "model.onnx")
    return folder
