"""Recurrences that transformers unrolls in Python, as ONNX's `Scan` over tokens: any length, one node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.onnx import ops

from compress.formats.onnx.decoder.nodes import Nodes

DELTA_RULE, SELECTIVE_SCAN = "GatedDeltaRule", "SelectiveScan"
DELTA_RULES, SELECTIVE_SCANS = "torch_chunk_gated_delta_rule", "mamba_selective_scan"
"""What transformers' modules call them."""
_EPSILON = 1e-6
_SEQUENCES = ("query", "key", "value", "decay", "beta")
_SELECTED = ("step", "value", "input", "output")


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


def selective_scan(
    state: torch.Tensor | None,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **others: object,
) -> Any:
    """The selective scan (Gu and Dao 2023, algorithm 2) in a trace, with transformers' arguments behind the ``state``.

    ``hidden_states``, ``dt`` and ``z`` [batch, channels, length], ``A`` [channels, size], ``B`` and ``C`` [batch,
    size, length]. Gives the outputs [batch, channels, length], and the state [batch, channels, size] if it is asked.
    """
    kind, hidden = hidden_states.dtype, hidden_states.float()
    dt = dt.float() if delta_bias is None else dt.float() + delta_bias[:, None]
    dt = torch.nn.functional.softplus(dt) if delta_softplus else dt
    before = hidden.new_zeros(hidden.shape[0], *A.shape) if state is None else state
    along = [one.float().permute(2, 0, 1) for one in (dt, dt * hidden, B, C)]
    last, outputs = ops.symbolic_multi_out(
        f"compress::{SELECTIVE_SCAN}",
        [before, A.float(), *along],
        {},
        dtypes=[torch.float32] * 2,
        shapes=[list(before.shape), list(along[0].shape)],
        version=1,
    )
    given = outputs.permute(1, 2, 0)
    given = given if D is None else given + hidden * D[:, None]
    given = (given if z is None else given * torch.nn.functional.silu(z.float())).to(kind)
    return (given, last) if return_last_state else given


def write_selective_scan(nodes: Nodes, name: str, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
    """The state after all tokens, and what each gave, [length, batch, channels]."""
    before, decays, *along = inputs
    state = ir.val(f"{name}.state", dtype=ir.DataType.FLOAT)
    token = {kind: ir.val(f"{name}.{kind}", dtype=ir.DataType.FLOAT) for kind in _SELECTED}
    scope = f"{name}.token"

    def body() -> Sequence[ir.Value]:
        row, column = nodes.integers(-2), nodes.integers(-1)
        step, value = (nodes.op("Unsqueeze", f"{scope}.{kind}", [token[kind], column]) for kind in ("step", "value"))
        read = nodes.op("Unsqueeze", f"{scope}.input", [token["input"], row])
        kept = nodes.op("Exp", f"{scope}.kept", [nodes.op("Mul", f"{scope}.kept", [step, decays])])
        old = nodes.op("Mul", f"{scope}.old", [state, kept])
        after = nodes.op("Add", f"{scope}.after", [old, nodes.op("Mul", f"{scope}.new", [value, read])])
        output = nodes.op("Unsqueeze", f"{scope}.output", [token["output"], column])
        given = nodes.op("MatMul", f"{scope}.given", [after, output])
        return [after, nodes.op("Squeeze", f"{scope}.given", [given, column])]

    graph = nodes.branch(f"{name}.body", body, [state, *token.values()])
    return nodes.several("Scan", name, [before, *along], 2, body=graph, num_scan_inputs=len(_SELECTED))


RECURRENCES: Mapping[str, Callable[[Nodes, str, Sequence[ir.Value]], Sequence[ir.Value]]] = {
    DELTA_RULE: write_delta_rule,
    SELECTIVE_SCAN: write_selective_scan,
}
"""What writes each, by its node in a trace."""
