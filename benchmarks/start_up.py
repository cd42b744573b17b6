"""Start-up time of `compress --help`, `recipes` and `check`: the median over several processes.

python benchmarks/start_up.py recipes/tiny.yaml
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def time_command(arguments: list[str], runs: int) -> list[float]:
    """Return the wall time of ``runs`` processes in ms, after one warm-up process."""
    milliseconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "compress", *arguments], stdout=subprocess.DEVNULL, check=True)
        milliseconds.append((time.perf_counter() - start) * 1e3)
    return milliseconds[1:]


def main() -> None:
    """Time the commands and print a line for each, or JSON with the raw samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", type=Path, help="also time `compress check` of this recipe")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="write JSON, with the raw samples")
    options = parser.parse_args()
    commands = [["--help"], ["recipes"]] + ([["check", str(options.recipe)]] if options.recipe else [])
    rows: list[dict[str, Any]] = []
    for command in commands:
        raw = time_command(command, options.runs)
        rows.append({"command": " ".join(command), "median_ms": statistics.median(raw), "raw_ms": raw})
    if options.json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    for row in rows:
        spread = f"{min(row['raw_ms']):.0f}-{max(row['raw_ms']):.0f}"
        sys.stdout.write(f"compress {row['command']:<40} {row['median_ms']:6.0f} ms  ({spread})\n")


if __name__ == "__main__":
    main()
