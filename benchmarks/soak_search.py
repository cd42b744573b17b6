"""A search under faults and a search of which a Ray node dies, each compared with the same search without.

The commands `search` and `ray` of `benchmarks/soak.py`. Every trial in the ledger is an acknowledged write.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from search_workers import run_search
from soak_faults import YEARS, restart_with_library
from soak_page import Write, show

from compress.plugins.search.observations import LEDGER_FILE, Ledger, LedgerEntry
from compress.plugins.search.record import SearchRecord
from compress.plugins.search.search_folder import BEST, MODEL, RECORD
from compress.report.run_folder import LATEST
from compress.utils.storage import digest_directory

RECIPE = Path(__file__).parent / "soaking" / "search.yaml"
_FINISHED = (0, 1)
"""Exit codes of a finished search; 1: its winner misses a limit on the test rows."""
_FAILED = (2, 3)
"""Exit codes of a search that a full disk ends."""
FAULTS = {"kill": 50, "full disk": 25, "clock": 15, "slow": 10}


def search(
    recipe: Annotated[Path, typer.Option(help="Recipe with a `search:` block.")] = RECIPE,
    minutes: Annotated[float, typer.Option(help="Time of the searches with faults.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Seed of the faults.")] = 0,
    write: Write = False,
) -> None:
    """Resume searches after faults. Exit code 1: a trial is lost, or a winner or its bytes are others than without."""
    restart_with_library()
    chance, faults, problems, count, reordered = random.Random(seed), Counter[str](), list[str](), 0, 0
    with tempfile.TemporaryDirectory(prefix="soak-search-") as folder:
        start = time.monotonic()
        code = _start(recipe, Path(folder) / "whole", {}).wait()
        seconds, expected = time.monotonic() - start, outcome(Path(folder) / "whole")
        problems += [] if code in _FINISHED else [f"the search without faults ends with {code}"]
        typer.echo(f"without faults: {seconds:.0f} s", err=True)
        began = time.monotonic()
        while time.monotonic() - began < minutes * 60 and not problems:
            artifacts = Path(folder) / f"faulty-{count}"
            problems += _run_under_faults(recipe, artifacts, chance, faults, seconds)
            if not problems:
                actual = outcome(artifacts)
                problems += [f"search {count}: another {what}" for what in expected if expected[what] != actual[what]]
                trials, others = _results(Path(folder) / "whole"), _results(artifacts)
                differing = [key for key in trials.keys() & others.keys() if trials[key] != others[key]]
                problems += [f"search {count}: another model or quality of trial {key}" for key in differing]
                reordered += [*trials] != [*others]
            count += 1
            typer.echo(f"{(time.monotonic() - began) / 60:.0f} min: {count} searches, {dict(faults)}", err=True)
    for problem in problems:
        typer.echo(problem)
    rows = [
        ["searches; faults", f"{count}; {faults.total()}", ""],
        *([name, str(number), ""] for name, number in faults.most_common()),
        ["trials lost; searches with another winner, or other bytes of a trial", str(len(problems)), "0"],
        ["searches that tried other recipes on the way, since gains are divided by measured times", f"{reordered}", ""],
        ["minutes; seconds of a search without faults", f"{(time.monotonic() - began) / 60:.0f}; {seconds:.0f}", ""],
    ]
    show("Searches under faults", f"python benchmarks/soak.py search --seed {seed} --write", rows, write)
    if problems:
        raise typer.Exit(1)


def _run_under_faults(
    recipe: Path, artifacts: Path, chance: random.Random, faults: Counter[str], seconds: float
) -> list[str]:
    """Resume a search until it ends, and return what is wrong."""
    artifacts.mkdir()
    known: list[LedgerEntry] = []
    while True:
        (fault,) = chance.choices([*FAULTS], [*FAULTS.values()])
        fired = artifacts / "fired"
        fired.unlink(missing_ok=True)
        variables = {"FAULT_ROOT": str(artifacts), "FAULT_FIRED": str(fired)}
        process = _start(recipe, artifacts, variables | _variables(fault, chance))
        try:
            code = process.wait(chance.uniform(0, seconds / 3) if fault == "kill" else 20 * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
            if fault != "kill":
                return [f"a search with the fault {fault!r} hangs"]
        faults[fault] += fired.exists() or code == -signal.SIGKILL
        trials = ledger(artifacts)
        if trials[: len(known)] != known:
            return [f"lost: {len(known)} trials were in the ledger, and it has others now"]
        known = trials
        if code in _FINISHED:
            return []
        if code not in (*_FAILED, -signal.SIGKILL) or b"Traceback" in (artifacts / "stderr").read_bytes():
            return [f"it ends with {code}: {(artifacts / 'stderr').read_text()[-2000:]}"]


def _variables(fault: str, chance: random.Random) -> dict[str, str]:
    match fault:
        case "full disk":
            at = int(10 ** chance.uniform(0.5, 3.2))
            return {"FAULT_FULL_AT": str(at), "FAULT_FULL_FOR": chance.choice(("1", "20", "1000000"))}
        case "clock":
            offset = chance.choice((-1, 1)) * chance.randint(60, 30 * YEARS)
            return {"FAULT_CLOCK": str(offset), "FAULT_CLOCK_EVERY": chance.choice(("7", "1000"))}
        case "slow":
            return {"FAULT_SLOW_US": "20000"}
    return {}


def _start(recipe: Path, artifacts: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a search, or resume it if it has a ledger."""
    command = [sys.executable, "-m", "compress", "search", recipe, "--artifacts", artifacts]
    command += ["--resume"] if ledger_folder(artifacts).joinpath(LEDGER_FILE).is_file() else []
    artifacts.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    with (artifacts / "stderr").open("wb") as errors:
        return subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
        )


