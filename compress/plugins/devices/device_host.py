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
from compress.benchmark.subprocess_client import error_from_reply
from compress.formats.onnx.model import find_graphs
from compress.formats.target_profile import Target
from compress.plugins.devices.blobs import Blob, send_blobs
from compress.plugins.devices.connection import Connection
from compress.plugins.devices.harness import IMPORTS
from compress.plugins.devices.inventory import Device, choose_devices, find_inventory, read_inventory
from compress.plugins.devices.session import (
    PACKAGES,
    TRANSCRIPTION_PACKAGES,
    follow_session,
    open_session,
    requirements,
    write_archive,
)
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
        """See `BenchmarkHost.target`; the target is called for example `cpu@pi`."""
        return replace(target, name=f"{target.name}@{self.name}")

    def why_unavailable(self, target: Target) -> str | None:
        """See `BenchmarkHost.why_unavailable`. Nothing is connected for it."""
        if (target.runtime, target.provider) != _CPU:
            return f"devices are measured with ONNX Runtime on their processor, {self.name!r} too: `--target cpu`"
        return None

    def time(self, workload: Workload, conditions: TimingConditions, progress: Progress) -> TimingResult:
        """See `BenchmarkHost.time`. Raises `DeviceError` too."""
        places = {name: f"artifacts/{index}" for index, name in enumerate(workload.artifacts)}
        # The path of each artifact on the device: a folder, or a file in one.
        files, entries = (
            dict(_files(workload.artifacts, places)),
            {
                name: places[name] if path.is_dir() else f"{places[name]}/{path.name}"
                for name, path in workload.artifacts.items()
            },
        )
        batches: dict[str, dict[str, str]] = {}
        for kind, named in (("first_batches", workload.first_batches), ("all_batches", workload.all_batches)):
            batches[kind] = {name: f"{kind}/{index}.npz" for index, name in enumerate(named)}
            files |= {batches[kind][name]: file for name, file in named.items()}
        bench = {
            "work": {"artifacts": entries, **batches},
            "plan": asdict(workload.plan),
            "conditions": asdict(conditions),
        }
        transcribes = any(len(find_graphs(path)) > 1 for path in workload.artifacts.values())
        packages = PACKAGES + TRANSCRIPTION_PACKAGES if transcribes else PACKAGES
        return self._timed(self._measured(bench, files, packages, progress))

    def _measured(
        self, bench: dict[str, Any], files: Mapping[str, Path], packages: tuple[str, ...], progress: Progress
    ) -> dict[str, Any]:
        """Return the harness's result.

        The session takes the device before any file is sent, since a transfer would disturb a running benchmark.
        """
        with (
            tempfile.TemporaryDirectory(prefix="compress-device-") as scratch,
            Connection(self.name, self.device, self.folder, self.patience_seconds) as connection,
            open_session(connection) as session,
        ):
            write_archive(Path(scratch) / "code.zip")
            archive = Blob.from_file(Path(scratch) / "code.zip")
            blobs = {path: Blob.from_file(file) for path, file in files.items()}
            pinned = requirements(packages)
            order = {
                "code": archive.digest,
                "files": {path: blob.digest for path, blob in blobs.items()},
                "requirements": pinned,
                "imports": list(IMPORTS),
                "bench": bench,
            }
            send_blobs(connection, session, [archive, *blobs.values()], pinned, progress)
            connection.request("order", session=session, order=order)
            return follow_session(connection, session, 2 * bench["conditions"]["launches"], progress)

    def _timed(self, result: dict[str, Any]) -> TimingResult:
        """Return the harness's result as timings. Raises the error that it reports."""
        if "error" in result:
            raise error_from_reply(result["error"])
        timings = result["timed"]
        try:
            record = TypeAdapter(TimingRecord).validate_python(timings["record"])
        except ValidationError as error:
            raise DeviceError(f"What {self.name!r} measured cannot be read: {error.errors()[0]}") from None
        packages = {"compress": __version__, **timings["environment"]["packages"]}
        environment = {**timings["environment"], "packages": packages, "device": self.name}
        return TimingResult(record, timings["precision"], tuple(timings["cores"]), timings["load"], environment)


def find_devices(names: Sequence[str], inventory: Path | None, folders: Sequence[Path]) -> dict[str, DeviceHost]:
    """Return devices of an inventory by name; see `compress.benchmark.host.find_hosts`."""
    file = find_inventory(inventory, folders)
    devices = choose_devices(read_inventory(file), names, file)
    return {name: DeviceHost(name, device, file.absolute().parent) for name, device in devices.items()}


def _files(artifacts: Mapping[str, Path], places: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """Yield the files of each artifact with the paths that they get; a graph file comes with its external weights."""
    for name, path in artifacts.items():
        folder = path if path.is_dir() else path.parent
        for file in sorted(folder.rglob("*") if path.is_dir() else folder.glob(f"{path.name}*")):
            if file.is_file():
                yield f"{places[name]}/{file.relative_to(folder).as_posix()}", file
