"""Whole nights: of recipes that cannot start, of budgets too short, and real ones at tiny scale."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_run
from nights import ignore, night, outcome, row

from compress.plugins.nightly.history import NightHistory
from compress.plugins.nightly.run import NightResult, NightRun, commit_of, host_of, software_of
from compress.plugins.nightly.suite import read_suite
from compress.plugins.nightly.views import write_night
from compress.utils.environment import environment

HERE = host_of(environment())


def run_night(suite: Path, artifacts: Path) -> tuple[NightResult, list[str]]:
    notes = tiny_run.Notes()
    done = NightRun(read_suite(suite), suite.parent, artifacts, notes).run()
    write_night(done)
    return done, notes.said


def write_suite(folder: Path, *entries: str, **fields: Any) -> Path:
    path = folder / "suite.yaml"
    lines = [f"{name}: {value}" for name, value in {"name": "all", **fields}.items()]
    path.write_text("\n".join([*lines, "entries:", *(f"  - {entry}" for entry in entries)]))
    return path


def test_a_recipe_that_cannot_be_read_fails_alone_and_is_remembered(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\ntask: txt\n")
    suite = write_suite(tmp_path, "recipe: a.yaml", "{recipe: a.yaml, name: b}")
    done, _ = run_night(suite, tmp_path / "artifacts")
    assert done.night.exit_code == 3
    assert [outcome.status for outcome in done.night.outcomes] == ["failed", "failed"]
    assert "The recipe has" in done.night.outcomes[0].reason
    again, _ = run_night(suite, tmp_path / "artifacts")
    assert [finding.since for finding in again.night.findings] == [done.night.label] * 2
    latest = tmp_path / "artifacts" / "nights" / "all" / "latest"
    assert json.loads((latest / "night.json").read_text())["number"] == 2
    assert {path.name for path in latest.iterdir()} == {"night.html", "night.json", "night.md", "junit.xml"}


def test_an_entry_that_the_budget_is_too_short_for_is_not_run_and_goes_first_next_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("name: x\n")
    suite = write_suite(tmp_path, "recipe: a.yaml", "recipe: b.yaml", budget_minutes=20)
    artifacts = tmp_path / "artifacts"
    history = NightHistory(artifacts / "nights" / "all" / "history.sqlite", ignore)
    slow = [outcome("a", seconds=3.0), outcome("b", seconds=1500.0)]
    for number in range(3):
        history.append(night(number, slow, host=HERE).model_copy(update={"suite": "all"}), {})
    done, lines = run_night(suite, artifacts)
    idle = done.night.outcomes[1]
    assert (idle.entry, idle.status) == ("b", "not run")
    assert "usually takes 25 min" in idle.reason
    assert [finding.kind for finding in done.night.findings] == ["stage", "budget"]
    assert lines[0].startswith("a: running")
    _, lines = run_night(suite, artifacts)
    assert lines[0].startswith("b: not run")


def test_a_budget_that_is_used_up_leaves_the_others_not_run(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: x\n")
    suite = write_suite(tmp_path, "recipe: a.yaml", budget_minutes=1e-9)
    done, _ = run_night(suite, tmp_path / "artifacts")
    assert (done.night.outcomes[0].status, done.night.exit_code) == ("not run", 1)
    assert "used up" in done.night.findings[0].sentence


def test_a_damaged_history_goes_on_from_its_backup_and_the_night_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: x\n")
    suite = write_suite(tmp_path, "recipe: a.yaml", history="kept.sqlite")
    run_night(suite, tmp_path / "artifacts")
    path = tmp_path / "kept.sqlite"
    path.write_bytes(b"\0" * 100 + path.read_bytes()[100:])
    done, _ = run_night(suite, tmp_path / "artifacts")
    assert done.night.number == 2
    assert any("was damaged" in note and "ends with night 1" in note for note in done.night.notes)


def test_the_host_is_the_machine_and_not_its_software() -> None:
    machine = environment()
    updated = {**machine, "kernel": "99", "python": "4.0", "packages": {"torch": "9"}}
    updated["memory_bytes"] = (machine["memory_bytes"] or 8e9) + 1000
    assert host_of(updated) == HERE
    assert software_of(updated) == {"kernel": "99", "python": "4.0", "torch": "9"}
    for change in ({"cores_granted": 99}, {"processor": "another"}, {"features": []}, {"memory_bytes": 1 << 40}):
        assert host_of({**machine, **change}).digest != HERE.digest


def test_the_commit_is_that_of_the_repository_around(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert commit_of(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert commit_of(tmp_path) == f"{head}+changes"


@pytest.fixture(scope="module")
def place(tiny_ran: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes beside a suite, and the baseline of an undisturbed run for two entries."""
    folder = shutil.copytree(tiny_ran, tmp_path_factory.mktemp("night") / "place", symlinks=True)
    stages = [{"finetune": {"epochs": 1000, "batch_size": 1}}, {"onnx": {}}]
    tiny_run.write_recipe(folder, "endless", stages=stages, baseline="finetune")
    tiny_run.write_recipe(folder, "broken", model="nowhere", stages=stages, baseline="onnx")
    (folder / "unread.yaml").write_text("name: unread\n")
    for entry in ("tiny", "degraded"):
        arguments = ("gate", "tiny", "--baseline", f"baselines/{entry}.json", "--update", "--why", "the first")
        set_ = tiny_run.compress(*arguments, folder=folder)
        assert set_.returncode == 0, set_.stderr
    return folder