def ledger_folder(artifacts: Path) -> Path:
    """Return the folder of the latest search."""
    return next(artifacts.glob(f"searches/*/{LATEST}"), artifacts / "searches")


def ledger(artifacts: Path) -> list[LedgerEntry]:
    """Return the trials in the ledger of the latest search."""
    folder = ledger_folder(artifacts)
    return Ledger(folder).read(repair=False)[1] if (folder / LEDGER_FILE).is_file() else []


def outcome(artifacts: Path) -> dict[str, Any]:
    """Return everything that must be the same for two searches."""
    folder = ledger_folder(artifacts)
    return {
        "winner": SearchRecord.model_validate_json((folder / RECORD).read_text()).best,
        "best.yaml": (folder / BEST).read_text(),
        "bytes of the winner": digest_directory(folder / MODEL),
    }


def _results(artifacts: Path) -> dict[Any, Any]:
    """Return the digest of the model and the quality of every trial, in their order."""
    return {(trial.point, trial.rung): (trial.outcome.model, trial.outcome.rows) for trial in ledger(artifacts)}


def ray(
    recipe: Annotated[Path, typer.Option(help="Recipe with a `search:` block.")] = RECIPE,
    trials: Annotated[int, typer.Option(help="Trials in the ledger when the node dies.")] = 1,
    write: Write = False,
) -> None:
    """Kill one of two Ray nodes during a search. Exit code 1: the winner is another than without."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="soak-ray-") as folder:
        whole = run_search(recipe, Path(folder) / "whole", 2)
        lost = run_search(recipe, Path(folder) / "lost", 2, lambda artifacts: len(ledger(artifacts)) >= trials)
    same = {name: whole[name] == lost[name] for name in ("winner", "decisions", "bytes")}
    rows = [
        ["nodes killed", f"{lost['killed']:d} of 2", "1 of 2"],
        *([f"the same {name}", "yes" if equal else "no", "yes"] for name, equal in same.items()),
        ["trials", f"{len(lost['decisions'])}", ""],
        ["seconds without and with the loss", f"{whole['seconds']:.0f}, {lost['seconds']:.0f}", ""],
    ]
    show("A search that loses one of two Ray nodes", "python benchmarks/soak.py ray --write", rows, write)
    if not (lost["killed"] and all(same.values())):
        raise typer.Exit(1)
