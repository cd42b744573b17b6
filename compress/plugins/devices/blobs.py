"""Transfer of files to a device: only missing ones, continued where an earlier transfer stopped, and verified."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.plugins.devices.agent import BYTES_AT_ONCE
from compress.plugins.devices.connection import Connection, ConnectionLostError
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
    if not probe["has_environment"]:
        needed += ENVIRONMENT_BYTES
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
