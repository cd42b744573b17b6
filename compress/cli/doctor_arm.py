"""`compress doctor MODEL --target linux-arm64`: does the file answer on ARM's kernels as it does here?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compress.cli.finding import Finding

if TYPE_CHECKING:
    import onnx

    from compress.formats.onnx.int8.observe import Feed
    from compress.inspect.emulated_arm import EmulatedArm
    from compress.inspect.operator_answers import Apart, Departure
    from compress.progress import Progress

_EXAMPLES = 4
_NUDGE = 1 + 1e-6
_ALIKE = 3
_BY_ROWS = (
    "on ARM with SME, ONNX Runtime gives every row a scale of its own, and here one to the whole batch: other answers, "
    "nearer to float; `quantize: {method: static}` gives the same everywhere"
)
_CLOSE = 1e-3
"""Difference of the answers, over their root mean square, below which nobody would notice it."""


def arm_findings(graph: Path, feeds: Sequence[Feed] | None, progress: Progress) -> Iterator[Finding]:
    """What ONNX Runtime's ARM kernels answer under emulation, operator by operator and in all; or why nobody asked."""
    from compress.inspect.emulated_arm import find_emulated_arm

    arm = find_emulated_arm()
    if isinstance(arm, str):
        yield Finding("ok", f"linux-arm64: its answers were not compared: {arm}")
        return
    if feeds is None:
        yield Finding("ok", "linux-arm64: its answers were not compared: name a recipe, for real inputs")
        return
    import onnx

    from compress.formats.onnx.runtimes.profile import write_optimized
    from compress.inspect.operator_answers import answers_here, departures, take_apart

    progress.note("running the file on an emulated ARM processor; this takes a minute or more")
    with tempfile.TemporaryDirectory(prefix="compress-arm-") as folder:
        portable = onnx.load(write_optimized(graph, Path(folder), 1, portable=True))
    apart = take_apart(portable, feeds[0])
    (there,) = arm.run(apart.graph, [apart.feed], optimize=False)
    yield _operators(apart, departures(apart, answers_here(apart), there))
    yield _whole(onnx.load(graph), feeds[:_EXAMPLES], arm)


def _operators(apart: Apart, found: Sequence[Departure]) -> Finding:
    count = len(apart.nodes)
    bad = [each for each in found if each.matters]
    if not bad:
        rest = max((each.error for each in found), default=0.0)
        rounding = f"; {len(found)} of them sum floats in another order ({rest:.1g})" if found else ""
        return Finding("ok", f"linux-arm64: each of {count} operators answers as here on the same inputs{rounding}")
    first = bad[0]
    from compress.formats.onnx.runtimes.profile import own_name

    steps = f" by up to {first.steps} steps" if first.steps is not None else ""
    kinds = ", ".join(dict.fromkeys(each.operator for each in bad))
    return Finding(
        "warning",
        f"linux-arm64: the first operator that departs is {first.operator} {own_name(first.name) or first.name}: "
        f"on the same inputs {first.share:.2%} of its answers differ{steps}, {first.error:.1e} of their size; "
        f"so do {len(bad)} of {count} ({kinds})",
        _BY_ROWS if first.operator == "DynamicQuantizeMatMul" else None,
    )


def _whole(graph: onnx.ModelProto, feeds: Sequence[Feed], arm: EmulatedArm) -> Finding:
    """The answers of the whole file, each machine having optimized it in its own way.

    Where floats are rounded to integers, a last bit may decide a step, and steps go on through the layers; so what a
    millionth on the inputs does here is told beside it.
    """
    from compress.formats.onnx.int8.observe import tap
    from compress.inspect.operator_answers import spread

    names = [value.name for value in graph.graph.output]
    answers = [values[names[0]] for values in tap(graph, names, feeds)]
    largest, same = spread(answers, [values[names[0]] for values in arm.run(graph, feeds, optimize=True)])
    nudged = [
        {name: array * array.dtype.type(_NUDGE) if array.dtype.kind == "f" else array for name, array in feed.items()}
        for feed in feeds
    ]
    own, _ = spread(answers, [values[names[0]] for values in tap(graph, names, nudged)])
    text = f"linux-arm64: {names[0]} of {len(feeds)} examples differs by at most {largest:.1e} of its size"
    beside = f", where a millionth on the inputs moves it by {own:.1e} here" if own else ""
    level: Literal["ok", "warning"] = "ok" if largest <= max(_CLOSE, _ALIKE * own) else "warning"
    return Finding(level, f"{text}{beside}; the largest value is in the same place in {same} of them")
