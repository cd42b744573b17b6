"""Session on a device as this machine sees it: it is begun, supplied with files, followed, and always ended."""

from __future__ import annotations

import getpass
import socket
import uuid
import zipfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress.benchmark.restarts import PROGRESS_LABEL
from compress.plugins.devices.connection import Connection, ConnectionLostError
from compress.utils.errors import DeviceError
from compress.utils.progress import Progress

PACKAGES = ("numpy", "onnxruntime", "psutil", "scipy")
"""Packages that the harness and ONNX Runtime import; neither torch nor transformers are among them."""
TRANSCRIPTION_PACKAGES = ("tokenizers",)
"""Packages that convert the tokens of a recording to text."""
PROGRAM = (
    "__init__.py",
    *("plugins/__init__.py", "plugins/devices/__init__.py"),
    *("plugins/devices/agent.py", "plugins/devices/bootstrap.py"),
)
"""Modules with which a session begins, before the archive of the package has arrived."""
_ROOT = Path(__file__).parents[2]
_BUILDS = {"onnxruntime": "onnxruntime-gpu"}
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_archive(place: Path) -> None:
    """Write every module of the package into an archive that has the same bytes for the same modules."""
    with zipfile.ZipFile(place, "w") as archive:
        for file in sorted(_ROOT.rglob("*.py")):
            entry = zipfile.ZipInfo(f"{_ROOT.name}/{file.relative_to(_ROOT).as_posix()}", _EPOCH)
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)


def bootstrap_program() -> dict[str, str]:
    """Return the text of the modules of `PROGRAM` by their paths."""
    return {f"{_ROOT.name}/{path}": (_ROOT / path).read_text(encoding="utf-8") for path in PROGRAM}


def requirements(packages: tuple[str, ...]) -> list[str]:
    """Return the packages in the versions that are installed here, so that both machines measure the same."""
    pinned = []
    for name in packages:
        # A build with another name may replace a package.
        try:
            pinned.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            pinned.append(f"{name}=={version(_BUILDS[name])}")
    return pinned


_SILENT_ENDS = 5
"""Number of times in a row that the agent may end without a reply before this is an error and not a lost connection."""


@contextmanager
def open_session(connection: Connection) -> Iterator[str]:
    """Yield the name of a session that holds the device until it ends. Raises `DeviceError` if another one holds it."""
    name = uuid.uuid4().hex
    who, since = f"{getpass.getuser()}@{socket.gethostname()}", datetime.now(UTC).isoformat(timespec="seconds")
    try:
        answer = connection.request("begin", session=name, who=who, since=since, program=bootstrap_program())
        if answer["holder"] is not None:
            raise busy_error(connection.name, answer["holder"])
        yield name
    finally:
        connection.try_request("end", session=name)


def busy_error(name: str, holder: dict[str, Any]) -> DeviceError:
    """Return the error for a device that another session holds."""
    return DeviceError(
        f"The device {name!r} is taken: {holder['who']} has been measuring there since {holder['since']}.",
        expected="one bench at a time, since two would disturb each other",
        hint="wait until that one is done",
    )


def follow_session(connection: Connection, session: str, launches: int, progress: Progress) -> dict[str, Any]:
    """Show the launches as they are made, and return the session's result.

    Args:
        connection: Connection to the device.
        session: Name of the session.
        launches: Number of launches, for the progress.
        progress: Shows the launches.

    Returns:
        The result that the harness wrote.

    Raises:
        DeviceError: The session ends without a result, or the device disappears.
    """
    last: dict[str, Any] = {}
    steps = _steps(connection, session, progress, last)
    deque(progress.track(steps, f"{PROGRESS_LABEL} on {connection.name}", launches), maxlen=0)
    result: dict[str, Any] | None = last.get("result")
    if result is None:
        words = last.get("log") or "none"
        raise DeviceError(
            f"The session on {connection.name!r} ended without a result. Its last output:\n{words}",
            expected="a device that isn't restarted meanwhile, and that has memory for the models and the harness",
        )
    if result.get("refusal"):
        raise connection.refusal_error(result["refusal"])
    return result


def _steps(connection: Connection, session: str, progress: Progress, last: dict[str, Any]) -> Iterator[int]:
    """Yield the number of each finished launch, and store the agent's last answer in ``last``."""
    offset, silent = 0, 0
    while not last:
        try:
            # A session goes on without a connection, so progress is read from where the last connection stopped.
            for line in connection.follow(session=session, offset=offset):
                silent, offset = 0, line.get("offset", offset)
                if "note" in line:
                    progress.note(f"{connection.name}: {line['note']}")
                if "done" in line:
                    yield line["done"]
                if line.get("ended"):
                    last.update(line)
        except ConnectionLostError as lost:
            silent += 1
            if silent == _SILENT_ENDS:
                raise DeviceError(f"The agent on {connection.name!r} ends again and again: {lost}") from None
            progress.note(f"{connection.name}: {lost}; connecting again, the session goes on meanwhile")
            connection.request("touch", session=session)
