from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from decoder_graphs import TinyDecoder
from loopback_sshd import Server
from onnx_graphs import make_examples, write_classifier

from compress.benchmark.generation import measure_generation
from compress.benchmark.session import measure_side_by_side
from compress.formats.targets import TARGETS
from compress.plugins.devices.device_host import DeviceHost
from compress.plugins.devices.inventory import Device
from compress.plugins.devices.session import PACKAGES, requirements
from compress.recipe.recipe import Benchmark
from compress.utils.errors import ModelError, StageError
from compress.utils.progress import SilentProgress

Item = TypeVar("Item")
QUICK = Benchmark(threads=1, batch_size=8, seconds=0.2, examples=40, launches=2)


class Dropping(SilentProgress):
    """Cuts every connection when an environment begins to be made; keeps what was said."""

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
    """With a cache of its own, so that the environment is made by pip once."""
    return server.device(tmp_path_factory.mktemp("device") / "cache")


@pytest.mark.slow
def test_a_bench_on_a_device_brings_its_raw_samples_back(server: Server, device: Device, tmp_path: Path) -> None:
    heavy = write_classifier(tmp_path / "heavy", width=128, layers=8)
    light = write_classifier(tmp_path / "light", width=16, layers=1)
    host = DeviceHost("loop", device, server.folder)
    examples = dict.fromkeys(("baseline", "final"), make_examples(60))
    progress = Dropping(server)

    result = measure_side_by_side(
        {"baseline": heavy, "final": light}, examples, TARGETS["cpu"], QUICK, "baseline", progress, seed=1, host=host
    )

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

    # Again, with one of the two: nothing but the batches of the new seed is sent, no environment made.
    again = Dropping(server)
    measure_side_by_side({"final": light}, examples, TARGETS["cpu"], QUICK, "final", again, seed=2, host=host)
    assert again.notes == []
    assert again.copied == 2

    # What the harness refuses comes back as what it is.
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
    # A folder and a file in one.
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


def test_other_targets_are_not_had_on_devices(server: Server, device: Device, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "m", width=4, layers=1)
    host = DeviceHost("loop", device, server.folder)
    with pytest.raises(StageError, match="with ONNX Runtime on their processor"):
        measure_side_by_side(
            {"m": folder}, {"m": make_examples(4)}, TARGETS["gpu"], QUICK, "m", SilentProgress(), seed=1, host=host
        )
