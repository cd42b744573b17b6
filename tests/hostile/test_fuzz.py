"""A few mutations of every kind of untrusted file, and the fuzzer itself: it finds planted bugs of every kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FUZZ = ROOT / "benchmarks" / "fuzz.py"
MUTATIONS = 40
"""Of each kind, so that all kinds take less than a minute. `python benchmarks/fuzz.py --minutes 60` does more."""
# It sets variables of the environment for its own process.
_environment = dict(os.environ)
import fuzz  # noqa: E402
import planted_bugs  # noqa: E402
from fuzzing.targets import TARGETS  # noqa: E402

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


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the fuzzer on readers with planted bugs, and return its folder."""
    folder = tmp_path_factory.mktemp("planted")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, FUZZ.parent)))}
    program = planted_bugs.__file__
    run = subprocess.run(
        [sys.executable, "-P", program, folder], capture_output=True, text=True, timeout=300, env=environment
    )
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize(
    ("reader", "expected"),
    [
        ("sound", None),
        ("uncaught", "TypeError at "),
        ("endless", "HangError at "),
        ("hungry", "MemoryError at "),
        ("crashing", "killed by signal 6"),
        ("lying", "BrokenPromiseError at "),
        ("unprintable", "UnicodeEncodeError at "),
    ],
)
def test_planted_bug_is_found_and_its_input_kept(planted: Path, reader: str, expected: str | None) -> None:
    row = json.loads((planted / "rows.json").read_text())[reader]
    records = [json.loads(line) for line in (planted / "failures.jsonl").read_text().splitlines()]
    records = [record for record in records if record["kind"] == reader]
    assert row["mutations"] == (60 if reader == "endless" else 150)
    if expected is None:
        assert row["failures"] == 0 and row["accepted"] and row["rejected"] and not records
        return
    assert row["failures"] >= 1
    # On a busy machine any reader may take longer than the second that is allowed here.
    by_signature = {record["signature"]: record for record in reversed(records)}
    expected_record = next((by_signature[name] for name in by_signature if name.startswith(expected)), None)
    assert expected_record is not None, by_signature.keys()
    kept = Path(expected_record["input"]) / "file.json"
    target = planted_bugs.TARGETS[reader]
    number, _, content, _ = fuzz.mutated(target, fuzz.load_seeds(target), 1, expected_record["index"])
    assert (number, kept.read_bytes()) == (0, content)