LENIENT = "policy: {rules: [{metric: accuracy, worse_by: 0.5 points}, {metric: size_bytes, worse_by: 0%}]}"
DEGRADED = "{recipe: tiny.yaml, name: degraded, set: [stages.0.finetune.learning_rate=1.0e-9]}"


@pytest.mark.slow
def test_a_night_survives_what_fails_and_hangs_and_names_the_culprit(place: Path) -> None:
    suite = place / "suite.yaml"
    entries = ("recipe: tiny.yaml", "recipe: broken.yaml", "{recipe: endless.yaml, time_limit_minutes: 0.02}", DEGRADED)
    listed = "\n".join(f"  - {entry}" for entry in entries)
    suite.write_text(f"name: all\nbudget_minutes: 60\nbaselines: baselines\n{LENIENT}\nentries:\n{listed}\n")
    done = tiny_run.compress("nightly", "suite.yaml", "--json", folder=place)
    assert done.returncode == 3, done.stderr
    night_record = json.loads(done.stdout)
    outcomes = {entry_outcome["entry"]: entry_outcome for entry_outcome in night_record["outcomes"]}
    assert {name: entry_outcome["status"] for name, entry_outcome in outcomes.items()} == {
        "tiny": "passed",
        "broken": "failed",
        "endless": "failed",
        "degraded": "missed",
    }
    assert outcomes["broken"]["exit_code"] == 2
    assert "nowhere" in outcomes["broken"]["reason"]
    assert outcomes["endless"]["exit_code"] == -signal.SIGTERM
    assert 1.2 <= outcomes["endless"]["seconds"] < 1.2 + 25
    (gated,) = [finding for finding in night_record["findings"] if finding["kind"] == "gate"]
    assert (gated["entry"], gated["metric"], gated["target"]) == ("degraded", "accuracy", "cpu")
    report = json.loads((place / outcomes["degraded"]["report"]).read_text())
    final = {row["metric"]: row["value"] for row in report["measurements"] if row["model"] == "final"}
    assert gated["effect"] < -0.005
    assert f"{final['accuracy'] * 100:.2f}%" in gated["what"]
    again = tiny_run.compress("nightly", "suite.yaml", "--only", "degraded", folder=place)
    assert again.returncode == 1, again.stderr
    assert "degraded: accuracy on cpu" in again.stdout
    assert "since night 1" in again.stdout
    series = NightHistory(place / "artifacts" / "nights" / "all" / "history.sqlite", ignore).series("all")
    (line,) = [
        candidate
        for candidate in series
        if (candidate.entry, candidate.model, candidate.metric) == ("degraded", "final", "accuracy")
    ]
    assert [point.value for point in line.points] == [final["accuracy"]] * 2


@pytest.mark.slow
def test_a_level_that_rose_two_nights_ago_fails_the_third(place: Path) -> None:
    measured = tiny_run.read_report(place / "artifacts")["measurements"]
    (size,) = [
        measurement["value"]
        for measurement in measured
        if (measurement["model"], measurement["metric"]) == ("final", "size_bytes")
    ]
    history = NightHistory(place / "drifting.sqlite", ignore)
    for number, value in enumerate([size * 0.99] * 9 + [size] * 2):
        earlier_night = night(number, [outcome()], host=HERE).model_copy(update={"suite": "drifting"})
        history.append(earlier_night, {"tiny": (row("size_bytes", value, "bytes"),)})
    suite = place / "drifting.yaml"
    suite.write_text(f"name: drifting\nhistory: drifting.sqlite\n{LENIENT}\nentries: [{{recipe: tiny.yaml}}]\n")
    done = tiny_run.compress("nightly", suite.name, folder=place)
    assert done.returncode == 1, done.stderr
    assert "tiny: size_bytes on cpu: the level changed by +1.0%" in done.stdout
    assert "since night 10 (2026-08-10)" in done.stdout
    read = history.read("drifting")[-1]
    assert ([item.status for item in read.outcomes], [item.kind for item in read.findings]) == (["missed"], ["drift"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "entry", "status"), [(signal.SIGINT, "tiny", "passed"), (signal.SIGTERM, "unread", "failed")]
)
def test_an_interrupted_night_keeps_what_was_finished_and_leaves_no_process(
    place: Path, number: int, entry: str, status: str
) -> None:
    suite = place / f"suite-{int(number)}.yaml"
    suite.write_text(
        f"name: cut-{int(number)}\n{LENIENT}\nentries: [{{recipe: {entry}.yaml}}, {{recipe: endless.yaml}}]\n"
    )
    # One night as a user starts it, which begins its entries so; what `tiny_run` starts forks them.
    begin = tiny_run.start_anew if entry == "unread" else tiny_run.start
    process = begin("nightly", suite.name, folder=place)
    logs = place / "artifacts" / "nights" / f"cut-{int(number)}"
    end = time.monotonic() + 300
    while time.monotonic() < end and not any("finetune" in log.read_text() for log in logs.glob("*/endless/run.log")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert psutil.wait_procs(family, timeout=20)[1] == []
    assert "the night was interrupted" in stdout
    (read,) = NightHistory(logs / "history.sqlite", ignore).read(f"cut-{int(number)}")
    assert [entry_outcome.status for entry_outcome in read.outcomes] == [status, "not run"]


def test_a_bad_suite_is_told_before_anything_runs(tmp_path: Path) -> None:
    suite = write_suite(tmp_path, "recipe: nowhere.yaml", budget=3)
    done = tiny_run.compress("nightly", suite, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "The suite has 2 problems" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "artifacts").exists()
