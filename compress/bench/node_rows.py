"""From what each node took and what it had to do to rows of a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from compress.bench.profile import Row, total
from compress.formats.onnx.costs import Cost, GraphCost
from compress.formats.onnx.runtimes.profile import CallRun, own_name
from compress.numerics.roofline import Roof, limit


def node_rows(
    graph: ir.Graph,
    runs: Sequence[Sequence[CallRun]],
    costs: Sequence[GraphCost],
    layers: Mapping[str, str],
    roof: Roof,
) -> tuple[Row, ...]:
    """One row for each node of ``graph`` that ran, in its order.

    ``runs`` are [passes][calls] and ``costs`` [calls]. A node's time is that of `typical`.
    """
    ran = [node for node in graph if all(str(node.name) in run for run in runs[0])]
    return tuple(
        _row(
            str(node.name),
            node.op_type,
            layers[str(node.name)],
            [[run[str(node.name)].microseconds for run in calls] for calls in runs],
            [cost.nodes[str(node.name)] for cost in costs],
            roof,
        )
        for node in ran
    )


def typical(times: ArrayLike) -> float:
    """Median over passes of each call, then the mean over calls, of [passes, calls].

    A disturbance hits some passes of a call and so leaves its median alone.
    """
    return float(np.median(np.asarray(times, dtype=np.float64), axis=0).mean())


def busy_ms(call: CallRun) -> float:
    """How long an operator was at work in one call."""
    return sum(run.microseconds for run in call.values()) / 1e3


def whole_row(rows: Sequence[Row], time_ms: float) -> Row:
    """All nodes together, in the ``time_ms`` that a call takes without profiling.

    The operators that are not counted take the share of it that they have of the profiled time.
    """
    summed = total("whole model", rows)
    share = summed.uncounted_ms / summed.time_ms if summed.time_ms else 0.0
    return summed.model_copy(update={"time_ms": time_ms, "uncounted_ms": share * time_ms, "layer": None})


def _row(
    name: str,
    operator: str,
    layer: str,
    microseconds: Sequence[Sequence[int]],
    costs: Sequence[Cost | None],
    roof: Roof,
) -> Row:
    time_ms = typical(microseconds) / 1e3
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        known = []
    limits = [limit(roof, *cost.operations, cost.moved_bytes) for cost in known]
    calls = len(costs)
    return Row(
        name=own_name(name),
        operators=(operator,),
        layer=layer,
        nodes=1,
        time_ms=time_ms,
        uncounted_ms=0.0 if known else time_ms,
        fp32_operations=sum(cost.operations.fp32 for cost in known) / calls,
        int8_operations=sum(cost.operations.int8 for cost in known) / calls,
        weight_bytes=sum(cost.weight_bytes for cost in known) / calls,
        activation_bytes=sum(cost.activation_bytes for cost in known) / calls,
        compute_bound_ms=1e3 * sum(each.seconds for each in limits if each.compute_s >= each.memory_s) / calls,
        memory_bound_ms=1e3 * sum(each.seconds for each in limits if each.compute_s < each.memory_s) / calls,
    )
