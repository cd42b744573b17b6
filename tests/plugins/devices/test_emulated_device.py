"""A device with another processor: 64-bit ARM under qemu-user, behind a real SSH server, beside this very machine.

It needs what `benchmarks/arm64_runtime.sh` fetches, and a kernel that hands ARM programs to qemu (Debian:
qemu-user-binfmt). pip works there as on any device, only on an emulated processor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from arm64 import arm_home
from loopback_sshd import Server, find_binary, running
from onnx_graphs import make_examples, write_classifier

from compress.benchmark.host import BenchmarkHost
from compress.benchmark.session import BenchmarkResult, measure_side_by_side
from compress.cli.bench_hosts import bench_on_hosts
from compress.formats.targets import TARGETS
from compress.plugins.devices.device_host import DeviceHost
from compress.recipe.recipe import Benchmark
from compress.utils.progress import Progress

BINFMT = Path("/proc/sys/fs/binfmt_misc/qemu-aarch64")
PYTHON = arm_home() / "root" / "usr" / "bin" / "python3.13"
QUICK = Benchmark(threads=1, batched=False, seconds=0.5, examples=20, launches=2)


@pytest.fixture
def arm_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server whose sessions find the libraries of ARM programs."""
    binary = find_binary()
    if binary is None:
        pytest.skip("no sshd here (Debian: openssh-server)")
    if not BINFMT.exists():
        pytest.skip("the kernel does not hand ARM programs to qemu (Debian: qemu-user-binfmt)")
    if not (PYTHON.parents[1] / "lib" / "python3.13" / "ensurepip").is_dir():
        pytest.skip("no Python for ARM with venv (bash benchmarks/arm64_runtime.sh fetches one)")
    monkeypatch.setenv("QEMU_LD_PREFIX", str(arm_home() / "root"))
    folder = tmp_path / "sshd"
    folder.mkdir()
    with running(binary, folder) as server:
        yield server


@pytest.mark.slow
def test_an_emulated_board_and_this_machine_are_benched_at_once(arm_server: Server, tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "model", width=64, layers=4)
    devices = {
        "here": arm_server.device(tmp_path / "here"),
        "board": arm_server.device(tmp_path / "there", python=str(PYTHON)),
    }

    def measure(place: BenchmarkHost, progress: Progress) -> BenchmarkResult:
        examples = {"final": make_examples(20)}
        return measure_side_by_side(
            {"final": model}, examples, TARGETS["cpu"], QUICK, "final", progress, seed=0, place=place
        )

    hosts = {name: DeviceHost(name, device, arm_server.folder) for name, device in devices.items()}
    benched = bench_on_hosts(hosts, measure)

    assert benched.failures == {}
    machines = {name: result.environment["platform"].split()[-1] for name, result in benched.results.items()}
    assert machines == {"here": os.uname().machine, "board": "aarch64"}, benched.results["board"].environment
    latency = {
        name: next(row for row in result.measurements if row.metric == "latency_ms")
        for name, result in benched.results.items()
    }
    assert {row.target for row in latency.values()} == {"cpu@here", "cpu@board"}
    assert latency["board"].n == len(latency["board"].raw or ()) > 4
    assert latency["board"].value > 2 * latency["here"].value, "an emulated processor is slower"
