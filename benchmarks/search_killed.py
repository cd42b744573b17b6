"""A search that is killed at random moments and resumed, compared with the same search without interruption.

The command `killed` of `benchmarks/search.py`.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from search_page import MEASURED_AND_REQUIRED, Write, show

from compress.plugins.search.observations import LEDGER_FILE, Ledger, LedgerEntry
from compress.plugins.search.record import SearchRecord
from compress.plugins.search.search_folder import BEST, MODEL, RECORD
from compress.report.run_folder import LATEST
from compress.utils.storage import digest_directory

RECIPE = Path(__file__).parent / "searching" / "workers.yaml"
_FINISHED = (0, 1)
"""Exit codes of a finished search; 1: its winner misses a limit on the test rows."""


def killed(
    recipe: Annotated[Path, typer.Option(help="Recipe with a `search:` block.")] = RECIPE,
    kills: Annotated[int, typer.Option(help="Number of kills.")] = 10,
    trials: Annotated[int, typer.Option(help="Number of trials of each search.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the random moments.")] = 0,
    write: Write = False,
) -> None:
    """Check that a killed and resumed search has the same trials, winner and bytes, and measure the extra time."""
    generator, killed_count, killed_seconds = random.Random(seed), 0, 0.0
    with tempfile.TemporaryDirectory(prefix="search-killed-") as folder:
        uninterrupted, interrupted = Path(folder) / "uninterrupted", Path(folder) / "killed"
        start = time.perf_counter()
        _run_to_end(recipe, uninterrupted, trials)
        whole_seconds = time.perf_counter() - start
        typer.echo(f"uninterrupted: {whole_seconds:.0f} s")
        for number in range(kills):
            # On average the kills are spread over the whole search.
            moment = generator.uniform(0, 2 * whole_seconds / kills)
            process = _start_search(recipe, interrupted, trials)
            start = time.perf_counter()
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed_count += 1
            killed_seconds += time.perf_counter() - start
            typer.echo(
                f"kill {number + 1} of {kills}: after {moment:.0f} s, {len(_trials(interrupted))} trials in the ledger"
            )
        start = time.perf_counter()
        _run_to_end(recipe, interrupted, trials)
        killed_seconds += time.perf_counter() - start
        expected, actual = (_outcome(search) for search in (uninterrupted, interrupted))
    rows = [
        ["processes killed during the search", f"{killed_count} of {kills}", f"{kills}"],
        *([f"the same {what}", "yes" if expected[what] == actual[what] else "no", "yes"] for what in expected),
        ["trials", f"{len(expected['trials, in order'])}", ""],
        ["seconds without and with kills", f"{whole_seconds:.0f}, {killed_seconds:.0f}", ""],
    ]
    show("Searches killed at random moments", MEASURED_AND_REQUIRED, rows, write)


def _run_to_end(recipe: Path, artifacts: Path, trials: int) -> None:
    """Run or resume a search until it ends. Raises `typer.Exit` if it fails."""
    if (code := _start_search(recipe, artifacts, trials).wait()) not in _FINISHED:
        raise typer.Exit(code)


def _start_search(recipe: Path, artifacts: Path, trials: int) -> subprocess.Popen[bytes]:
    """Start a search, or resume it if it has a ledger."""
    command = [sys.executable, "-m", "compress", "search", recipe, "--artifacts", artifacts, "--trials", trials]
    # Without the final runs with other seeds, which would take half of the kills.
    command += ["--set", "search.seeds=0"]
    command += ["--resume"] if _latest(artifacts).joinpath(LEDGER_FILE).is_file() else []
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(list(map(str, command)), **quiet)  # type: ignore[call-overload,no-any-return]


def _latest(artifacts: Path) -> Path:
    return next(artifacts.glob(f"searches/*/{LATEST}"), artifacts / "searches")


def _trials(artifacts: Path) -> list[LedgerEntry]:
    folder = _latest(artifacts)
    return Ledger(folder).read(repair=False)[1] if (folder / LEDGER_FILE).is_file() else []


def _outcome(artifacts: Path) -> dict[str, Any]:
    """Return everything that must be the same for both searches."""
    folder, trials = _latest(artifacts), _trials(artifacts)
    return {
        "trials, in order": [(trial.point, trial.rung) for trial in trials],
        "bytes of every trial's model": [trial.outcome.model for trial in trials],
        "quality of every trial, to the last digit": [trial.outcome.rows for trial in trials],
        "winner": SearchRecord.model_validate_json((folder / RECORD).read_text()).best,
        "best.yaml": (folder / BEST).read_text(),
        "bytes of the winner": digest_directory(folder / MODEL),
    }
