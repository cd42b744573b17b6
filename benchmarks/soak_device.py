"""A device whose connections are lost and that returns wrong data, by a real SSH server on this machine.

The command `device` of `benchmarks/soak.py`. Every benchmark ends with a result or with an error about the device.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from fuzzing.values import mutate_json
from loopback_sshd import Server, find_binary, running
from soak_page import Write, show

from compress.benchmark.restarts import LOCAL_HOST, BenchmarkHost, TimingResult
from compress.benchmark.session import measure_side_by_side
from compress.formats.targets import TARGETS
from compress.plugins.devices.device_host import DeviceHost
from compress.plugins.devices.inventory import Device
from compress.plugins.devices.replies import read_reply
from compress.recipe.recipe import Benchmark
from compress.utils.errors import CompressError, DeviceError
from compress.utils.progress import SilentProgress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.tasks.task import Examples

SETTINGS = Benchmark(threads=1, batch_size=8, seconds=0.2, examples=40, launches=2)
_DEVICE = Device(
    host="127.0.0.1",
    user="nobody",
    key="none",
    host_key="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFw8Wo1fcPJ2YaQh39pku1En4bRAAAtI4N1kUcftxxsl",
)


@dataclass(frozen=True)
class LyingHost(DeviceHost):
    """Device that measures truthfully once, on this machine, and then returns changed results.

    ``change`` receives the bytes of the true result, and returns those that the device sends.
    """

    change: Callable[[bytes], bytes] = bytes
    truth: list[bytes] = field(default_factory=list)

    def time(self, workload: Any, conditions: Any, progress: Any) -> TimingResult:
        """Measure here the first time."""
        if not self.truth:
            timed = LOCAL_HOST.time(workload, conditions, progress)
            self.truth.append(json.dumps({"timed": asdict(timed)}).encode())
        return super().time(workload, conditions, progress)

    def _measured(self, *_: object) -> dict[str, Any]:
        try:
            reply = read_reply(b'{"ended": true, "result": ' + self.change(self.truth[0]) + b"}")
        except ValueError as error:
            raise DeviceError(str(error)) from None
        if reply is None or reply.get("result") is None:
            raise DeviceError("no result")
        result: dict[str, Any] = reply["result"]
        return result


def write_model(folder: Path, width: int) -> Path:
    """Write the graph of a small classifier, and return its folder."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).normal(size=(64, width)).astype(np.float32)
    tables = {"table": weights, "head": weights[:2].T.copy()}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("ReduceMean", ["rows", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "head"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])]
    constants = [numpy_helper.from_array(values, name) for name, values in tables.items()]
    constants.append(numpy_helper.from_array(np.array([1], dtype=np.int64), "axes"))
    graph = helper.make_graph(nodes, "small", inputs, outputs, constants)
    (folder / "onnx").mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "onnx" / "model.onnx")
    return folder


def bench(folder: Path, host: BenchmarkHost, examples: Examples, seed: int = 1) -> None:
    """Time two small models on a host. Their folders are made once."""
    models = {name: folder / name for name in ("baseline", "final")}
    for width, path in zip((64, 8), models.values(), strict=True):
        if not path.exists():
            write_model(path, width)
    target, progress = TARGETS["cpu"], SilentProgress()
    measure_side_by_side(
        models, dict.fromkeys(models, examples), target, SETTINGS, "baseline", progress, seed=seed, host=host
    )


def lie(folder: Path, examples: Examples, mutations: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Mutate the result of a device. Return how the benchmarks ended, and those that ended with another error."""
    chance, ends, problems = random.Random(seed), Counter[str](), list[str]()
    truthful = LyingHost("loop", _DEVICE, folder)
    bench(folder, truthful, examples)
    for number in range(mutations):
        host = replace(truthful, change=lambda truth: mutate_json(chance, truth, [truth]))
        try:
            bench(folder, host, examples)
            ends["a result"] += 1
        except CompressError as error:
            ends[type(error).__name__] += 1
        except Exception as error:  # noqa: BLE001, these are what is looked for
            problems.append(f"mutation {number}: {type(error).__name__}: {error}")
    return ends, problems


@contextmanager
def losing_connections(server: Server, chance: random.Random) -> Iterator[list[int]]:
    """Drop all connections of a server now and then, and yield the numbers of those dropped."""
    dropped, done = list[int](), threading.Event()

    def drop() -> None:
        while not done.wait(chance.uniform(0.3, 3.0)):
            dropped.append(server.drop_connections())

    thread = threading.Thread(target=drop)
    thread.start()
    try:
        yield dropped
    finally:
        done.set()
        thread.join()


def device(
    benches: Annotated[int, typer.Option(help="Benchmarks with lost connections.")] = 20,
    mutations: Annotated[int, typer.Option(help="Results that are changed.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of moments and changes.")] = 1,
    write: Write = False,
) -> None:
    """Lose connections and change results. Exit code 1: another end than a result or an error about the device."""
    if (binary := find_binary()) is None:
        raise typer.BadParameter("sshd is not installed (Debian package openssh-server)")
    ends, began = Counter[str](), time.monotonic()
    examples = make_examples(60)
    with tempfile.TemporaryDirectory(prefix="soak-device-") as name:
        folder = Path(name)
        mutated, problems = lie(folder, examples, mutations, seed)
        (folder / "sshd").mkdir()
        with running(binary, folder / "sshd") as server:
            cache = folder / "cache"
            host = DeviceHost("loop", server.device(cache), server.folder)
            # Create the environment undisturbed.
            bench(folder, host, examples)
            with losing_connections(server, random.Random(seed)) as dropped:
                for number in range(benches):
                    try:
                        bench(folder, host, examples, seed=number)
                        ends["a result"] += 1
                    except DeviceError as error:
                        ends[f"DeviceError: {error.what}"] += 1
            bench(folder, host, examples, seed=benches)
        # A session whose end was lost removes itself after five minutes of silence.
        left = [path.name for path in (cache / "blobs").glob("*.part")]
    problems += [f"left on the device: {name}" for name in left]
    for line in (*ends, str(dict(mutated)), *problems):
        typer.echo(line, file=sys.stderr)
    rows = [
        ["benchmarks; lost connections", f"{benches}; {sum(dropped)}", ""],
        ["of them with a result", str(ends["a result"]), f"{benches}"],
        ["changed results; of them refused", f"{mutations}; {mutated.total() - mutated['a result']}", ""],
        ["tracebacks, and files left half-written", str(len(problems)), "0"],
        ["minutes", f"{(time.monotonic() - began) / 60:.0f}", ""],
    ]
    show("A device that fails and lies", f"python benchmarks/soak.py device --seed {seed} --write", rows, write)
    if problems:
        raise typer.Exit(1)


def make_examples(count: int) -> Examples:
    """Return token sequences of different lengths."""
    from compress.tasks.task import Examples

    generator = np.random.default_rng(0)
    inputs = [{"input_ids": generator.integers(1, 64, length)} for length in generator.integers(4, 16, count)]
    return Examples(inputs=inputs, padding={"input_ids": 0})
