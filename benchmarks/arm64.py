"""Compare the outputs of an ONNX file on an emulated 64-bit ARM processor with those on this machine.

    .venv/bin/python benchmarks/arm64.py artifacts/runs/quickstart/latest

ONNX Runtime uses different kernels on ARM. Every operator is compared on identical inputs, then the outputs of the
whole file. Needs `qemu-aarch64` (Debian: qemu-user) and a Python for ARM with numpy and onnxruntime, which
`benchmarks/arm64_runtime.sh` installs into the user's cache. Times under emulation do not represent a real processor.
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

from compress.cli.doctor_model import real_inputs
from compress.cli.output import Finding
from compress.formats.onnx.int8.observers import Feed, stream_activations
from compress.formats.onnx.model import find_graphs
from compress.formats.onnx.runtimes.profile import CPU, original_name, write_optimized
from compress.report.progress import ConsoleProgress
from compress.utils.errors import CompressError, StageError

_EXAMPLES = 4
_PERTURBATION = 1 + 1e-6
_MAX_AMPLIFICATION = 3
_ROW_SCALES_ADVICE = (
    "on ARM with SME, ONNX Runtime uses one scale per row, here one per batch: the outputs differ and are closer to "
    "float; `onnx_int8: {method: static}` gives the same outputs everywhere"
)
_NEGLIGIBLE = 1e-3
"""Negligible difference of outputs, relative to their root mean square."""
_NOISE = 1e-4
"""Relative error of a float operator that a different summation order explains."""
_EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
_PYTHON = "root/usr/bin/python3.13"
NEWEST, OLD = "max", "cortex-a72"
"""qemu processor names: with 8-bit matrix products and SME; without dot products."""
_SECONDS = 1800.0
_RUN = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
if sys.argv[4] == "unoptimized":
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
inputs = np.load(sys.argv[2])
names = [value.name for value in session.get_outputs()]
results = {}
for batch in range(int(sys.argv[5])):
    outputs = session.run(names, {value.name: inputs[f"{batch}:{value.name}"] for value in session.get_inputs()})
    results.update({f"{batch}:{index}": output for index, output in enumerate(outputs)})
np.savez(sys.argv[3], **results)
"""


def main(
    model: Annotated[Path, typer.Argument(help="Run folder or ONNX model.")],
    recipe: Annotated[Path | None, typer.Option(help="Recipe. Default: the recipe.yaml next to the model.")] = None,
) -> None:
    """Compare the outputs of ONNX Runtime's ARM kernels, per operator and for the whole file."""
    arm = find_emulated_arm()
    if isinstance(arm, str):
        raise SystemExit(arm)
    try:
        folder, feeds = real_inputs(model, recipe, ConsoleProgress())
        if feeds is None:
            raise SystemExit("specify --recipe, which provides real inputs")
        for graph, graph_feeds in zip(find_graphs(folder), feeds, strict=True):
            for finding in arm_findings(graph, graph_feeds, arm):
                typer.echo("\n  -> ".join(filter(None, (f"{graph.name}: {finding.what}", finding.advice))))
    except CompressError as error:
        raise SystemExit(str(error)) from None


def arm_findings(graph: Path, feeds: Sequence[Feed], arm: EmulatedArm) -> Iterator[Finding]:
    """Yield the findings on the operators of ``graph`` and on the whole file."""
    with tempfile.TemporaryDirectory(prefix="compress-arm-") as folder:
        portable = onnx.load(write_optimized(graph, Path(folder), 1, portable=True))
    isolated = isolate_nodes(portable, feeds[0])
    (arm_outputs,) = arm.run(isolated.graph, [isolated.feed], optimize=False)
    yield _operators(isolated, differing_operators(isolated, host_outputs(isolated), arm_outputs))
    yield _whole(onnx.load(graph), feeds[:_EXAMPLES], arm)


