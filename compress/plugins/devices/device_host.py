"""A device as a host of timings: it receives files and the harness, and returns the whole record."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from compress import __version__
from compress.benchmark.host import TimingResult
from compress.benchmark.record import TimingConditions, TimingRecord
from compress.benchmark.restarts import Workload
from compress.benchmark.rpc import error_from_reply
from compress.formats.onnx.model import find_graphs
from compress.formats.target_profile import Target
from compress.plugins.devices.blobs import Blob, send_blobs
from compress.plugins.devices.connection import Connection
from compress.plugins.devices.harness import IMPORTS
from compress.plugins.devices.inventory import Device, choose_devices, find_inventory, read_inventory
from compress.plugins.devices.session import PACKAGES, TRANSCRIBING, begun, followed, requirements, write_archive
from compress.utils.errors import DeviceError
from compress.utils.progress import Progress

_CPU = ("onnxruntime", "CPUExecutionProvider")


@dataclass(frozen=True)
class DeviceHost:
    """Device of an inventory that lies in ``folder``, as a `compress.benchmark.host.BenchmarkHost`."""

    name: str
    device: Device
    folder: Path
    patience_seconds: float = 120.0

    def target(self, target: Target) -> Target:
        """See `LaunchHost.target`: `cpu@pi`."""
        return replace(target, name=f"{target.name}@{self.name}")

    def why_unavailable(self, target: Target) -> str | None:
        """See `LaunchHost.why_unavailable`; whether the device answers shows when it is asked."""
        if (target.runtime, target.provider) != _CPU:
            return f"devices are measured with ONNX Runtime on their processor, {self.name!r} too: `--target cpu`"
        return None

    def time(self, workload: Workload, conditions: TimingConditions, progress: Progress) -> TimingResult:
        """See `LaunchHost.time`. Raises `DeviceError` too."""
        places = {name: f"artifacts/{at}" for at, name in enumerate(workload.artifacts)}
        files, entries = dict(_files(workload.artifacts, places)), _entries(workload.artifacts, places)
        batches: dict[str, dict[str, str]] = {}
        for kind, named in (("first_batches", workload.first_batches), ("all_batches", workload.all_batches)):
            batches[kind] = {name: f"{kind}/{at}.npz" for at, name in enumerate(named)}
            files |= {batches[kind][name]: file for name, file in named.items()}
        bench = {
            "work": {"artifacts": entries, **batches},
            "plan": asdict(workload.plan),
            "conditions": asdict(conditions),
        }
        transcribes = any(len(find_graphs(path)) > 1 for path in workload.artifacts.values())
        packages = PACKAGES + TRANSCRIBING if transcribes else PACKAGES
        return self._timed(self._measured(bench, files, packages, progress))

    def _measured(
        self, bench: dict[str, Any], files: Mapping[str, Path], packages: tuple[str, ...], progress: Progress
    ) -> dict[str, Any]:
        """The harness's result. The device is taken before anything is sent, since that would disturb a bench."""
        with (
            tempfile.TemporaryDirectory(prefix="compress-device-") as scratch,
            Connection(self.name, self.device, self.folder, self.patience_seconds) as connection,
            begun(connection) as session,
        ):
            write_archive(Path(scratch) / "code.zip")
            archive = Blob.of(Path(scratch) / "code.zip")
            blobs = {path: Blob.of(file) for path, file in files.items()}
            wanted = requirements(packages)
            order = {
                "code": archive.digest,
                "files": {path: blob.digest for path, blob in blobs.items()},
                "requirements": wanted,
                "imports": list(IMPORTS),
                "bench": bench,
            }
            send_blobs(connection, session, [archive, *blobs.values()], wanted, progress)
            connection.ask("order", session=session, order=order)
            return followed(connection, session, 2 * bench["conditions"]["launches"], progress)

    def _timed(self, result: dict[str, Any]) -> TimingResult:
        if "error" in result:
            raise error_from_reply(result["error"])
        told = result["timed"]
        try:
            record = TypeAdapter(TimingRecord).validate_python(told["record"])
        except ValidationError as error:
            raise DeviceError(f"What {self.name!r} measured cannot be read: {error.errors()[0]}") from None
        packages = {"compress": __version__, **told["environment"]["packages"]}
        environment = {**told["environment"], "packages": packages, "device": self.name}
        return TimingResult(record, told["precision"], tuple(told["cores"]), told["load"], environment)


def find_devices(names: Sequence[str], inventory: Path | None, folders: Sequence[Path]) -> dict[str, DeviceHost]:
    """Return devices of an inventory by name; see `compress.benchmark.host.find_hosts`."""
    file = find_inventory(inventory, folders)
    devices = choose_devices(read_inventory(file), names, file)
    return {name: DeviceHost(name, device, file.absolute().parent) for name, device in devices.items()}


def _files(artifacts: Mapping[str, Path], places: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """The files of each artifact by the path that each gets; of a graph file, itself and its weights beside it."""
    for name, path in artifacts.items():
        folder = path if path.is_dir() else path.parent
        for file in sorted(folder.rglob("*") if path.is_dir() else folder.glob(f"{path.name}*")):
            if file.is_file():
                yield f"{places[name]}/{file.relative_to(folder).as_posix()}", file


def _entries(artifacts: Mapping[str, Path], places: Mapping[str, str]) -> dict[str, str]:
    """Where each artifact itself lies: a folder, or a file in one."""
    return {name: places[name] if path.is_dir() else f"{places[name]}/{path.name}" for name, path in artifacts.items()}
