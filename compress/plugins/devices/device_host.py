"""A device as a host of timings: it receives files and the harness, and returns the whole record."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compress import __version__
from compress.benchmark.record import TimingConditions
from compress.benchmark.restarts import TimingResult, Workload
from compress.benchmark.subprocess_client import error_from_reply
from compress.formats.onnx.model import find_graphs
from compress.formats.target_profile import Target
from compress.plugins.devices.agent import BYTES_AT_ONCE
from compress.plugins.devices.connection import Connection, ConnectionLostError
from compress.plugins.devices.harness import IMPORTS
from compress.plugins.devices.inventory import Device, choose_devices, find_inventory, read_inventory
from compress.plugins.devices.replies import read_timing
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
from compress.utils.storage import digest_file

ENVIRONMENT_BYTES = 600_000_000
"""Space for an environment while pip creates it: three times the size of numpy, SciPy and ONNX Runtime."""
_SPARE_BYTES = 20_000_000
_TRIES = 3
_TOUCH_SECONDS = 30.0


@dataclass(frozen=True)
class Blob:
    """File on this machine, with the digest that names its bytes on the device."""

    file: Path
    digest: str
    size: int

    @classmethod
    def from_file(cls, file: Path) -> Blob:
        """Return the blob of a file."""
        return cls(file, digest_file(file), file.stat().st_size)


def send_blobs(
    connection: Connection, session: str, blobs: Sequence[Blob], requirements: list[str], progress: Progress
) -> int:
    """Send the blobs that the device lacks, while ``session`` waits.

    Args:
        connection: Connection to the device.
        session: Name of the session that holds the device.
        blobs: Files that the session needs.
        requirements: Requirements of the environment, for which there must be space too.
        progress: Shows the transfer.

    Returns:
        Number of bytes sent.

    Raises:
        DeviceError: The device has too little space, disappears, or receives other bytes than were sent.
    """
    by_digest = {blob.digest: blob for blob in blobs}
    probe = connection.request("probe", blobs=list(by_digest), requirements=requirements)
    missing = [blob for digest, blob in by_digest.items() if digest not in probe["present"]]
    # Raise `DeviceError` if the device has too little space.
    needed = sum(blob.size - min(blob.size, probe["parts"].get(blob.digest, 0)) for blob in missing) + _SPARE_BYTES
    needed += 0 if probe["has_environment"] else ENVIRONMENT_BYTES
    if needed > probe["free_bytes"]:
        what = "" if probe["has_environment"] else ", of which 600 MB are for an environment with ONNX Runtime"
        raise DeviceError(
            f"The device {connection.name!r} has too little room: {probe['free_bytes'] / 1e6:.0f} MB are free.",
            where=probe["cache"],
            expected=f"{needed / 1e6:.0f} MB{what}",
            hint="free some there, or name a `cache` on another disk in the inventory",
        )
    if not missing:
        return 0
    sent, touched = 0, time.monotonic()
    steps = sum(math.ceil(blob.size / BYTES_AT_ONCE) for blob in missing)
    copying = (step for blob in missing for step in _copied(connection, blob, probe["parts"], requirements))
    for step in progress.track(copying, f"Copying to {connection.name}, MB", steps):
        sent += step
        if time.monotonic() - touched > _TOUCH_SECONDS:
            connection.request("touch", session=session)
            touched = time.monotonic()
    return sent


def _copied(connection: Connection, blob: Blob, parts: dict[str, int], requirements: list[str]) -> Iterator[int]:
    """Send a blob and yield the bytes of each chunk; a lost connection is resumed where it stopped.

    Args:
        connection: Connection to the device.
        blob: File to send.
        parts: Bytes that the device already has of each blob.
        requirements: Requirements of the environment, for the probe.
    """
    tries = 0
    while tries < _TRIES:
        # What was sent last may have arrived in part.
        offset = min(parts.get(blob.digest, 0), blob.size) // BYTES_AT_ONCE * BYTES_AT_ONCE
        try:
            for reply in connection.upload(blob.file, blob.digest, offset):
                if reply.get("kept"):
                    return
                if "offset" in reply:
                    yield reply["offset"] - offset
                    offset = reply["offset"]
            parts, tries = {}, tries + 1
        except ConnectionLostError:
            parts = connection.request("probe", blobs=[blob.digest], requirements=requirements)["parts"]
    raise DeviceError(
        f"What arrives on {connection.name!r} is not what was sent, {_TRIES} times over.",
        expected="files that have the SHA-256 digests that they have here",
        hint="look for a failing disk or memory on the device",
    )


_CPU = ("onnxruntime", "CPUExecutionProvider")


@dataclass(frozen=True)
class DeviceHost:
    """Device of an inventory that lies in ``folder``, as a `compress.benchmark.restarts.BenchmarkHost`."""

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
        work: dict[str, dict[str, str]] = {"artifacts": {}}
        files: dict[str, Path] = {}
        for index, (name, path) in enumerate(workload.artifacts.items()):
            # An artifact is a folder, or a graph file in one, which comes with its external weights.
            remote, folder = f"artifacts/{index}", path if path.is_dir() else path.parent
            work["artifacts"][name] = remote if path.is_dir() else f"{remote}/{path.name}"
            for file in sorted(folder.rglob("*") if path.is_dir() else folder.glob(f"{path.name}*")):
                if file.is_file():
                    files[f"{remote}/{file.relative_to(folder).as_posix()}"] = file
        for kind, named in (("first_batches", workload.first_batches), ("all_batches", workload.all_batches)):
            work[kind] = {name: f"{kind}/{index}.npz" for index, name in enumerate(named)}
            files |= {work[kind][name]: file for name, file in named.items()}
        bench = {"work": work, "plan": asdict(workload.plan), "conditions": asdict(conditions)}
        transcribes = any(len(find_graphs(path)) > 1 for path in workload.artifacts.values())
        packages = PACKAGES + TRANSCRIPTION_PACKAGES if transcribes else PACKAGES
        result = self._measured(bench, files, packages, progress)
        if result.get("error"):
            raise error_from_reply(result["error"])
        try:
            timed = read_timing(result.get("timed") or {}, workload, conditions.batched)
        except ValueError as error:
            raise DeviceError(
                f"What {self.name!r} measured cannot be read: {error}",
                expected="the times of the models that were sent",
                hint="measure again; if it happens again, look for failing memory or disk there",
            ) from None
        versions = {"compress": __version__, **timed.environment["packages"]}
        return replace(timed, environment={**timed.environment, "packages": versions, "device": self.name})

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


def find_devices(names: Sequence[str], inventory: Path | None, folders: Sequence[Path]) -> dict[str, DeviceHost]:
    """Return devices of an inventory by name; see `compress.benchmark.restarts.find_hosts`."""
    file = find_inventory(inventory, folders)
    devices = choose_devices(read_inventory(file), names, file)
    return {name: DeviceHost(name, device, file.absolute().parent) for name, device in devices.items()}
