"""The graph of a decoder: prompt and single tokens in one graph, with the keys and values of earlier tokens.

Inputs `input_ids` and `attention_mask` [batch, length and total length], `past_key_values.N.key` and `.value`
[batch, heads, past, size]; outputs `logits` [batch, length, vocabulary] and `present.N.key` and `.value`, as
transformers.js and onnxruntime-genai expect them. Positions follow from the mask. Rows of a batch may be padded on
the right; padding on the left, which the attention kernel would read as text, fails at the node
`padding_on_the_left_is_refused`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir

from compress.checkpoints.checkpoint import Checkpoint
from compress.errors import ModelError
from compress.formats.onnx.decoder.architecture import DecoderArchitecture
from compress.formats.onnx.decoder.experts import mix_experts
from compress.formats.onnx.decoder.nodes import MICROSOFT, Nodes
from compress.formats.onnx.decoder.weights import Weights
from compress.formats.onnx.model import SHARED_CACHE

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_DENSE, _EXPERT = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
REFUSAL = "padding_on_the_left_is_refused"


@dataclass(frozen=True)
class GraphSettings:
    """``accuracy_level`` of the few-bit products: 4 rounds activations to 8 bits in each block, 1 computes in fp32.

    ``exact_attention``: queries, keys and values in fp32 all the same; they suffer most from rounding.
    ``last_token_only``: logits [batch, 1, vocabulary] of the last position, enough to generate but not to score.
    ``expand_on_load``: few-bit weights become float when the graph is opened (`onnx_decoder.expanded`).
    """

    accuracy_level: int = 4
    exact_attention: bool = False
    last_token_only: bool = False
    expand_on_load: bool = False


def write_graph(checkpoint: Checkpoint, architecture: DecoderArchitecture, settings: GraphSettings) -> onnx.ModelProto:
    """The decoder of a checkpoint as a graph. Raises `ModelError` for weights that are not there or don't fit."""
    if settings.expand_on_load and architecture.experts:
        raise ModelError(
            "Experts cannot be made float when the graph is opened.",
            where="expand_on_load",
            expected="a dense model",
            mend="leave expand_on_load out",
        )
    return ir.to_proto(_Decoder(checkpoint, architecture, settings).write())


