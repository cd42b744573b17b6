"""Recurrences that transformers unrolls in Python, as ONNX's `Scan` over tokens: any length, one node."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch.onnx import ops

from compress.formats.onnx.decoder.nodes import Nodes

DELTA_RULE = "GatedDeltaRule"
DELTA_RULES = "torch_chunk_gated_delta_rule"
"""What transformers' modules call it."""
_EPSILON = 1e-6
_SEQUENCES = ("query", "key", "value", "decay", "beta")


def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **others: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule (Yang et al. 2024, equation 10) in a trace, with transformers' arguments.

    ``query`` and ``key`` [batch, length, key heads, size], ``value`` [batch, length, heads, value size], ``g`` (the log
    of the decay) and ``beta`` [batch, length, heads]. Gives the outputs [batch, length, heads, value size] and the
    state [batch, heads, size, value size].
    """
    kind, heads = query.dtype, value.shape[2]
    if heads != key.shape[2]:
        query, key = (one.repeat_interleave(heads // one.shape[2], dim=2) for one in (query, key))
    query, key, value, g, beta = (one.float() for one in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        query, key = (one * torch.rsqrt(one.square().sum(-1, keepdim=True) + _EPSILON) for one in (query, key))
    query = query * query.shape[-1] ** -0.5
    state = initial_state
    if state is None:
        state = query.new_zeros(query.shape[0], heads, query.shape[-1], value.shape[-1])
    along = [one.transpose(0, 1) for one in (query, key, value, g.exp(), beta)]
    last, outputs = ops.symbolic_multi_out(
        f"compress::{DELTA_RULE}",
        [state, *along],
        {},
        dtypes=[torch.float32] * 2,
        shapes=[list(state.shape), list(along[2].shape)],
        version=1,
    )
    return outputs.transpose(0, 1).to(kind), last if output_final_state else None


def write_delta_rule(nodes: Nodes, name: str, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
    """The state after all tokens, and what each gave, [length, batch, heads, value size]."""
    state = ir.val(f"{name}.state", dtype=ir.DataType.FLOAT)
    token = {kind: ir.val(f"{name}.{kind}", dtype=ir.DataType.FLOAT) for kind in _SEQUENCES}
    scope = f"{name}.token"

    def body() -> Sequence[ir.Value]:
        row, column, both = nodes.integers(-2), nodes.integers(-1), nodes.integers(-2, -1)
        decay = nodes.op("Unsqueeze", f"{scope}.decay", [token["decay"], both])
        decayed = nodes.op("Mul", f"{scope}.decay", [state, decay])
        key = nodes.op("Unsqueeze", f"{scope}.key", [token["key"], row])
        known = nodes.op("MatMul", f"{scope}.known", [key, decayed])
        value = nodes.op("Unsqueeze", f"{scope}.value", [token["value"], row])
        beta = nodes.op("Unsqueeze", f"{scope}.beta", [token["beta"], both])
        delta = nodes.op("Mul", f"{scope}.delta", [nodes.op("Sub", f"{scope}.delta", [value, known]), beta])
        upright = nodes.op("Unsqueeze", f"{scope}.upright", [token["key"], column])
        learned = nodes.op("MatMul", f"{scope}.learned", [upright, delta])
        after = nodes.op("Add", f"{scope}.after", [decayed, learned])
        query = nodes.op("Unsqueeze", f"{scope}.query", [token["query"], row])
        given = nodes.op("MatMul", f"{scope}.given", [query, after])
        return [after, nodes.op("Squeeze", f"{scope}.given", [given, row])]

    graph = nodes.branch(f"{name}.body", body, [state, *token.values()])
    return nodes.several("Scan", name, inputs, 2, body=graph, num_scan_inputs=len(_SEQUENCES))
