"""The parts that Whisper's encoder and decoder share: norms, feed-forward, and attention's surroundings.

Layers are pre-norm (Radford et al. 2022, section 2.2): each adds to the stream what it makes of the stream's norm.
"""

from __future__ import annotations

import onnx_ir as ir

from compress.formats.onnx.decoder.nodes import MICROSOFT, Nodes
from compress.formats.onnx.decoder.weights import Weights

_EPSILON = 1e-5
"""Of torch's LayerNorm, which Whisper leaves as it is."""


class Layers:
    """Writes parts of a graph. Values are [batch, length, hidden]."""

    def __init__(self, nodes: Nodes, weights: Weights, heads: int) -> None:
        self.nodes, self.weights, self._heads = nodes, weights, heads

    def norm(self, module: str, value: ir.Value) -> ir.Value:
        """Layer norm."""
        scale, bias = (self.weights.vector(f"{module}.{part}") for part in ("weight", "bias"))
        return self.nodes.op("LayerNormalization", module, [value, scale, bias], axis=-1, epsilon=_EPSILON)

    def add(self, module: str, stream: ir.Value, value: ir.Value) -> ir.Value:
        """The stream with what ``module`` adds to it."""
        return self.nodes.op("Add", f"{module}.residual", [stream, value])

    def project(self, scope: str, leaf: str, value: ir.Value) -> ir.Value:
        """The linear layer ``leaf`` of ``scope``."""
        return self.weights.project(scope, [leaf], value)[0]

    def feed_forward(self, scope: str, stream: ir.Value) -> ir.Value:
        """The stream with what the feed-forward block of a layer adds."""
        value = self.project(scope, "fc1", self.norm(f"{scope}.final_layer_norm", stream))
        value = self.nodes.op("Gelu", f"{scope}.activation_fn", [value])
        return self.add(f"{scope}.fc2", stream, self.project(scope, "fc2", value))

    def attend(self, scope: str, *inputs: ir.Value | None, outputs: int = 1, causal: bool = False) -> list[ir.Value]:
        """ONNX Runtime's attention: ``inputs`` are query, key, value and, from the seventh place, the past's."""
        found = self.nodes.several(
            "MultiHeadAttention",
            scope,
            inputs,
            outputs,
            MICROSOFT,
            num_heads=self._heads,
            unidirectional=int(causal),
        )
        return list(found)