class _Decoder:
    def __init__(self, checkpoint: Checkpoint, architecture: DecoderArchitecture, settings: GraphSettings) -> None:
        self._of = architecture
        self._settings = settings
        self._nodes = Nodes()
        exact = ("q_proj", "k_proj", "v_proj") if settings.exact_attention else ()
        self._weights = Weights(checkpoint, self._nodes, settings.accuracy_level, exact, settings.expand_on_load)

    def write(self) -> ir.Model:
        nodes, of = self._nodes, self._of
        ids = nodes.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        mask = nodes.input("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])
        lengths = self._lengths(mask)
        rotary = self._rotary()
        hidden = self._weights.look_up(_EMBEDDING, ids, of.tied)
        added: ir.Value | None = None
        presents: list[ir.Value] = []
        for layer in range(of.layers):
            scope = f"model.layers.{layer}"
            hidden, normed = self._norm(f"{scope}.input_layernorm", hidden, added)
            attended, cache = self._attention(layer, normed, [*lengths, *rotary])
            presents += cache
            hidden, normed = self._norm(f"{scope}.post_attention_layernorm", hidden, attended)
            added = self._mixture(scope, normed) if of.experts else self._feed_forward(f"{scope}.mlp", normed, _DENSE)
        _, normed = self._norm("model.norm", hidden, added)
        self._finish(normed, presents)
        # The attention kernel writes new keys and values behind the old ones where both are one buffer.
        return nodes.model(of.name, {SHARED_CACHE: "1"})

    def _lengths(self, mask: ir.Value) -> Sequence[ir.Value]:
        """For each row the position of its last token, [batch] int32; and the total length, an int32 scalar."""
        nodes, axis = self._nodes, self._nodes.integers(1)
        count = nodes.op("ReduceSum", "lengths", [mask, axis], keepdims=0)
        # The first column of the mask picks from a table of one entry: 0, were it not 1, picks one that is not there.
        first = nodes.op("Gather", "lengths.first", [mask, nodes.constant("constants.zero", np.array(0))], axis=1)
        missing = nodes.op("Sub", "lengths.missing", [nodes.constant("constants.one", np.array(1)), first])
        minus_one = nodes.op("Gather", f"lengths.{REFUSAL}", [nodes.integers(-1), missing], axis=0)
        last = nodes.op("Add", "lengths.last", [count, minus_one])
        shape = nodes.op("Shape", "lengths.total", [mask], start=1, end=2)
        total = nodes.op("Squeeze", "lengths.total", [shape, nodes.integers(0)])
        named = (("lengths.last", last), ("lengths.total", total))
        return [nodes.op("Cast", name, [value], to=ir.DataType.INT32) for name, value in named]

    def _rotary(self) -> Sequence[ir.Value]:
        """Cosines and sines of all positions, [positions, head_size / 2]; computed when the graph is loaded."""
        nodes = self._nodes
        frequencies, factor = self._of.rotary
        bounds = {"start": 0, "stop": self._of.positions, "step": 1}
        ends = [nodes.constant(f"constants.rotary_{name}", np.array(end, np.float32)) for name, end in bounds.items()]
        column = nodes.op("Unsqueeze", "rotary", [nodes.op("Range", "rotary", ends), nodes.integers(1)])
        angles = nodes.op("Mul", "rotary", [column, nodes.constant("constants.rotary_frequencies", frequencies[None])])
        tables = [nodes.op(kind, "rotary", [angles]) for kind in ("Cos", "Sin")]
        if factor == 1:
            return tables
        scale = nodes.constant("constants.rotary_factor", np.array(factor, np.float32))
        return [nodes.op("Mul", f"rotary.{index}", [table, scale]) for index, table in enumerate(tables)]

    def _norm(self, module: str, hidden: ir.Value, added: ir.Value | None = None) -> tuple[ir.Value, ir.Value]:
        """The sum of the stream and what the last module added to it, and its RMS norm."""
        scale, epsilon = self._weights.vector(f"{module}.weight"), self._of.epsilon
        if added is None:
            kind = "SimplifiedLayerNormalization"
            return hidden, self._nodes.op(kind, module, [hidden, scale], axis=-1, epsilon=epsilon, stash_type=1)
        kind, inputs = "SkipSimplifiedLayerNormalization", [hidden, added, scale]
        outputs = self._nodes.several(kind, module, inputs, 4, MICROSOFT, unused=(1, 2), epsilon=epsilon)
        return outputs[3], outputs[0]

    def _attention(self, layer: int, value: ir.Value, tail: Sequence[ir.Value]) -> tuple[ir.Value, Sequence[ir.Value]]:
        of, scope = self._of, f"model.layers.{layer}.self_attn"
        projected = self._heads(scope, self._weights.project(scope, ["q_proj", "k_proj", "v_proj"], value))
        shape = ("batch_size", of.key_value_heads, "past_sequence_length", of.head_size)
        past = [
            self._nodes.input(f"past_key_values.{layer}.{kind}", ir.DataType.FLOAT, shape) for kind in ("key", "value")
        ]
        attended, *present = self._nodes.several(
            "GroupQueryAttention",
            scope,
            [*projected, *[None] * (3 - len(projected)), *past, *tail],
            3,
            MICROSOFT,
            num_heads=of.heads,
            kv_num_heads=of.key_value_heads,
            do_rotary=1,
            rotary_interleaved=0,
            local_window_size=of.windows[layer],
        )
        return self._weights.project(scope, ["o_proj"], attended)[0], present

    def _heads(self, scope: str, projected: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """Query, key and value as the attention takes them: side by side in one value, or each with its norm."""
        of, nodes = self._of, self._nodes
        if not self._weights.has(f"{scope}.q_norm.weight"):
            return projected
        if len(projected) == 1:
            sizes = [of.heads * of.head_size, *[of.key_value_heads * of.head_size] * 2]
            projected = nodes.several("Split", scope, [projected[0], nodes.integers(*sizes)], 3, axis=-1)
        normed = [
            self._head_norm(f"{scope}.{kind}_norm", value, heads)
            for kind, value, heads in zip("qk", projected, (of.heads, of.key_value_heads), strict=False)
        ]
        return [*normed, projected[2]]

    def _head_norm(self, module: str, value: ir.Value, heads: int) -> ir.Value:
        nodes, size = self._nodes, self._of.head_size
        apart = nodes.op("Reshape", f"{module}.apart", [value, nodes.integers(0, 0, heads, size)])
        _, normed = self._norm(module, apart)
        return nodes.op("Reshape", f"{module}.together", [normed, nodes.integers(0, 0, heads * size)])

    def _mixture(self, layer: str, value: ir.Value) -> ir.Value:
        nodes, of, scope = self._nodes, self._of, f"{layer}.block_sparse_moe"
        rows = nodes.op("Reshape", f"{scope}.rows", [value, nodes.integers(-1, of.hidden)])
        (logits,) = self._weights.project(scope, ["gate"], rows)
        feed_forward = partial(self._feed_forward, leaves=_EXPERT)
        mixed = mix_experts(nodes, scope, logits, rows, of.experts, of.experts_per_token, feed_forward)
        return nodes.op("Reshape", f"{scope}.mixed", [mixed, nodes.op("Shape", f"{scope}.shape", [value])])

    def _feed_forward(self, scope: str, value: ir.Value, leaves: Sequence[str]) -> ir.Value:
        """``leaves``: what gate, up and down are called."""
        *beside, down = leaves
        projected = self._weights.project(scope, beside, value)
        if len(projected) == 1:
            projected = self._nodes.several("Split", scope, projected, 2, axis=-1, num_outputs=2)
        gate, up = projected
        active = self._nodes.op("QuickGelu", f"{scope}.act_fn", [gate], MICROSOFT, alpha=1.0)
        product = self._nodes.op("Mul", f"{scope}.act_fn", [active, up])
        return self._weights.project(scope, [down], product)[0]

    def _finish(self, hidden: ir.Value, presents: Sequence[ir.Value]) -> None:
        nodes, of = self._nodes, self._of
        length: int | str = "sequence_length"
        if self._settings.last_token_only:
            bounds = [nodes.integers(bound) for bound in (-1, np.iinfo(np.int64).max, 1)]
            hidden, length = nodes.op("Slice", _HEAD, [hidden, *bounds]), 1
        logits = self._weights.head(_EMBEDDING if of.tied else _HEAD, hidden)
        nodes.output(logits, "logits", ir.DataType.FLOAT, ["batch_size", length, of.vocabulary])
        shape = ("batch_size", of.key_value_heads, "total_sequence_length", of.head_size)
        for index, value in enumerate(presents):
            layer, kind = divmod(index, 2)
            nodes.output(value, f"present.{layer}.{('key', 'value')[kind]}", ir.DataType.FLOAT, shape)
