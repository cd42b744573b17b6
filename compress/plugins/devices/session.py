"""The near end of a session on a device: begun, supplied, followed, and ended whatever happens."""

from __future__ import annotations

import getpass
import socket
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress.benchmark.host import PROGRESS_LABEL
from compress.plugins.devices.connection import Connection, LostError, plain
from compress.utils.errors import DeviceError
from compress.utils.progress import Progress

PACKAGES = ("numpy", "onnxruntime", "psutil", "scipy")
"""What the launches and ONNX Runtime import; neither torch nor transformers."""
TRANSCRIBING = ("tokenizers",)
"""And what turns a recording's tokens into text."""
PROGRAM = (
    "__init__.py",
    *("plugins/__init__.py", "plugins/devices/__init__.py"),
    *("plugins/devices/agent.py", "plugins/devices/bootstrap.py"),
)
"""What a session begins with, before the archive is there."""
_ROOT = Path(__file__).parents[2]
_BUILDS = {"onnxruntime": "onnxruntime-gpu"}
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_archive(place: Path) -> None:
    """Write every module of the package, in an archive that has the same bytes for the same modules."""
    with zipfile.ZipFile(place, "w") as archive:
        for file in sorted(_ROOT.rglob("*.py")):
            entry = zipfile.ZipInfo(f"{_ROOT.name}/{file.relative_to(_ROOT).as_posix()}", _EPOCH)
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)


def program() -> dict[str, str]:
    """The modules of `PROGRAM` by their paths."""
    return {f"{_ROOT.name}/{path}": (_ROOT / path).read_text(encoding="utf-8") for path in PROGRAM}


def requirements(packages: tuple[str, ...]) -> list[str]:
    """Each at the version that is installed here, so that both measure the same."""
    return [f"{name}=={_version(name)}" for name in packages]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return version(_BUILDS[name])


_SILENT_ENDS = 5
"""The agent may end so often in a row without a word before that is an error and no lost connection."""


@contextmanager
def begun(connection: Connection) -> Iterator[str]:
    """A session's name; the device is taken until it ends. Raises `DeviceError` where somebody else has it."""
    name = uuid.uuid4().hex
    who, since = f"{getpass.getuser()}@{socket.gethostname()}", datetime.now(UTC).isoformat(timespec="seconds")
    try:
        answer = connection.ask("begin", session=name, who=who, since=since, program=program())
        if answer["holder"] is not None:
            raise busy(connection.name, answer["holder"])
        yield name
    finally:
        connection.farewell("end", session=name)


def busy(name: str, holder: dict[str, Any]) -> DeviceError:
    """That somebody measures there."""
    who, since = plain(holder["who"]), plain(holder["since"])
    return DeviceError(
        f"The device {name!r} is taken: {who} has been measuring there since {since}.",
        expected="one bench at a time, since two would disturb each other",
        hint="wait until that one is done",
    )


def followed(connection: Connection, session: str, launches: int, progress: Progress) -> dict[str, Any]:
    """Show the launches as they are made, and return the session's result.

    Raises `DeviceError` where the session ends without one, or the device goes away for good.
    """
    last: dict[str, Any] = {}
    for _ in progress.track(_steps(connection, session, progress, last), f"{PROGRESS_LABEL} on {connection.name}", launches):
        pass
    result: dict[str, Any] | None = last["result"]
    if result is None:
        words = plain(last["log"]) or "none"
        raise DeviceError(
            f"The session on {connection.name!r} ended without a result. Its last words:\n{words}",
            expected="a device that isn't restarted meanwhile, and that has memory for the models and the harness",
        )
    if "refusal" in result:
        raise connection.refused(result["refusal"])
    return result


def _steps(connection: Connection, session: str, progress: Progress, last: dict[str, Any]) -> Iterator[int]:
    """The number of each launch that is done; the agent's last answer goes into ``last``."""
    offset, silent = 0, 0
    while not last:
        try:
            for line in connection.follow(session=session, offset=offset):
                silent, offset = 0, line.get("offset", offset)
                if "note" in line:
                    progress.note(f"{connection.name}: {plain(line['note'])}")
                if "done" in line:
                    yield line["done"]
                if line.get("ended"):
                    last.update(line)
        except LostError as lost:
            silent += 1
            if silent == _SILENT_ENDS:
                raise DeviceError(f"The agent on {connection.name!r} ends again and again: {lost}") from None
            progress.note(f"{connection.name}: {lost}; connecting again, the session goes on meanwhile")
            connection.ask("touch", session=session)
