"""ONNX Runtime's own kernels for 64-bit ARM on an emulated processor: does a file answer there as it does here?

    .venv/bin/python benchmarks/arm64.py artifacts/runs/quickstart/latest

Every operator is compared on its own inputs, then the answers of the whole file. Needs `qemu-aarch64` (Debian:
qemu-user) and a Python for ARM with numpy and onnxruntime, which `benchmarks/arm64_runtime.sh` puts into the user's
cache. What is slow or fast there says nothing of a real processor.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import onnx
import onnxruntime
import typer

from compress.cli.doctor_model import Finding, real_inputs
from compress.cli.output import ConsoleProgress
from compress.formats.onnx.int8.observers import Feed, stream_activations
from compress.formats.onnx.model import find_graphs
from compress.formats.onnx.runtimes.profile import CPU, original_name, write_optimized
from compress.utils.errors import CompressError, StageError

_EXAMPLES = 4
_NUDGE = 1 + 1e-6
_ALIKE = 3
_BY_ROWS = (
    "on ARM with SME, ONNX Runtime gives every row a scale of its own, and here one to the whole batch: other answers, "
    "nearer to float; `onnx_int8: {method: static}` gives the same everywhere"
)
_CLOSE = 1e-3
"""Difference of the answers, over their root mean square, below which nobody would notice it."""
_NOISE = 1e-4
"""Relative error of a float operator up to which only the order of its sums differs."""
_EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
_PYTHON = "root/usr/bin/python3.13"
NEWEST, OLD = "max", "cortex-a72"
"""As qemu names them: with 8-bit matrix products and SME, and without even dot products."""
_SECONDS = 1800.0
_RUN = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
if sys.argv[4] == "as it is":
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
fed = np.load(sys.argv[2])
names = [value.name for value in session.get_outputs()]
found = {}
for batch in range(int(sys.argv[5])):
    answers = session.run(names, {value.name: fed[f"{batch}:{value.name}"] for value in session.get_inputs()})
    found.update({f"{batch}:{place}": answer for place, answer in enumerate(answers)})
np.savez(sys.argv[3], **found)
"""


def main(
    model: Annotated[Path, typer.Argument(help="A run's folder or an ONNX model.")],
    recipe: Annotated[Path | None, typer.Option(help="Default: the recipe.yaml beside the model.")] = None,
) -> None:
    """Say what ONNX Runtime's ARM kernels answer, operator by operator and in all."""
    arm = find_emulated_arm()
    if isinstance(arm, str):
        raise SystemExit(arm)
    try:
        folder, feeds = real_inputs(model, recipe, ConsoleProgress())
        if feeds is None:
            raise SystemExit("name a recipe with --recipe, for real inputs")
        for graph, given in zip(find_graphs(folder), feeds, strict=True):
            for finding in arm_findings(graph, given, arm):
                typer.echo("\n  -> ".join(filter(None, (f"{graph.name}: {finding.what}", finding.advice))))
    except CompressError as error:
        raise SystemExit(str(error)) from None


def arm_findings(graph: Path, feeds: Sequence[Feed], arm: EmulatedArm) -> Iterator[Finding]:
    """What the emulated processor answers on its own inputs for each operator, and for the whole file."""
    with tempfile.TemporaryDirectory(prefix="compress-arm-") as folder:
        portable = onnx.load(write_optimized(graph, Path(folder), 1, portable=True))
    apart = take_apart(portable, feeds[0])
    (arm_outputs,) = arm.run(apart.graph, [apart.feed], optimize=False)
    yield _operators(apart, departures(apart, answers_here(apart), arm_outputs))
    yield _whole(onnx.load(graph), feeds[:_EXAMPLES], arm)


