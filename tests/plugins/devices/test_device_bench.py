"""Tests of benchmarks on devices, from Python and from the command line."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from decoder_graphs import TinyDecoder
from loopback_sshd import Server
from onnx_graphs import make_examples, write_classifier
from typer.testing import CliRunner

from compress.benchmark.generation import measure_generation
from compress.benchmark.restarts import BenchmarkHost
from compress.benchmark.session import BenchmarkResult, measure_side_by_side
from compress.cli import app
from compress.cli.bench import show_outcome
from compress.cli.bench_measurement import bench_on_hosts, choose_hosts
from compress.formats.targets import TARGETS
from compress.plugins.devices.device_host import DeviceHost
from compress.plugins.devices.inventory import Device
from compress.plugins.devices.session import PACKAGES, requirements
from compress.recipe.recipe import Benchmark
from compress.utils.errors import DeviceError, InputError, ModelError, StageError
from compress.utils.progress import Progress, SilentProgress

Item = TypeVar("Item")
QUICK = Benchmark(threads=1, batch_size=8, seconds=0.2, examples=40, launches=2)


class Dropping(SilentProgress):
    """A progress that drops all connections when the environment is being created, and keeps notes."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.notes: list[str] = []
        self.copied = 0

    def note(self, message: str) -> None:
        self.notes.append(message)
        if "making an environment" in message:
            self._server.drop_connections()

    def track(self, items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
        for item in items:
            self.copied += "Copying" in description
            yield item


@pytest.fixture(scope="module")
def device(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Device:
    """Return a device with its own cache, in which pip creates the environment once."""
    return server.device(tmp_path_factory.mktemp("device") / "cache")


@pytest.mark.slow
def test_device_benchmark_returns_raw_samples(server: Server, device: Device, tmp_path: Path) -> None:
    heavy = write_classifier(tmp_path / "heavy", width=128, layers=8)
    light = write_classifier(tmp_path / "light", width=16, layers=1)
    host = DeviceHost("loop", device, server.folder)
    examples = dict.fromkeys(("baseline", "final"), make_examples(60))
    progress = Dropping(server)

    models = {"baseline": heavy, "final": light}
    result = measure_side_by_side(models, examples, TARGETS["cpu"], QUICK, "baseline", progress, seed=1, host=host)

    assert any("connecting again" in note for note in progress.notes), "the connection was cut while pip worked"
    assert {row.target for row in result.measurements} == {"cpu@loop"}
    rows = {(row.model, row.metric): row for row in result.measurements}
    for model in ("baseline", "final"):
        latency = rows[model, "latency_ms"]
        assert latency.raw is not None
        assert latency.value == np.median(latency.raw)
        assert latency.n == len(latency.raw) > 40
    assert rows["final", "speedup"].value > 2
    assert ("machine", "reference_matmul_ms") in rows
    assert result.environment["device"] == "loop"
    pinned = dict(requirement.split("==") for requirement in requirements(PACKAGES))
    packages = result.environment["packages"]
    assert (packages["numpy"], packages["onnxruntime"]) == (pinned["numpy"], pinned["onnxruntime"])
    assert "torch" not in packages
    assert result.notes[0].startswith("noise: ")

    # A second benchmark of one model sends only the batches of the new seed and creates no environment.
    again = Dropping(server)
    measure_side_by_side({"final": light}, examples, TARGETS["cpu"], QUICK, "final", again, seed=2, host=host)
    assert again.notes == []
    assert again.copied == 2

    # Errors of the harness keep their type.
    (tmp_path / "heavy" / "onnx" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match="cannot open the graph"):
        measure_side_by_side({"final": heavy}, examples, TARGETS["cpu"], QUICK, "final", again, seed=2, host=host)
    cache_folder = Path(device.cache)
    assert {path.name for path in cache_folder.iterdir()} == {"blobs", "code", "venvs", "sessions", "lock"}
    assert list((cache_folder / "sessions").iterdir()) == []


@pytest.mark.slow
def test_text_generation_on_a_device(server: Server, device: Device, tmp_path: Path) -> None:
    TinyDecoder().write(tmp_path / "small")
    TinyDecoder(width=32).write(tmp_path / "large")
    # One model is given as a file, the other as a folder.
    artifacts = {"baseline": tmp_path / "large" / "onnx" / "model.onnx", "final": tmp_path / "small"}
    settings = Benchmark(contexts=(4, 8), tokens=3, threads=1, seconds=0.1, launches=2)
    host = DeviceHost("loop", device, server.folder)
    result = measure_generation(
        artifacts, {}, TARGETS["cpu"], settings, "baseline", SilentProgress(), seed=0, host=host
    )
    rows = {(row.model, row.metric): row for row in result.measurements}
    for model in artifacts:
        for context in (4, 8):
            steps = rows[model, f"time_per_output_token_ms_context_{context}"]
            assert steps.target == "cpu@loop"
            assert steps.n == 3 * result.environment["rounds"][f"context_{context}"]
    assert result.environment["cached"] == {"baseline": True, "final": True}


def test_unsupported_device_target_is_refused(server: Server, device: Device, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "m", width=4, layers=1)
    host = DeviceHost("loop", device, server.folder)
    with pytest.raises(StageError, match="with ONNX Runtime on their processor"):
        measure_side_by_side(
            {"m": folder}, {"m": make_examples(4)}, TARGETS["gpu"], QUICK, "m", SilentProgress(), seed=1, host=host
        )


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFw8Wo1fcPJ2YaQh39pku1En4bRAAAtI4N1kUcftxxsl"


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    """Write an inventory of two devices at a port without a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    device = f'{{host: 127.0.0.1, port: {port}, user: nobody, key: key, host_key: "{KEY}"}}'
    (tmp_path / "devices.yaml").write_text(f"devices: {{one: {device}, two: {device}}}\n")
    return tmp_path / "devices.yaml"


def test_absent_devices_are_listed_with_the_reason(inventory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inventory.parent)
    done = CliRunner().invoke(app, ["devices", "--json"])
    assert done.exit_code == 3
    rows = json.loads(done.stdout)
    assert [(row["name"], row["answers"]) for row in rows] == [("one", False), ("two", False)]
    assert "private key cannot be read" in rows[0]["state"]
    output = CliRunner().invoke(app, ["devices", "two", "--inventory", str(inventory)]).stdout
    assert output.startswith("two  nobody@127.0.0.1, port")


def test_unknown_device_and_unused_inventory_are_refused(inventory: Path) -> None:
    with pytest.raises(InputError, match="There is no device 'tow'"):
        CliRunner().invoke(app, ["devices", "tow", "--inventory", str(inventory)], catch_exceptions=False)
    command = ["bench", "model", "--context", "4", "--inventory", str(inventory)]
    with pytest.raises(InputError, match="--inventory without --device"):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_devices_measure_in_parallel_although_one_fails(inventory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = choose_hosts(["all"], inventory, None)
    together = threading.Barrier(2, timeout=10)

    def measure(place: BenchmarkHost, progress: Progress) -> BenchmarkResult:
        together.wait()
        name = place.target(TARGETS["cpu"]).name
        if name == "cpu@one":
            raise DeviceError("The device 'one' went away.")
        return BenchmarkResult([], [f"noise of {name}"], {"device": name})

    benched = bench_on_hosts(hosts, measure)
    with pytest.raises(DeviceError, match="'one' went away"):
        show_outcome(benched, json_=True)
    answer = json.loads(capsys.readouterr().out)
    two = {"measurements": [], "notes": ["noise of cpu@two"], "environment": {"device": "cpu@two"}}
    assert answer["devices"]["two"].pop("isolation")["network"] is True
    assert answer["devices"] == {"two": two}
    assert answer["failed"] == {"one": "The device 'one' went away."}
