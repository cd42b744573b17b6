"""A mixture of experts node by node: each expert multiplies the tokens that it is sent, and no others.

ONNX Runtime has an operator for a whole mixture, `QMoE`, with one number of bits for all of its experts. Here each
matrix is a product of its own, as in the dense layers, so that every expert has the bits that it was given.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.decoder.nodes import Nodes

FeedForward = Callable[[str, ir.Value], ir.Value]
"""Given an expert's scope and rows [n, hidden], what it makes of them."""


def mix_experts(
    nodes: Nodes, scope: str, logits: ir.Value, rows: ir.Value, count: int, per_token: int, expert: FeedForward
) -> ir.Value:
    """[tokens, hidden] of ``rows`` [tokens, hidden]: the sum of what the ``per_token`` likeliest experts give.

    They are weighted by the softmax of the router's ``logits`` [tokens, count], made to sum to 1 over those chosen.
    """
    likelihoods = nodes.op("Softmax", f"{scope}.gate", [logits], axis=-1)
    likeliest, chosen = nodes.several("TopK", f"{scope}.gate", [likelihoods, nodes.integers(per_token)], 2, axis=-1)
    whole = nodes.op("ReduceSum", f"{scope}.gate", [likeliest, nodes.integers(-1)], keepdims=1)
    shares = nodes.op("Div", f"{scope}.gate", [likeliest, whole])
    found = [_one(nodes, f"{scope}.experts.{number}", number, rows, chosen, shares, expert) for number in range(count)]
    tokens, parts = (nodes.op("Concat", f"{scope}.{name}", values, axis=0) for name, values in _named(found))
    nothing = nodes.op("ConstantOfShape", scope, [nodes.op("Shape", f"{scope}.experts", [rows])])
    return nodes.op("ScatterND", f"{scope}.experts", [nothing, tokens, parts], reduction="add")


def _one(
    nodes: Nodes, scope: str, number: int, rows: ir.Value, chosen: ir.Value, shares: ir.Value, expert: FeedForward
) -> tuple[ir.Value, ir.Value]:
    """The tokens [n, 1] that an expert is sent, and its part of their results, [n, hidden]."""
    sent = nodes.op("Equal", scope, [chosen, nodes.constant(f"constants.expert_{number}", np.array(number))])
    places = nodes.op("Transpose", scope, [nodes.op("NonZero", scope, [sent])], perm=[1, 0])
    tokens = nodes.op("Slice", scope, [places, *[nodes.integers(value) for value in (0, 1, 1)]])
    given = nodes.op("GatherND", f"{scope}.rows", [rows, tokens])
    share = nodes.op("Unsqueeze", scope, [nodes.op("GatherND", f"{scope}.share", [shares, places]), nodes.integers(-1)])
    return tokens, nodes.op("Mul", scope, [expert(scope, given), share])


def _named(found: list[tuple[ir.Value, ir.Value]]) -> list[tuple[str, list[ir.Value]]]:
    return [("tokens", [tokens for tokens, _ in found]), ("parts", [part for _, part in found])]
