"""Harness on a device: the same launches as on this machine, in the environment that was made for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from compress.benchmark.record import TimingConditions
from compress.benchmark.restarts import LOCAL_HOST, Workload
from compress.benchmark.subprocess_client import error_reply
from compress.benchmark.workloads.calls import CallPlan
from compress.benchmark.workloads.text_generation import TextGenerationPlan
from compress.formats.target_profile import Target
from compress.plugins.devices.agent import ORDER, RESULT, write_json
from compress.plugins.devices.bootstrap import FILES, append_progress, is_abandoned
from compress.utils.errors import CompressError
from compress.utils.progress import Total, expected_steps

Item = TypeVar("Item")
IMPORTS = (
    "compress.plugins.devices.harness",
    "compress.benchmark.worker",
    "compress.formats.onnx.runtimes.onnxruntime",
)
"""Modules that an environment must be able to import before it is used."""


class LineProgress:
    """Progress as lines of a file that the requesting machine follows. The session ends when nobody follows it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items``, and write a line after each."""
        for done, item in enumerate(items, 1):
            yield item
            append_progress(self._folder, {"done": done, "total": expected_steps(total)})
            if is_abandoned(self._folder):
                raise SystemExit(1)

    def note(self, message: str) -> None:
        """Write one line."""
        append_progress(self._folder, {"note": message})

    def detail(self, message: str) -> None:
        """Discard the line: the requesting machine keeps notes only."""


def main(session_folder: str) -> None:
    """Carry out the order in the session's folder, and write the result beside it."""
    folder = Path(session_folder)
    order = json.loads((folder / ORDER).read_text(encoding="utf-8"))["bench"]
    try:
        # Run the timings that an order describes.
        conditions = TimingConditions(**{**order["conditions"], "target": Target(**order["conditions"]["target"])})
        plan = (TextGenerationPlan if "contexts" in order["plan"] else CallPlan)(**order["plan"])
        # Paths within the session's folder.
        work = order["work"].items()
        files = {kind: {name: folder / FILES / path for name, path in paths.items()} for kind, paths in work}
        timed = LOCAL_HOST.time(Workload(**files, plan=plan), conditions, LineProgress(folder))
        reply: dict[str, Any] = {"timed": asdict(timed)}
    except CompressError as error:
        reply = error_reply(error)
    write_json(folder / RESULT, reply)