@dataclass(frozen=True)
class EmulatedArm:
    """An emulator and a Python for it, both there, and the processor to be."""

    emulator: str
    home: Path
    processor: str = NEWEST

    def run(self, graph: onnx.ModelProto, feeds: Sequence[Feed], optimize: bool) -> list[dict[str, np.ndarray]]:
        """All outputs of ``graph`` by name, for each of ``feeds``.

        Raises `StageError` where the process fails or takes half an hour.
        """
        with tempfile.TemporaryDirectory(prefix="compress-arm-") as folder:
            work_folder = Path(folder)
            onnx.save(graph, work_folder / "model.onnx")
            fed = {f"{batch}:{name}": array for batch, feed in enumerate(feeds) for name, array in feed.items()}
            np.savez(work_folder / "fed.npz", **fed)  # type: ignore[arg-type]
            self._start(work_folder, "optimized" if optimize else "as it is", len(feeds))
            with np.load(work_folder / "answers.npz") as answers:
                names = [value.name for value in graph.graph.output]
                return [
                    {name: answers[f"{batch}:{number}"] for number, name in enumerate(names)}
                    for batch in range(len(feeds))
                ]

    def _start(self, place: Path, level: str, batches: int) -> None:
        files = [str(place / name) for name in ("model.onnx", "fed.npz", "answers.npz")]
        python = [self.emulator, "-cpu", self.processor, "-L", str(self.home / "root"), str(self.home / _PYTHON)]
        environment = {"PYTHONHOME": str(self.home / "root" / "usr"), "PYTHONPATH": str(self.home / "site")}
        try:
            done = subprocess.run(
                [*python, "-c", _RUN, *files, level, str(batches)],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
                env={"PATH": os.defpath, **environment},
            )
        except subprocess.TimeoutExpired as error:
            raise StageError(f"The emulated ARM processor took more than {_SECONDS:.0f} s.") from error
        if done.returncode:
            last_line = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise StageError(f"The emulated ARM processor failed: {last_line[0]}", where=self.emulator)


def find_emulated_arm() -> EmulatedArm | str:
    """What runs ARM code here, or why nothing does."""
    emulator = next((path for name in _EMULATORS if (path := shutil.which(name))), None)
    if emulator is None:
        return "there is no qemu-aarch64 on PATH (Debian: apt-get install qemu-user)"
    home = arm_home()
    if not (home / _PYTHON).is_file() or not (home / "site" / "onnxruntime").is_dir():
        return f"{home} has no Python with onnxruntime for it (`bash benchmarks/arm64_runtime.sh` fetches them)"
    return EmulatedArm(emulator, home)


def arm_home() -> Path:
    """`compress/arm64` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return home / "compress" / "arm64"


@dataclass(frozen=True)
class Apart:
    """Every node of a graph with inputs of its own, in one graph without an edge; ``nodes`` in their order."""

    graph: onnx.ModelProto
    feed: Feed
    nodes: tuple[onnx.NodeProto, ...]


@dataclass(frozen=True)
class Departure:
    """One operator that answers otherwise, on the same inputs.

    ``error`` is the root mean square of the differences over that of the answers, ``share`` the part of the answers
    that differ, ``steps`` the largest difference of integers.
    """

    operator: str
    name: str
    error: float
    share: float
    steps: int | None = None

    @property
    def matters(self) -> bool:
        """Whether it is more than another order of summing floats."""
        return self.steps is not None or self.error > _NOISE


def take_apart(graph: onnx.ModelProto, feed: Feed) -> Apart:
    """``graph`` must be one whose nodes run as they are, such as `write_optimized` writes; ``feed`` is one batch.

    Nodes with graphs inside, and those whose inputs are not all tensors that can be had as outputs, are left out.
    """
    stored = {tensor.name for tensor in graph.graph.initializer}
    nodes = [node for node in graph.graph.node if not any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute)]
    needed_names = list(dict.fromkeys(name for node in nodes for name in node.input if name and name not in stored))
    (values,) = stream_activations(graph, needed_names, [feed])
    apart = onnx.ModelProto()
    apart.CopyFrom(graph)
    del apart.graph.node[:], apart.graph.input[:], apart.graph.output[:], apart.graph.value_info[:]
    given: dict[str, np.ndarray] = {}
    for index, node in enumerate(nodes):
        single_node = onnx.NodeProto()
        single_node.CopyFrom(node)
        given |= {name: values[name] for name in node.input if name in values}
        single_node.output[:] = [f"answer_{index}_{at}" if name else "" for at, name in enumerate(node.output)]
        apart.graph.node.append(single_node)
        apart.graph.output.extend(onnx.ValueInfoProto(name=name) for name in single_node.output if name)
    for name, array in given.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        apart.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, array.shape))
    return Apart(apart, given, tuple(nodes))


def answers_here(apart: Apart) -> dict[str, np.ndarray]:
    """All answers on this machine, nothing optimized."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(apart.graph.SerializeToString(), options, providers=[CPU])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(apart.feed)), strict=True))


