from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress.benchmark.host import BenchmarkHost
from compress.benchmark.session import BenchmarkResult
from compress.cli import app
from compress.cli.bench import show_outcome
from compress.cli.bench_hosts import bench_on_hosts, choose_hosts
from compress.formats.targets import TARGETS
from compress.utils.errors import DeviceError, InputError
from compress.utils.progress import Progress

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFw8Wo1fcPJ2YaQh39pku1En4bRAAAtI4N1kUcftxxsl"


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    """Two devices at a port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    device = f'{{host: 127.0.0.1, port: {port}, user: nobody, key: key, host_key: "{KEY}"}}'
    (tmp_path / "devices.yaml").write_text(f"devices: {{one: {device}, two: {device}}}\n")
    return tmp_path / "devices.yaml"


def test_devices_that_do_not_answer_are_listed_with_the_reason(
    inventory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inventory.parent)
    done = CliRunner().invoke(app, ["devices", "--json"])
    assert done.exit_code == 3
    rows = json.loads(done.stdout)
    assert [(row["name"], row["answers"]) for row in rows] == [("one", False), ("two", False)]
    assert "private key cannot be read" in rows[0]["state"]
    output = CliRunner().invoke(app, ["devices", "two", "--inventory", str(inventory)]).stdout
    assert output.startswith("two  nobody@127.0.0.1, port")


def test_an_unknown_device_and_an_inventory_for_nothing_are_refused(inventory: Path) -> None:
    with pytest.raises(InputError, match="There is no device 'tow'"):
        CliRunner().invoke(app, ["devices", "tow", "--inventory", str(inventory)], catch_exceptions=False)
    command = ["bench", "model", "--context", "4", "--inventory", str(inventory)]
    with pytest.raises(InputError, match="--inventory without --device"):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_devices_measure_at_once_and_one_that_fails_keeps_no_other_from_its_result(
    inventory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert answer["devices"] == {
        "two": {"measurements": [], "notes": ["noise of cpu@two"], "environment": {"device": "cpu@two"}}
    }
    assert answer["failed"] == {"one": "The device 'one' went away."}