@dataclass(frozen=True)
class EmulatedArm:
    """An installed emulator, the folder of its Python, and the emulated processor."""

    emulator: str
    home: Path
    processor: str = NEWEST

    def run(self, graph: onnx.ModelProto, feeds: Sequence[Feed], optimize: bool) -> list[dict[str, np.ndarray]]:
        """Return all outputs of ``graph`` by name, for each of ``feeds``.

        Raises `StageError` if the process fails or exceeds half an hour.
        """
        with tempfile.TemporaryDirectory(prefix="compress-arm-") as folder:
            work_folder = Path(folder)
            onnx.save(graph, work_folder / "model.onnx")
            inputs = {f"{batch}:{name}": array for batch, feed in enumerate(feeds) for name, array in feed.items()}
            np.savez(work_folder / "inputs.npz", **inputs)  # type: ignore[arg-type]
            self._start(work_folder, "optimized" if optimize else "unoptimized", len(feeds))
            with np.load(work_folder / "outputs.npz") as outputs:
                names = [value.name for value in graph.graph.output]
                return [
                    {name: outputs[f"{batch}:{index}"] for index, name in enumerate(names)}
                    for batch in range(len(feeds))
                ]

    def python(self) -> tuple[list[str], dict[str, str]]:
        """Return the command of the emulated Python, and its environment."""
        command = [self.emulator, "-cpu", self.processor, "-L", str(self.home / "root"), str(self.home / _PYTHON)]
        return command, {"PYTHONHOME": str(self.home / "root" / "usr"), "PYTHONPATH": str(self.home / "site")}

    def _start(self, folder: Path, level: str, batches: int) -> None:
        files = [str(folder / name) for name in ("model.onnx", "inputs.npz", "outputs.npz")]
        python, environment = self.python()
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
            raise StageError(f"The emulated processor took more than {_SECONDS:.0f} s.") from error
        if done.returncode:
            last_line = done.stderr.strip().splitlines()[-1:] or ["no error message"]
            raise StageError(f"The emulated processor failed: {last_line[0]}", where=self.emulator)


def find_emulated_arm() -> EmulatedArm | str:
    """Return the emulator, or the reason why there is none."""
    emulator = next((path for name in _EMULATORS if (path := shutil.which(name))), None)
    if emulator is None:
        return "qemu-aarch64 is not on PATH (Debian: apt-get install qemu-user)"
    home = arm_home()
    if not (home / _PYTHON).is_file() or not (home / "site" / "onnxruntime").is_dir():
        return f"{home} has no ARM Python with onnxruntime (`bash benchmarks/arm64_runtime.sh` installs it)"
    return EmulatedArm(emulator, home)


def arm_home() -> Path:
    """Return the folder `compress/arm64` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return home / "compress" / "arm64"


@dataclass(frozen=True)
class IsolatedNodes:
    """A graph without edges that holds every node of another graph with separate inputs; ``nodes`` in graph order."""

    graph: onnx.ModelProto
    feed: Feed
    nodes: tuple[onnx.NodeProto, ...]


@dataclass(frozen=True)
class OperatorDifference:
    """An operator whose outputs differ on the same inputs.

    ``error`` is the root mean square of the differences divided by that of the outputs, ``share`` the proportion of
    values that differ, ``steps`` the largest difference of integers.
    """

    operator: str
    name: str
    error: float
    share: float
    steps: int | None = None

    @property
    def matters(self) -> bool:
        """Whether the difference exceeds that of another summation order."""
        return self.steps is not None or self.error > _NOISE


def isolate_nodes(graph: onnx.ModelProto, feed: Feed) -> IsolatedNodes:
    """Return a graph in which every node gets the inputs that it has for ``feed``, independently of the others.

    ``graph`` must run without further optimization, like those of `write_optimized`. Nodes with subgraphs, and those
    whose inputs cannot all be obtained as output tensors, are left out.
    """
    stored = {tensor.name for tensor in graph.graph.initializer}
    nodes = [node for node in graph.graph.node if not any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute)]
    needed_names = list(dict.fromkeys(name for node in nodes for name in node.input if name and name not in stored))
    (values,) = stream_activations(graph, needed_names, [feed])
    isolated = onnx.ModelProto()
    isolated.CopyFrom(graph)
    del isolated.graph.node[:], isolated.graph.input[:], isolated.graph.output[:], isolated.graph.value_info[:]
    given: dict[str, np.ndarray] = {}
    for index, node in enumerate(nodes):
        single_node = onnx.NodeProto()
        single_node.CopyFrom(node)
        given |= {name: values[name] for name in node.input if name in values}
        single_node.output[:] = [f"answer_{index}_{at}" if name else "" for at, name in enumerate(node.output)]
        isolated.graph.node.append(single_node)
        isolated.graph.output.extend(onnx.ValueInfoProto(name=name) for name in single_node.output if name)
    for name, array in given.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        isolated.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, array.shape))
    return IsolatedNodes(isolated, given, tuple(nodes))


def host_outputs(isolated: IsolatedNodes) -> dict[str, np.ndarray]:
    """Return all outputs on this machine, without graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(isolated.graph.SerializeToString(), options, providers=[CPU])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(isolated.feed)), strict=True))


