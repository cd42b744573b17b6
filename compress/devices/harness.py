"""The harness on a device: the same launches as here, in the environment that was made for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from compress.bench.generation_launches import GenerationRecord, GenerationWork
from compress.bench.place import HERE, Timed
from compress.bench.record import Conditions, Record, Workload
from compress.bench.service import error_reply
from compress.devices.agent import ORDER, RESULT, write
from compress.devices.bootstrap import FILES, is_alone, tell
from compress.errors import CompressError
from compress.targets import Target

Item = TypeVar("Item")
IMPORTS = ("compress.devices.harness", "compress.bench.worker", "compress.formats.onnx.runtimes.onnxruntime")
"""What an environment must be able to import before it is used."""


class LineProgress:
    """Progress as lines of a file that the near end follows; ends the session when nobody does any more."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def track(self, items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
        """Yield ``items``, a line after each."""
        for done, item in enumerate(items, 1):
            yield item
            tell(self._folder, {"done": done, "total": total})
            if is_alone(self._folder):
                raise SystemExit(1)

    def note(self, message: str) -> None:
        """Pass one line on."""
        tell(self._folder, {"note": message})


def main(place: str) -> None:
    """Do what the order of the session's folder asks, and leave the result beside it."""
    folder = Path(place)
    asked = json.loads((folder / ORDER).read_text(encoding="utf-8"))["bench"]
    try:
        reply: dict[str, Any] = {"timed": asdict(_timed(asked, folder))}
    except CompressError as error:
        reply = error_reply(error)
    write(folder / RESULT, reply)


def _timed(asked: dict[str, Any], folder: Path) -> Timed[Record] | Timed[GenerationRecord]:
    conditions = Conditions(**{**asked["conditions"], "target": Target(**asked["conditions"]["target"])})
    progress = LineProgress(folder)
    arguments = (conditions, asked["baseline"], asked["seconds_left"], progress)
    work = asked["work"]
    artifacts = _paths(work.pop("artifacts"), folder)
    if asked["kind"] == "time":
        first, everything = (_paths(work.pop(name), folder) for name in ("first", "all"))
        return HERE.time(Workload(artifacts=artifacts, first=first, all=everything, **work), *arguments)
    work["contexts"] = tuple(work["contexts"])
    nothing = folder / FILES / work.pop("no_batches")
    return HERE.generate(GenerationWork(artifacts=artifacts, no_batches=nothing, **work), *arguments)


def _paths(places: dict[str, str], folder: Path) -> dict[str, Path]:
    return {name: folder / FILES / place for name, place in places.items()}
