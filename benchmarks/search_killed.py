"""A search killed at random moments and gone on with, against the same one left alone.

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
_ENDED = (0, 1)
"""Exit codes of a search that has come to its end; 1: its winner misses a limit on the test rows."""


def killed(
    recipe: Annotated[Path, typer.Option(help="A recipe with a `search:` block.")] = RECIPE,
    kills: Annotated[int, typer.Option(help="How often, each in another process.")] = 10,
    trials: Annotated[int, typer.Option(help="Of the search, whether it is killed or not.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    write: Write = False,
) -> None:
    """Whether ledger, winner and bytes are those of a search that nobody killed, and what the kills cost."""
    chance, landed, again = random.Random(seed), 0, 0.0
    with tempfile.TemporaryDirectory(prefix="search-killed-") as folder:
        alone, other = Path(folder) / "alone", Path(folder) / "killed"
        began = time.perf_counter()
        _to_the_end(recipe, alone, trials)
        whole = time.perf_counter() - began
        typer.echo(f"left alone: {whole:.0f} s")
        for number in range(kills):
            # As far as a search comes that is killed every so often, so that the last moments are near its end.
            moment = chance.uniform(0, 2 * whole / kills)
            process = _started(recipe, other, trials)
            began = time.perf_counter()
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                landed += 1
            again += time.perf_counter() - began
            typer.echo(
                f"kill {number + 1} of {kills}: after {moment:.0f} s, {len(_trials(other))} trials in the ledger"
            )
        began = time.perf_counter()
        _to_the_end(recipe, other, trials)
        again += time.perf_counter() - began
        one, two = (_ended(each) for each in (alone, other))
    rows = [
        ["processes killed while they searched", f"{landed} of {kills}", f"{kills}"],
        *([f"the same {what}", "yes" if one[what] == two[what] else "no", "yes"] for what in one),
        ["trials", f"{len(one['trials, in order'])}", ""],
        ["seconds left alone, with the kills", f"{whole:.0f}, {again:.0f}", ""],
    ]
    show("Searches killed at random moments", MEASURED_AND_REQUIRED, rows, write)


def _to_the_end(recipe: Path, artifacts: Path, trials: int) -> None:
    """Raises `typer.Exit` with its code for a search that does not come there."""
    if (code := _started(recipe, artifacts, trials).wait()) not in _ENDED:
        raise typer.Exit(code)


def _started(recipe: Path, artifacts: Path, trials: int) -> subprocess.Popen[bytes]:
    """The command, which goes on where there is something to go on from."""
    command = [sys.executable, "-m", "compress", "search", recipe, "--artifacts", artifacts, "--trials", trials]
    # Further seeds are trained once all is decided: half of the kills would fall there.
    command += ["--set", "search.seeds=0"]
    command += ["--resume"] if _latest(artifacts).joinpath(LEDGER_FILE).is_file() else []
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(list(map(str, command)), **quiet)  # type: ignore[call-overload,no-any-return]


def _latest(artifacts: Path) -> Path:
    return next(artifacts.glob(f"searches/*/{LATEST}"), artifacts / "searches")


def _trials(artifacts: Path) -> list[LedgerEntry]:
    folder = _latest(artifacts)
    return Ledger(folder).read(repair=False)[1] if (folder / LEDGER_FILE).is_file() else []


def _ended(artifacts: Path) -> dict[str, Any]:
    """What two searches that went the same way share."""
    folder, trials = _latest(artifacts), _trials(artifacts)
    return {
        "trials, in order": [(each.point, each.rung) for each in trials],
        "bytes of every trial's model": [each.outcome.model for each in trials],
        "quality of every trial, to the last digit": [each.outcome.rows for each in trials],
        "winner": SearchRecord.model_validate_json((folder / RECORD).read_text()).best,
        "best.yaml": (folder / BEST).read_text(),
        "bytes of the winner": digest_directory(folder / MODEL),
    }