def differing_operators(
    isolated: IsolatedNodes, host: Mapping[str, np.ndarray], arm: Mapping[str, np.ndarray]
) -> list[OperatorDifference]:
    """Return the operators whose outputs of ``isolated`` are not bitwise equal, in graph order."""
    differences = []
    for index, node in enumerate(isolated.nodes):
        names = [f"answer_{index}_{at}" for at, name in enumerate(node.output) if name]
        pairs = [(host[name], arm[name]) for name in names]
        if not all(np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f") for ours, theirs in pairs):
            differences.append(_difference(node, pairs))
    return differences


def max_difference(outputs: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> tuple[float, int]:
    """Return the largest difference relative to the root mean square, and how many outputs have the same argmax."""
    pairs = list(zip(outputs, others, strict=True))
    largest = max(float(np.abs(a - b).max() / np.sqrt(np.square(a, dtype=np.float64).mean())) for a, b in pairs)
    return largest, sum(bool((a.argmax(-1) == b.argmax(-1)).all()) for a, b in pairs)


def _difference(node: onnx.NodeProto, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> OperatorDifference:
    ours = np.concatenate([a.astype(np.float64).ravel() for a, _ in pairs])
    theirs = np.concatenate([b.astype(np.float64).ravel() for _, b in pairs])
    whole = float(np.square(ours).sum())
    error = float(np.sqrt(np.square(ours - theirs).sum() / whole)) if whole else float("inf")
    integers = all(a.dtype.kind in "iub" for a, _ in pairs)
    steps = int(np.abs(ours - theirs).max()) if integers else None
    return OperatorDifference(node.op_type, node.name, error, float((ours != theirs).mean()), steps)


def _operators(isolated: IsolatedNodes, differences: Sequence[OperatorDifference]) -> Finding:
    count = len(isolated.nodes)
    bad = [difference for difference in differences if difference.matters]
    if not bad:
        largest = max((difference.error for difference in differences), default=0.0)
        rounding = f"; {len(differences)} sum floats in another order (error {largest:.1g})" if differences else ""
        return Finding("ok", f"each of {count} operators answers as here on the same inputs{rounding}")
    first = bad[0]
    steps = f" by up to {first.steps} steps" if first.steps is not None else ""
    kinds = ", ".join(dict.fromkeys(difference.operator for difference in bad))
    return Finding(
        "warning",
        f"the first operator that departs is {first.operator} {original_name(first.name) or first.name}: "
        f"{first.share:.2%} of its output values differ{steps} on the same inputs, relative error {first.error:.1e}; "
        f"in total {len(bad)} of {count} operators depart ({kinds})",
        _ROW_SCALES_ADVICE if first.operator == "DynamicQuantizeMatMul" else None,
    )


def _whole(graph: onnx.ModelProto, feeds: Sequence[Feed], arm: EmulatedArm) -> Finding:
    """Compare the outputs of the whole file, which each machine optimizes for itself.

    Rounding to integers can amplify a last-bit difference through the layers. The finding therefore also states how
    much a change of the inputs by one millionth changes the outputs on this machine.
    """
    names = [value.name for value in graph.graph.output]
    outputs = [values[names[0]] for values in stream_activations(graph, names, feeds)]
    largest, same = max_difference(outputs, [values[names[0]] for values in arm.run(graph, feeds, optimize=True)])
    perturbed = [
        {
            name: array * array.dtype.type(_PERTURBATION) if array.dtype.kind == "f" else array
            for name, array in feed.items()
        }
        for feed in feeds
    ]
    sensitivity, _ = max_difference(
        outputs, [values[names[0]] for values in stream_activations(graph, names, perturbed)]
    )
    text = f"{names[0]} of {len(feeds)} examples differs by at most {largest:.1e} of its size"
    reference = f" (a millionth on the inputs: {sensitivity:.1e} on this machine)" if sensitivity else ""
    level: Literal["ok", "warning"] = (
        "ok" if largest <= max(_NEGLIGIBLE, _MAX_AMPLIFICATION * sensitivity) else "warning"
    )
    return Finding(level, f"{text}{reference}; the argmax is the same in {same} of them")


if __name__ == "__main__":
    typer.run(main)
