"""Common part of all quantizer scripts: read the order, time the work, write the answer."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any


def run_order(
    run: Callable[[dict[str, Any]], dict[str, Any] | None], packages: Sequence[str], imports: Sequence[str]
) -> None:
    """Read the order from the first argument, run it, and write the answer to the second argument.

    Args:
        run: Function of the order; the values that it returns are added to the answer.
        packages: Packages whose versions are added to the answer.
        imports: Modules to import before the timing starts.
    """
    order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for name in imports:
        module = import_module(name)
        if name == "torch":
            module.set_num_threads(order["threads"])
    start = time.perf_counter()
    additional = run(order) or {}
    result = {
        "seconds": time.perf_counter() - start,
        "peak_bytes": _peak_bytes(),
        "packages": {name: version(name) for name in packages},
        **additional,
    }
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
