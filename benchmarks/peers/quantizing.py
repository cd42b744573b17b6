"""What every peer's process does around its work: read the order, time the work, tell what it took."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any


def answer(
    run: Callable[[dict[str, Any]], dict[str, Any] | None], packages: Sequence[str], imports: Sequence[str]
) -> None:
    """Run the order in the file named first, and write what it took into the file named second.

    ``imports`` are done before the clock starts: they are no part of anybody's work. `peak_bytes` is the process's own
    peak. What ``run`` returns is added.
    """
    order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for name in imports:
        module = import_module(name)
        if name == "torch":
            module.set_num_threads(order["threads"])
    start = time.perf_counter()
    more = run(order) or {}
    result = {
        "seconds": time.perf_counter() - start,
        "peak_bytes": _peak_bytes(),
        "packages": {name: version(name) for name in packages},
        **more,
    }
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
