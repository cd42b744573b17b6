"""A small nightly suite repeated in one folder: what grows, and whether the verdict stays.

The command `nightly` of `benchmarks/soak.py`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from soak_page import Write, show

SUITE = Path(__file__).parent / "soaking" / "nightly.yaml"
WARM_UP = 5
"""Repetitions whose growth does not count: the first ones fill the cache and import modules."""
NOISE = {"resident": 100_000, "work": 100}
"""Bytes of growth per repetition that do not count: of the allocator, and of the digits of times in the cache."""


@dataclass(frozen=True)
class Sample:
    """State after a repetition. Disk is in bytes, a file with several hard links counts once.

    ``history`` is the history file with its backups, ``nights`` the folders of all nights, ``runs`` the folders of all
    runs, and ``work`` everything else below the artifacts and the folder for temporary files.
    """

    history: int
    nights: int
    runs: int
    work: int
    resident: int
    handles: int
    threads: int
    children: int
    seconds: float
    verdict: tuple[str, ...]


def nightly(
    suite: Annotated[Path, typer.Argument(help="Suite to repeat.")] = SUITE,
    repetitions: Annotated[int, typer.Option(min=WARM_UP + 5, help="Number of nights.")] = 200,
    folder: Annotated[Path | None, typer.Option(help="Folder to keep; default: a temporary one.")] = None,
    write: Write = False,
) -> None:
    """Repeat a suite. Exit code 1: a verdict differs, or something grows by more than the history's own bytes."""
    with tempfile.TemporaryDirectory(prefix="soak-nightly-") as temporary:
        samples = repeat(suite, folder or Path(temporary), repetitions)
    growth, problems = judge(samples)
    verdicts = {sample.verdict for sample in samples}
    rows = [
        ["repetitions; different verdicts", f"{len(samples)}; {len(verdicts)}", "200; 1"],
        ["history and its backups, growth per repetition", f"{growth['history'] / 1e3:.1f} kB", "its own bytes"],
        ["folders of nights and runs, growth per repetition", f"{growth['records'] / 1e3:.1f} kB", "constant"],
        ["the same, in the last half of the repetitions", f"{growth['late records'] / 1e3:.1f} kB", "constant"],
        ["cache, locks and temporary files, growth per repetition", f"{growth['work']:.0f} B", "below 100 B"],
        ["memory of the process, growth per repetition", f"{growth['resident'] / 1e3:.1f} kB", "below 100 kB"],
        ["open files, threads, child processes, growth", _counts(growth), "0, 0, 0"],
        ["seconds per repetition", f"{sum(sample.seconds for sample in samples) / len(samples):.1f}", ""],
    ]
    show("A nightly suite, repeated", "python benchmarks/soak.py nightly --write", rows, write)
    for problem in problems:
        typer.echo(f"problem: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


def _counts(growth: dict[str, float]) -> str:
    return ", ".join(f"{growth[name]:.0f}" for name in ("handles", "threads", "children"))


def repeat(suite: Path, folder: Path, repetitions: int) -> list[Sample]:
    """Run nights in ``folder`` as `compress nightly` does, and return a sample after each; also in `samples.jsonl`."""
    from compress.plugins.nightly.run import NightRun
    from compress.plugins.nightly.suite import read_suite
    from compress.plugins.nightly.views import write_night
    from compress.utils.progress import SilentProgress

    artifacts, scratch = folder / "artifacts", folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    # Files that a process leaves in the folder for temporary files count too.
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    loaded, samples = read_suite(suite), list[Sample]()
    with (folder / "samples.jsonl").open("w") as log:
        for number in range(1, repetitions + 1):
            began = time.perf_counter()
            result = NightRun(loaded, suite.parent, artifacts, SilentProgress()).run()
            write_night(result)
            night = result.night
            verdict = (*(f"{row.entry} {row.status}" for row in night.outcomes), *(row.short for row in night.findings))
            samples.append(_sample(artifacts / "nights" / night.suite, folder, time.perf_counter() - began, verdict))
            log.write(json.dumps(asdict(samples[-1])) + "\n")
            log.flush()
            if number % 10 == 0 or number == 1:
                typer.echo(f"{number}: {samples[-1]}", file=sys.stderr)
    return samples


def _sample(nights: Path, folder: Path, seconds: float, verdict: tuple[str, ...]) -> Sample:
    process, seen = psutil.Process(), set[int]()
    history = sum(_bytes(path, seen) for path in nights.glob("history.sqlite*"))
    in_nights = _bytes(nights, seen)
    in_runs = _bytes(folder / "artifacts" / "runs", seen)
    seen.add((folder / "samples.jsonl").stat().st_ino)
    return Sample(
        history=history,
        nights=in_nights,
        runs=in_runs,
        work=_bytes(folder, seen),
        resident=process.memory_info().rss,
        handles=process.num_fds(),
        threads=process.num_threads(),
        children=len(process.children(recursive=True)),
        seconds=seconds,
        verdict=verdict,
    )


def _bytes(path: Path, seen: set[int]) -> int:
    """Return the bytes of the files at or below a path whose inodes are not in ``seen``, and add them to it."""
    total = 0
    for file in (path, *path.rglob("*")):
        status = file.lstat()
        if not file.is_dir() and status.st_ino not in seen:
            seen.add(status.st_ino)
            total += status.st_size
    return total


def judge(samples: Sequence[Sample]) -> tuple[dict[str, float], list[str]]:
    """Return the growth per repetition after the warm-up, and what must not be."""
    begin, middle, end = samples[WARM_UP], samples[(WARM_UP + len(samples)) // 2], samples[-1]
    count, late = len(samples) - WARM_UP - 1, len(samples) - (WARM_UP + len(samples)) // 2 - 1
    growth = {name: (getattr(end, name) - getattr(begin, name)) / count for name in ("history", "work", "resident")}
    growth |= {name: getattr(end, name) - getattr(begin, name) for name in ("handles", "threads", "children")}
    growth["records"] = (end.nights + end.runs - begin.nights - begin.runs) / count
    growth["late records"] = (end.nights + end.runs - middle.nights - middle.runs) / late
    names = ("work", "resident", "handles", "threads", "children")
    problems = [f"{name} grows by {growth[name]:g}" for name in names if growth[name] > NOISE.get(name, 0)]
    if growth["late records"] > 1.1 * growth["records"]:
        problems.append("the folders of nights and runs grow faster and faster")
    if len(verdicts := {sample.verdict for sample in samples}) > 1:
        problems.append(f"the verdicts differ: {sorted(verdicts)}")
    return growth, problems
