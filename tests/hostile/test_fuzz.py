"""A few mutations of every kind of untrusted file, and the fuzzer itself: it finds planted bugs of every kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FUZZ = ROOT / "benchmarks" / "fuzz.py"
MUTATIONS = 40
"""Of each kind, so that all kinds take less than a minute. `python benchmarks/fuzz.py --minutes 60` does more."""
# It sets variables of the environment for its own process.
_environment = dict(os.environ)
import fuzz  # noqa: E402
from fuzzing.targets import TARGETS, BrokenPromiseError, Target  # noqa: E402
from fuzzing.values import mutate_json  # noqa: E402

from compress.utils.errors import InputError  # noqa: E402

os.environ.clear()
os.environ.update(_environment)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """Run the fuzzer over every kind, and return its results by kind."""
    folder = tmp_path_factory.mktemp("fuzz")
    command = [sys.executable, "-P", FUZZ, "--mutations", str(MUTATIONS), "--seed", "20261203", "--output", folder]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert (folder / "results.json").is_file(), run.stderr
    rows = json.loads((folder / "results.json").read_text())["kinds"]
    return {row["kind"]: row | {"printed": run.stdout} for row in rows}


@pytest.mark.parametrize("kind", [target.kind for target in TARGETS])
def test_mutated_files_end_with_an_error_about_the_file(kind: str, results: dict[str, dict[str, object]]) -> None:
    row = results[kind]
    assert row["failures"] == 0, row["printed"]
    assert row["mutations"] == MUTATIONS
    # The mutations reach beyond the first check: some files stay valid, others do not.
    assert row["rejected"]
    assert row["fallbacks"] <= MUTATIONS / 10  # type: ignore[operator]


def test_there_are_at_least_25_kinds_of_input() -> None:
    assert len({target.kind for target in TARGETS}) == len(TARGETS) >= 25


def _seed(folder: Path) -> None:
    (folder / "0").mkdir()
    (folder / "0/file.json").write_text(json.dumps({"sizes": [1, 2, 3], "name": "a", "deep": {"x": 1.5}}))


def _values(folder: Path) -> list[object]:
    try:
        sizes = json.loads((folder / "file.json").read_bytes())["sizes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError("no sizes") from None
    return sizes if isinstance(sizes, list) else [sizes]


def sound(folder: Path) -> object:
    return len(_values(folder))


def uncaught(folder: Path) -> object:
    return sum(_values(folder))  # type: ignore[arg-type]


def endless(folder: Path) -> object:
    while b"name" not in (folder / "file.json").read_bytes():
        time.sleep(0.01)
    return None


def hungry(folder: Path) -> object:
    return bytearray(3 << 30) if len(_values(folder)) != 3 else None


def crashing(folder: Path) -> object:
    if len(_values(folder)) != 3:
        os.abort()
    return None


def lying(folder: Path) -> object:
    if len(_values(folder)) != 3:
        raise BrokenPromiseError("three sizes are promised")
    return None


def unprintable(folder: Path) -> object:
    if len(_values(folder)) != 3:
        error = InputError("x")
        error.what = "\ud800"
        raise error
    return None


@pytest.mark.parametrize(
    ("reader", "expected"),
    [
        (sound, None),
        (uncaught, "TypeError at "),
        (endless, "HangError at "),
        (hungry, "MemoryError at "),
        (crashing, "killed by signal 6"),
        (lying, "BrokenPromiseError at "),
        (unprintable, "UnicodeEncodeError at "),
    ],
)
def test_planted_bug_is_found_and_its_input_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Callable[[Path], object], expected: str | None
) -> None:
    monkeypatch.setattr("fuzzing.worker.LIMIT_SECONDS", 1)
    target = Target("planted", _seed, reader, {"file.json": mutate_json})
    run = fuzz.Run(target, fuzz.load_seeds(target), seconds=60, mutations=150 if reader is not endless else 60)
    fuzz.run_all([run], seed=1, jobs=1, failures=tmp_path)
    row, log = run.row(), tmp_path / "failures.jsonl"
    assert row["mutations"] == run.mutations
    if expected is None:
        assert row["failures"] == 0 and row["accepted"] and row["rejected"] and not log.exists()
        return
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert row["failures"] >= 1
    # On a busy machine any reader may take longer than the second that is allowed here.
    records = [record for record in records if record["signature"].startswith(expected)]
    assert records
    kept = Path(records[0]["input"]) / "file.json"
    number, _, content, _ = fuzz.mutated(target, run.seeds, 1, records[0]["index"])
    assert (number, kept.read_bytes()) == (0, content)
