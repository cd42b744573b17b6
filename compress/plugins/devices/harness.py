"""The harness on a device: the same launches as here, in the environment that was made for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from compress.benchmark.host import LOCAL_HOST, TimingResult
from compress.benchmark.record import TimingConditions
from compress.benchmark.restarts import Workload
from compress.benchmark.rpc import error_reply
from compress.benchmark.workloads.calls import CallPlan
from compress.benchmark.workloads.text_generation import TextGenerationPlan
from compress.formats.target_profile import Target
from compress.plugins.devices.agent import ORDER, RESULT, write
from compress.plugins.devices.bootstrap import FILES, is_alone, tell
from compress.utils.errors import CompressError
from compress.utils.progress import Total, expected_steps

Item = TypeVar("Item")
IMPORTS = (
    "compress.plugins.devices.harness",
    "compress.benchmark.worker",
    "compress.formats.onnx.runtimes.onnxruntime",
)
"""What an environment must be able to import before it is used."""


class LineProgress:
    """Progress as lines of a file that the near end follows; ends the session when nobody does any more."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items``, a line after each."""
        for done, item in enumerate(items, 1):
            yield item
            tell(self._folder, {"done": done, "total": expected_steps(total)})
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


def _timed(asked: dict[str, Any], folder: Path) -> TimingResult:
    conditions = TimingConditions(**{**asked["conditions"], "target": Target(**asked["conditions"]["target"])})
    plan = (TextGenerationPlan if "contexts" in asked["plan"] else CallPlan)(**asked["plan"])
    workload = Workload(**{kind: _paths(places, folder) for kind, places in asked["work"].items()}, plan=plan)
    return LOCAL_HOST.time(workload, conditions, LineProgress(folder))


def _paths(places: dict[str, str], folder: Path) -> dict[str, Path]:
    return {name: folder / FILES / place for name, place in places.items()}
