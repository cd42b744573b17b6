"""The graph of Whisper's decoder: the prompt and every later token in one graph, as optimum's merged decoders are.

Inputs `input_ids` [batch, length], `encoder_hidden_states` [batch, positions, hidden], `past_key_values.N.decoder.key`,
`.decoder.value`, `.encoder.key`, `.encoder.value` [batch, heads, past, size] and `use_cache_branch` [1]; outputs
`logits` [batch, length, vocabulary] and `present.` for each `past_key_values.`.

With `use_cache_branch` false the past is empty, and keys and values of the audio are made of `encoder_hidden_states`.
With true those of the past are used as they are, and the outputs in their place are empty: a client keeps those it has,
which spares it a copy of megabytes for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir

from compress.checkpoints.checkpoint import Checkpoint
from compress.formats.onnx.decoder.nodes import Nodes
from compress.formats.onnx.decoder.weights import Weights
from compress.formats.onnx.speech.architecture import WhisperArchitecture
from compress.formats.onnx.speech.layers import Layers

_SCOPE = "model.decoder"
_TABLE = f"{_SCOPE}.embed_tokens"
_PARTS = ("key", "value")


def write_decoder(checkpoint: Checkpoint, of: WhisperArchitecture, accuracy_level: int) -> onnx.ModelProto:
    """The decoder of a checkpoint. Raises `ModelError` for a weight that is missing."""
    return ir.to_proto(_Decoder(checkpoint, of, accuracy_level).write())


class _Decoder:
    def __init__(self, checkpoint: Checkpoint, of: WhisperArchitecture, accuracy_level: int) -> None:
        self._of = of
        self._nodes = Nodes()
        self._layers = Layers(self._nodes, Weights(checkpoint, self._nodes, accuracy_level), of.decoder.heads)

    def write(self) -> ir.Model:
        nodes, of, layers = self._nodes, self._of, self._layers
        ids = nodes.input("input_ids", ir.DataType.INT64, ["batch_size", "decoder_sequence_length"])
        audio = nodes.input(
            "encoder_hidden_states", ir.DataType.FLOAT, ["batch_size", "encoder_sequence_length", of.hidden]
        )
        pasts = [self._past(layer) for layer in range(of.decoder.layers)]
        cached = nodes.input("use_cache_branch", ir.DataType.BOOL, [1])
        stream = nodes.op("Add", f"{_SCOPE}.embed_positions", [self._embedded(ids), self._places(ids, pasts[0][0])])
        presents: list[ir.Value] = []
        for layer, past in enumerate(pasts):
            scope = f"{_SCOPE}.layers.{layer}"
            stream, own = self._self_attention(scope, stream, past[:2])
            stream, audio_cache = self._cross_attention(scope, stream, audio, past[2:], cached)
            stream = layers.feed_forward(scope, stream)
            presents += [*own, *audio_cache]
        logits = layers.weights.head(_TABLE, layers.norm(f"{_SCOPE}.layer_norm", stream), _TABLE)
        shape: list[int | str] = ["batch_size", "decoder_sequence_length", of.vocabulary]
        nodes.output(logits, "logits", ir.DataType.FLOAT, shape)
        for index, present in enumerate(presents):
            layer, part = divmod(index, 4)
            side, kind = ("decoder", "encoder")[part // 2], _PARTS[part % 2]
            axes: list[int | str] = ["batch_size", of.decoder.heads, f"present_{side}_sequence_length", of.head_size]
            nodes.output(present, f"present.{layer}.{side}.{kind}", ir.DataType.FLOAT, axes)
        return nodes.model("WhisperDecoder")

    def _past(self, layer: int) -> Sequence[ir.Value]:
        """Keys and values of the tokens so far, then those of the audio."""
        heads, size = self._of.decoder.heads, self._of.head_size
        return [
            self._nodes.input(
                f"past_key_values.{layer}.{side}.{kind}",
                ir.DataType.FLOAT,
                ["batch_size", heads, f"past_{side}_sequence_length", size],
            )
            for side in ("decoder", "encoder")
            for kind in _PARTS
        ]

    def _embedded(self, ids: ir.Value) -> ir.Value:
        return self._layers.weights.look_up(_TABLE, ids)

    def _places(self, ids: ir.Value, past: ir.Value) -> ir.Value:
        """The learned positions that follow those of the past, [length, hidden]."""
        nodes, scope = self._nodes, f"{_SCOPE}.embed_positions"
        start = nodes.op("Shape", f"{scope}.past", [past], start=2, end=3)
        length = nodes.op("Shape", f"{scope}.length", [ids], start=1, end=2)
        end = nodes.op("Add", f"{scope}.end", [start, length])
        table = self._layers.weights.vector(f"{scope}.weight")
        return nodes.op("Slice", scope, [table, start, end, nodes.integers(0)])

    def _self_attention(
        self, scope: str, stream: ir.Value, past: Sequence[ir.Value]
    ) -> tuple[ir.Value, Sequence[ir.Value]]:
        layers, own = self._layers, f"{scope}.self_attn"
        normed = layers.norm(f"{scope}.self_attn_layer_norm", stream)
        projected = [layers.project(own, f"{kind}_proj", normed) for kind in "qkv"]
        attended, *present = layers.attend(own, *projected, None, None, None, *past, outputs=3, causal=True)
        return layers.add(own, stream, layers.project(own, "out_proj", attended)), present

    def _cross_attention(
        self, scope: str, stream: ir.Value, audio: ir.Value, past: Sequence[ir.Value], cached: ir.Value
    ) -> tuple[ir.Value, Sequence[ir.Value]]:
        nodes, layers, other = self._nodes, self._layers, f"{scope}.encoder_attn"
        query = layers.project(other, "q_proj", layers.norm(f"{scope}.encoder_attn_layer_norm", stream))
        attended, *present = nodes.several(
            "If",
            other,
            [cached],
            3,
            then_branch=nodes.branch(f"{other}.cached", partial(self._look_back, other, query, past)),
            else_branch=nodes.branch(f"{other}.first", partial(self._look, other, query, audio)),
        )
        return layers.add(other, stream, layers.project(other, "out_proj", attended)), present

    def _look_back(self, scope: str, query: ir.Value, past: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """Attention over the audio by the keys and values that are there; nothing in place of new ones."""
        of = self._of
        (attended,) = self._layers.attend(f"{scope}.cached", query, *past)
        nothing = ir.Tensor(np.zeros((0, of.decoder.heads, 1, of.head_size), np.float32))
        empty = [self._nodes.op("Constant", f"{scope}.no_{kind}", [], value=nothing) for kind in _PARTS]
        return [attended, *empty]

    def _look(self, scope: str, query: ir.Value, audio: ir.Value) -> Sequence[ir.Value]:
        """Attention over the audio, with keys and values [batch, heads, positions, size] made of it."""
        heads = [
            self._heads(f"{scope}.{kind}_proj", self._layers.project(scope, f"{kind}_proj", audio)) for kind in "kv"
        ]
        return [*self._layers.attend(f"{scope}.first", query, *heads), *heads]

    def _heads(self, module: str, value: ir.Value) -> ir.Value:
        nodes, of = self._nodes, self._of
        apart = nodes.op("Reshape", f"{module}.apart", [value, nodes.integers(0, 0, of.decoder.heads, of.head_size)])
        return nodes.op("Transpose", f"{module}.heads", [apart], perm=[0, 2, 1, 3])
