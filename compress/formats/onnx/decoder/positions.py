"""Where the tokens of a batch are, as the attention kernel wants to know it: lengths, and tables of rotary angles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.decoder.nodes import Nodes

REFUSAL = "padding_on_the_left_is_refused"


def write_lengths(nodes: Nodes, mask: ir.Value) -> Sequence[ir.Value]:
    """For each row the position of its last token, [batch] int32; and the total length, an int32 scalar."""
    axis = nodes.integers(1)
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


def write_rotary(nodes: Nodes, node: ir.Node, tables: dict[str, Sequence[ir.Value]]) -> Sequence[ir.Value]:
    """Cosines and sines of all positions, [positions, pairs]; computed when the graph is loaded.

    ``tables`` are those written so far.
    """
    frequencies = np.array(node.attributes["frequencies"].as_floats(), np.float32)
    factor, positions = node.attributes["factor"].as_float(), node.attributes["positions"].as_int()
    key = f"{frequencies.tobytes().hex()} {factor} {positions}"
    if key not in tables:
        scope = f"rotary{len(tables) or ''}"
        bounds = {"start": 0, "stop": positions, "step": 1}
        ends = [nodes.constant(f"constants.{scope}_{name}", np.array(end, np.float32)) for name, end in bounds.items()]
        column = nodes.op("Unsqueeze", scope, [nodes.op("Range", scope, ends), nodes.integers(1)])
        angles = nodes.op("Mul", scope, [column, nodes.constant(f"constants.{scope}_frequencies", frequencies[None])])
        found = [nodes.op(kind, scope, [angles]) for kind in ("Cos", "Sin")]
        if factor != 1:
            scale = nodes.constant(f"constants.{scope}_factor", np.array(factor, np.float32))
            found = [nodes.op("Mul", f"{scope}.{index}", [table, scale]) for index, table in enumerate(found)]
        tables[key] = found
    return tables[key]
