"""Robustness of the registry: killed writers, the time of a rollback, and detection of changed bytes.

    python benchmarks/registry.py writers     # some minutes: 2 writers x 500 operations, 100 kills
    python benchmarks/registry.py rollback
    python benchmarks/registry.py flips
    python benchmarks/registry.py writers --write

A writer is a process that registers artificial runs, promotes each, and logs every confirmed operation. It is killed at
random moments, and a new process continues after the last confirmed operation.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.plugins.registry.promotion import PromotionRequest, promote
from compress.plugins.registry.registry import Registry
from compress.plugins.registry.state import Promoted, Registered
from compress.plugins.registry.upkeep import collect, verify
from compress.results.report import Measurement, Report
from compress.utils.errors import InputError

RESULTS = Path(__file__).parent / "results" / "registry.json"
WRITERS = 2
app = typer.Typer(help=__doc__)
_Write = Annotated[bool, typer.Option("--write", help="Write the results to results/.")]
_FORK = multiprocessing.get_context("fork")


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


@dataclass(frozen=True)
class KillResult:
    """State of a registry after its writers were killed."""

    confirmed: int
    kills: int
    lost: int
    double: int
    torn: int
    unsound_aliases: int
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether no operation was lost or repeated, and no file or alias is damaged."""
        return not any((self.lost, self.double, self.torn, self.unsound_aliases))


def kill_writers(folder: Path, operations: int, kills: int, seed: int = 0, key: Path | None = None) -> KillResult:
    """Let two writers perform ``operations`` operations each, and kill them at ``kills`` random moments.

    They sign the log with the SSH key ``key``, if there is one.
    """
    began, chance = time.perf_counter(), random.Random(seed)
    runs = {
        writer: [
            write_run(folder / f"{writer}-{index}", f"{writer} {index}".encode()) for index in range(operations // 2)
        ]
        for writer in range(WRITERS)
    }
    notes = {writer: folder / f"confirmed-{writer}" for writer in runs}
    root, killed, torn = folder / "registry", 0, 0
    # Numbers of the operations during which each writer is killed.
    moments = {writer: sorted(chance.sample(range(operations), kills // WRITERS)) for writer in runs}
    working = {writer: _start_writer(root, runs[writer], notes[writer], key) for writer in runs}
    while working:
        for writer, process in list(working.items()):
            if moments[writer] and _count(notes[writer]) >= moments[writer][0]:
                moments[writer].pop(0)
                time.sleep(chance.uniform(0, 0.02))
                process.kill()
                process.join()
                killed += process.exitcode == -signal.SIGKILL
                torn += not _is_readable(root)
                working[writer] = _start_writer(root, runs[writer], notes[writer], key)
            elif process.exitcode is not None:
                process.join()
                assert process.exitcode == 0, process.exitcode
                del working[writer]
        time.sleep(0.001)
    return _check_registry(Registry(root, key=key), notes, killed, torn, time.perf_counter() - began)


def _start_writer(root: Path, runs: list[Path], notes: Path, key: Path | None) -> Any:
    process = _FORK.Process(target=_run_writer, args=(root, runs, notes, key))
    process.start()
    return process


def _run_writer(root: Path, runs: list[Path], notes: Path, key: Path | None) -> None:
    """Register and promote run after run, starting after the last confirmed operation."""
    registry = Registry(root, key=key)
    done = _count(notes)
    with notes.open("ab", buffering=0) as file:
        for number in range(done, 2 * len(runs)):
            run = runs[number // 2]
            version, _ = registry.register(run, "reviews")
            if number % 2:
                promoted = promote(registry, PromotionRequest(version.reference))
                assert not promoted.refused, promoted.judged
            what = "promoted" if number % 2 else "registered"
            file.write(f"{what} {version.number} {version.record}\n".encode())


def _count(notes: Path) -> int:
    return notes.read_bytes().count(b"\n") if notes.exists() else 0


def _is_readable(root: Path) -> bool:
    """Return whether all entries can be read and every alias points to an existing version."""
    registry = Registry(root)
    if not registry.log.path.is_file():
        return True
    state = registry.state()
    return all(number in state.versions[name] for name in state.versions for number in state.aliases(name).values())


def _check_registry(registry: Registry, notes: dict[int, Path], kills: int, torn: int, seconds: float) -> KillResult:
    faults = [fault for fault in verify(registry) if fault.fault != "surplus"]
    collect(registry, registry.root.parent / "none", dry_run=False)
    torn += len(faults) + len(verify(registry))
    state = registry.state()
    versions = state.versions["reviews"]
    confirmed = [line.split() for path in notes.values() for line in path.read_text().splitlines()]
    promoted = [entry for entry in state.entries if isinstance(entry, Promoted)]
    known = {(version.number, version.record, "registered") for version in versions.values()}
    known |= {(entry.version, versions[entry.version].record, "promoted") for entry in promoted}
    lost = sum((int(number), record, what) not in known for what, number, record in confirmed)
    lost += len(set(range(1, len(versions) + 1)) - set(versions))
    # Each run must have one version, registered once, and no version may replace itself. If a writer was killed before
    # its promotion was confirmed and the other writer promoted since, promoting again is correct.
    double = len(versions) - len({version.record for version in versions.values()})
    double += sum(isinstance(entry, Registered) for entry in state.entries) - len(versions)
    double += sum(entry.before == entry.version for entry in promoted)
    unsound = 0
    for number in state.aliases("reviews").values():
        try:
            registry.verified(versions[number])
        except InputError:
            unsound += 1
    return KillResult(len(confirmed), kills, lost, double, torn, unsound, seconds)


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
def writers(operations: int = 500, kills: int = 100, write: _Write = False) -> None:
    """Kill two writers at random moments and check the registry."""
    with tempfile.TemporaryDirectory(prefix="registry-") as folder:
        outcome = kill_writers(Path(folder), operations, kills)
    what = f"{WRITERS} writers x {operations} registrations and promotions, `kill -9` at {outcome.kills} random moments"
    counts = f"{outcome.lost} lost, {outcome.double} double, {outcome.torn} torn"
    aliases = "every alias points to a verified artifact" if not outcome.unsound_aliases else "an alias is damaged"
    _report(
        write, what, f"{counts} of {outcome.confirmed} confirmed; {aliases} ({outcome.seconds:.0f} s)", "0, 0, 0; every"
    )


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
    "command": "python benchmarks/registry.py writers --write",
    "machine": f"{os.cpu_count()} virtual cores, other processes running",
    "measured": "",
    "tables": [{"columns": ["quantity", "measured", "required"], "rows": []}],
}


if __name__ == "__main__":
    app()