def departures(apart: Apart, here: Mapping[str, np.ndarray], there: Mapping[str, np.ndarray]) -> list[Departure]:
    """The operators whose answers are not the same bits, in the graph's order; both are answers to ``apart``."""
    differences = []
    for index, node in enumerate(apart.nodes):
        names = [f"answer_{index}_{at}" for at, name in enumerate(node.output) if name]
        pairs = [(here[name], there[name]) for name in names]
        if not all(np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f") for ours, theirs in pairs):
            differences.append(_departure(node, pairs))
    return differences


def spread(answers: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> tuple[float, int]:
    """The largest difference over the root mean square of an answer; how many keep the place of their largest value."""
    pairs = list(zip(answers, others, strict=True))
    largest = max(float(np.abs(a - b).max() / np.sqrt(np.square(a, dtype=np.float64).mean())) for a, b in pairs)
    return largest, sum(bool((a.argmax(-1) == b.argmax(-1)).all()) for a, b in pairs)


def _departure(node: onnx.NodeProto, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Departure:
    ours = np.concatenate([a.astype(np.float64).ravel() for a, _ in pairs])
    theirs = np.concatenate([b.astype(np.float64).ravel() for _, b in pairs])
    whole = float(np.square(ours).sum())
    error = float(np.sqrt(np.square(ours - theirs).sum() / whole)) if whole else float("inf")
    integers = all(a.dtype.kind in "iub" for a, _ in pairs)
    steps = int(np.abs(ours - theirs).max()) if integers else None
    return Departure(node.op_type, node.name, error, float((ours != theirs).mean()), steps)


def _operators(apart: Apart, found: Sequence[Departure]) -> Finding:
    count = len(apart.nodes)
    bad = [difference for difference in found if difference.matters]
    if not bad:
        largest_other = max((difference.error for difference in found), default=0.0)
        rounding = f"; {len(found)} of them sum floats in another order ({largest_other:.1g})" if found else ""
        return Finding("ok", f"each of {count} operators answers as here on the same inputs{rounding}")
    first = bad[0]
    steps = f" by up to {first.steps} steps" if first.steps is not None else ""
    kinds = ", ".join(dict.fromkeys(difference.operator for difference in bad))
    return Finding(
        "warning",
        f"the first operator that departs is {first.operator} {original_name(first.name) or first.name}: "
        f"on the same inputs {first.share:.2%} of its answers differ{steps}, {first.error:.1e} of their size; "
        f"so do {len(bad)} of {count} ({kinds})",
        _BY_ROWS if first.operator == "DynamicQuantizeMatMul" else None,
    )


def _whole(graph: onnx.ModelProto, feeds: Sequence[Feed], arm: EmulatedArm) -> Finding:
    """The answers of the whole file, each machine having optimized it in its own way.

    Where floats are rounded to integers, a last bit may decide a step, and steps go on through the layers; so what a
    millionth on the inputs does here is told beside it.
    """
    names = [value.name for value in graph.graph.output]
    answers = [values[names[0]] for values in stream_activations(graph, names, feeds)]
    largest, same = spread(answers, [values[names[0]] for values in arm.run(graph, feeds, optimize=True)])
    nudged = [
        {name: array * array.dtype.type(_NUDGE) if array.dtype.kind == "f" else array for name, array in feed.items()}
        for feed in feeds
    ]
    x86_spread, _ = spread(answers, [values[names[0]] for values in stream_activations(graph, names, nudged)])
    text = f"{names[0]} of {len(feeds)} examples differs by at most {largest:.1e} of its size"
    beside = f", where a millionth on the inputs moves it by {x86_spread:.1e} here" if x86_spread else ""
    level: Literal["ok", "warning"] = "ok" if largest <= max(_CLOSE, _ALIKE * x86_spread) else "warning"
    return Finding(level, f"{text}{beside}; the largest value is in the same place in {same} of them")


if __name__ == "__main__":
    typer.run(main)
