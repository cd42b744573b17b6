"""An adapter's products beside those of the layers that it adapts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from compress.checkpoints.adapter import LowRank
from compress.formats.onnx.decoder.nodes import Nodes


def add_low_rank(
    nodes: Nodes,
    name: str,
    value: ir.Value,
    product: ir.Value,
    parts: Sequence[tuple[LowRank | None, int]],
) -> ir.Value:
    """``product`` of ``value`` plus b a ``value``.

    ``parts`` are the layers that the product joins, with the outputs of each; a layer may have no factors.
    """
    if all(factors is None for factors, _ in parts):
        return product
    a = np.concatenate([factors.a.numpy() for factors, _ in parts if factors is not None])
    b = np.zeros((sum(outputs for _, outputs in parts), len(a)), np.float32)
    row = column = 0
    for factors, outputs in parts:
        if factors is not None:
            rank = len(factors.a)
            b[row : row + outputs, column : column + rank] = factors.b.numpy()
            column += rank
        row += outputs
    narrow = nodes.op("MatMul", f"{name}.lora_A", [value, nodes.constant(f"{name}.lora_A.weight", a.T)])
    wide = nodes.op("MatMul", f"{name}.lora_B", [narrow, nodes.constant(f"{name}.lora_B.weight", b.T)])
    return nodes.op("Add", f"{name}.lora", [product, wide])
