"""A mixture of experts node by node: each expert multiplies the tokens that it is sent, and no others.

ONNX Runtime has an operator for a whole mixture, `QMoE`, with one number of bits for all of its experts. Here each
matrix is a product of its own, as in the dense layers, so that every expert has the bits that it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.decoder.nodes import Nodes


class Sent(NamedTuple):
    """``rows`` [n, hidden] that an expert is sent, the ``tokens`` [n, 1] that they are, and their ``shares`` [n, 1]."""

    rows: ir.Value
    tokens: ir.Value
    shares: ir.Value
    name: str


def send(nodes: Nodes, name: str, number: int, rows: ir.Value, chosen: ir.Value, shares: ir.Value) -> Sent:
    """What the expert ``number`` is sent of ``rows`` [tokens, hidden], by what the router chose, [tokens, k]."""
    sent = nodes.op("Equal", name, [chosen, nodes.constant(f"constants.expert_{number}", np.array(number))])
    places = nodes.op("Transpose", name, [nodes.op("NonZero", name, [sent])], perm=[1, 0])
    tokens = nodes.op("Slice", name, [places, *[nodes.integers(value) for value in (0, 1, 1)]])
    given = nodes.op("GatherND", f"{name}.rows", [rows, tokens])
    share = nodes.op("Unsqueeze", name, [nodes.op("GatherND", f"{name}.share", [shares, places]), nodes.integers(-1)])
    return Sent(given, tokens, share, name)


def take_in(nodes: Nodes, scope: str, rows: ir.Value, found: Sequence[tuple[Sent, ir.Value]]) -> ir.Value:
    """[tokens, hidden]: the sum of what the experts that each token was sent to made of it, weighted by its shares."""
    parts = [nodes.op("Mul", f"{sent.name}.shared", [part, sent.shares]) for sent, part in found]
    all_tokens = nodes.op("Concat", f"{scope}.tokens", [sent.tokens for sent, _ in found], axis=0)
    all_parts = nodes.op("Concat", f"{scope}.parts", parts, axis=0)
    nothing = nodes.op("ConstantOfShape", scope, [nodes.op("Shape", f"{scope}.experts", [rows])])
    return nodes.op("ScatterND", f"{scope}.experts", [nothing, all_tokens, all_parts], reduction="add")
