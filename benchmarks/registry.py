"""Robustness of the registry: the time of a rollback, and detection of changed bytes.

    python benchmarks/registry.py rollback
    python benchmarks/registry.py flips --write

`python benchmarks/soak.py faults` runs it under faults.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.plugins.registry.promotion import PromotionRequest, promote
from compress.plugins.registry.registry import Registry
from compress.plugins.registry.upkeep import verify
from compress.results.report import Measurement, Report

RESULTS = Path(__file__).parent / "results" / "registry.json"
app = typer.Typer(help=__doc__)
_Write = Annotated[bool, typer.Option("--write", help="Write the results to results/.")]


def write_run(folder: Path, content: bytes, accuracy: float = 0.9, rows: int = 200, size: int = 1000) -> Path:
    """Write the folder of a run as `compress run` does, with this model content and accuracy."""
    right = round(rows * accuracy)
    raw = tuple([1.0] * right + [0.0] * (rows - right))
    spread = {"low": accuracy - 0.05, "high": min(1.0, accuracy + 0.05)}
    of = {"model": "final", "target": "cpu"}
    measured = (
        Measurement(metric="accuracy", value=accuracy, unit="ratio", n=rows, raw=raw, **spread, **of),
        Measurement(metric="size_bytes", value=float(size), unit="bytes", **of),
    )
    report = Report(recipe="artificial", measurements=measured, started="2026-01-01T00:00:00+00:00")
    (folder / "model" / "onnx").mkdir(parents=True)
    (folder / "model" / "config.json").write_text('{"model_type": "bert"}')
    (folder / "model" / "onnx" / "model.onnx").write_bytes(content)
    (folder / "report.json").write_text(report.to_json())
    (folder / "recipe.yaml").write_text("name: artificial\n")
    (folder / "lock.json").write_text('{"seed": 0, "start": "none"}\n')
    return folder


def flip_bytes(folder: Path, tries: int, seed: int = 0) -> tuple[int, int]:
    """Change one random byte of a registry ``tries`` times. Return how often `verify` detects it and names the file."""
    chance = random.Random(seed)
    registry = Registry(folder / "registry")
    for number in range(3):
        run = write_run(folder / f"run-{number}", chance.randbytes(2000 + number), accuracy=0.9)
        version, _ = registry.register(run, "reviews")
        promote(registry, PromotionRequest(version.reference))
    registry.rollback("reviews", "champion")
    files = [path for path in sorted(registry.root.rglob("*")) if path.is_file() and path.stat().st_size]
    assert not verify(registry)
    detected = named = 0
    for number in range(tries):
        # Alternate between a random file and a random byte, since few files hold most bytes.
        weights = [path.stat().st_size if number % 2 else 1 for path in files]
        (path,) = chance.choices(files, weights)
        whole = path.read_bytes()
        offset = chance.randrange(len(whole))
        changed = bytes([whole[offset] ^ chance.randrange(1, 256)])
        # Write a new file, since the objects are hard links to the files of the runs.
        path.unlink()
        path.write_bytes(whole[:offset] + changed + whole[offset + 1 :])
        faults = verify(Registry(registry.root))
        detected += bool(faults)
        named += [fault.path for fault in faults] == [path.relative_to(registry.root).as_posix()]
        path.write_bytes(whole)
    return detected, named


def time_rollback(folder: Path, versions: int, megabytes: int) -> tuple[float, bool]:
    """Return the seconds of `compress registry rollback`, and whether the previous bytes are served afterwards."""
    registry, chance = Registry(folder / "registry"), random.Random(0)
    for number in range(versions):
        content = chance.randbytes(100 if number < versions - 2 else megabytes * 1_000_000)
        version, _ = registry.register(write_run(folder / f"run-{number}", content), "reviews")
        promote(registry, PromotionRequest(version.reference))
    previous_version = registry.state().versions["reviews"][versions - 1]
    command = [sys.executable, "-m", "compress", "registry", "rollback", "reviews", "--registry", str(registry.root)]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    registry.pull("reviews@champion", folder / "served")
    served = (folder / "served" / "model" / "onnx" / "model.onnx").read_bytes()
    old = (folder / f"run-{previous_version.number - 1}" / "model" / "onnx" / "model.onnx").read_bytes()
    return seconds, served == old


@app.command()
def rollback(versions: int = 500, megabytes: int = 200, write: _Write = False) -> None:
    """Time a rollback on the command line."""
    with tempfile.TemporaryDirectory(prefix="registry-") as folder:
        seconds, same = time_rollback(Path(folder), versions, megabytes)
    what = f"`compress registry rollback`, {versions} versions, models of {megabytes} MB, including program start"
    served = "the previous bytes are served" if same else "other bytes are served"
    _report(write, what, f"{seconds:.2f} s; {served}", "under 1 s; the previous bytes")


@app.command()
def flips(tries: int = 200, write: _Write = False) -> None:
    """Change random bytes and count how many are detected."""
    with tempfile.TemporaryDirectory(prefix="registry-") as folder:
        detected, named = flip_bytes(Path(folder), tries)
    what = f"a changed byte anywhere in a registry, {tries} tries: detected by `verify`, and only the right file named"
    _report(write, what, f"{detected} of {tries}, {named} of {tries}", f"{tries}, {tries}")


def _report(write: bool, what: str, measured: str, required: str) -> None:
    typer.echo(f"{what}: {measured} (required: {required})")
    if not write:
        return
    page = json.loads(RESULTS.read_text()) if RESULTS.exists() else _PAGE
    rows = [row for row in page["tables"][0]["rows"] if row[0].split(",")[0] != what.split(",")[0]]
    page["measured"] = datetime.now(UTC).date().isoformat()
    page["tables"][0]["rows"] = [*rows, [what, measured, required]]
    RESULTS.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n")


_PAGE: dict[str, Any] = {
    "title": "Registry",
    "order": 11,
    "command": "python benchmarks/registry.py flips --write",
    "machine": f"{os.cpu_count()} virtual cores, other processes running",
    "measured": "",
    "tables": [{"columns": ["quantity", "measured", "required"], "rows": []}],
}


if __name__ == "__main__":
    app()
