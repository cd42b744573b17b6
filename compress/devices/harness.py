"""The harness on a device: the same launches as here, in the environment that was made for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from compress.bench.call_plan import CallPlan
from compress.bench.launches import Workload
from compress.bench.place import HERE, Timed
from compress.bench.record import Conditions
from compress.bench.service import error_reply
from compress.bench.text_plan import TextPlan
from compress.devices.agent import ORDER, RESULT, write
from compress.devices.bootstrap import FILES, is_alone, tell
from compress.errors import CompressError
from compress.progress import Total, steps_of
from compress.targets import Target

Item = TypeVar("Item")
IMPORTS = ("compress.devices.harness", "compress.bench.worker", "compress.formats.onnx.runtimes.onnxruntime")
"""What an environment must be able to import before it is used."""


class LineProgress:
    """Progress as lines of a file that the near end follows; ends the session when nobody does any more."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items``, a line after each."""
        for done, item in enumerate(items, 1):
            yield item
            tell(self._folder, {"done": done, "total": steps_of(total)})
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


def _timed(asked: dict[str, Any], folder: Path) -> Timed:
    conditions = Conditions(**{**asked["conditions"], "target": Target(**asked["conditions"]["target"])})
    plan = (TextPlan if "contexts" in asked["plan"] else CallPlan)(**asked["plan"])
    workload = Workload(**{kind: _paths(places, folder) for kind, places in asked["work"].items()}, plan=plan)
    return HERE.time(workload, conditions, LineProgress(folder))


def _paths(places: dict[str, str], folder: Path) -> dict[str, Path]:
    return {name: folder / FILES / place for name, place in places.items()}
