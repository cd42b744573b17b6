"""Tests of whole nights with tiny recipes: failures, budgets, interruptions, drift and suites."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import tiny_run
import yaml
from nights import ignore, night, outcome, row

from compress.plugins.nightly import entry_run
from compress.plugins.nightly.entry_run import EndedProcess, run_process
from compress.plugins.nightly.history import NightHistory
from compress.plugins.nightly.run import NightResult, NightRun, commit_of, host_of, software_of
from compress.plugins.nightly.suite import SuiteEntry, read_suite, select_entries, suite_schema
from compress.plugins.nightly.views import write_night
from compress.recipe.policy import Policy
from compress.results.report import Report
from compress.utils.environment import environment
from compress.utils.errors import InputError

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


def test_unreadable_recipe_fails_only_its_entry_every_night(tmp_path: Path) -> None:
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
    # A page shows every night, so that only the newest one is kept.
    assert {path.name for path in done.folder.iterdir()} == {"night.json", "night.md", "junit.xml"}


def test_entry_beyond_the_budget_is_skipped_and_runs_first_next_time(tmp_path: Path) -> None:
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


def test_non_finite_value_fails_its_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = "data: {splits: {train: train.csv, test: test.csv}}"
    (tmp_path / "a.yaml").write_text(f"name: a\ntask: text-classification\nmodel: b\n{data}\nstages: [onnx]\n")
    report = Report(recipe="a", measurements=(row("f1", math.nan, "ratio"),)).to_json()

    def ends(command: list[str], output: Path, log: Path, *limits: float) -> EndedProcess:
        output.write_text(report)
        return EndedProcess(0, 0.1, False)

    monkeypatch.setattr(entry_run, "run_process", ends)
    entry = entry_run.EntryRun(SuiteEntry(recipe="a.yaml"), tmp_path, tmp_path, None, Policy())
    ended = entry.run(tmp_path / "entry", 60.0).outcome
    assert ended.status == "failed" and "finite number: f1 of final is nan" in ended.reason


def test_night_restores_a_damaged_history_and_notes_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: x\n")
    suite = write_suite(tmp_path, "recipe: a.yaml", history="kept.sqlite")
    run_night(suite, tmp_path / "artifacts")
    path = tmp_path / "kept.sqlite"
    path.write_bytes(b"\0" * 100 + path.read_bytes()[100:])
    done, _ = run_night(suite, tmp_path / "artifacts")
    assert done.night.number == 2
    assert any("was damaged" in note and "ends with night 1" in note for note in done.night.notes)


def test_equal_files_of_two_runs_use_their_space_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"older": (b"same", b"one"), "newer": (b"same", b"two"), "newest": (b"same", b"two")}
    for run, files in contents.items():
        (tmp_path / run / "model").mkdir(parents=True)
        for name, content in zip("ab", files, strict=True):
            (tmp_path / run / "model" / name).write_bytes(content)
    older, newer, newest = (tmp_path / run for run in contents)
    entry_run.share_equal_files(older, newer)
    assert (newer / "model" / "a").samefile(older / "model" / "a")
    assert not (newer / "model" / "b").samefile(older / "model" / "b")
    shutil.rmtree(older)
    entry_run.share_equal_files(older, newest)

    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    entry_run.share_equal_files(newer, newest)
    for run in (newer, newest):
        assert {path.name: path.read_bytes() for path in (run / "model").iterdir()} == {"a": b"same", "b": b"two"}
        assert all(path.stat().st_nlink == 1 for path in (run / "model").iterdir())


def test_host_identity_excludes_software() -> None:
    machine = environment()
    updated = {**machine, "kernel": "99", "python": "4.0", "packages": {"torch": "9"}}
    updated["memory_bytes"] = (machine["memory_bytes"] or 8e9) + 1000
    assert host_of(updated) == HERE
    assert software_of(updated) == {"kernel": "99", "python": "4.0", "torch": "9"}
    for change in ({"cores_granted": 99}, {"processor": "another"}, {"features": []}, {"memory_bytes": 1 << 40}):
        assert host_of({**machine, **change}).digest != HERE.digest


def test_commit_is_read_from_the_enclosing_repository(tmp_path: Path) -> None:
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
def night_folder(tiny_ran: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write recipes for suites, and gate baselines for two entries."""
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
def test_night_completes_despite_failures_and_names_the_regression(night_folder: Path) -> None:
    suite = night_folder / "suite.yaml"
    entries = ("recipe: tiny.yaml", "recipe: broken.yaml", "{recipe: endless.yaml, time_limit_minutes: 0.02}", DEGRADED)
    listed = "\n".join(f"  - {entry}" for entry in entries)
    suite.write_text(f"name: all\nbudget_minutes: 60\nbaselines: baselines\n{LENIENT}\nentries:\n{listed}\n")
    done = tiny_run.compress("nightly", "suite.yaml", "--json", folder=night_folder)
    assert done.returncode == 3, done.stderr
    night_record = json.loads(done.stdout)
    outcomes = {entry_outcome["entry"]: entry_outcome for entry_outcome in night_record["outcomes"]}
    statuses = {name: entry_outcome["status"] for name, entry_outcome in outcomes.items()}
    assert statuses == {"tiny": "passed", "broken": "failed", "endless": "failed", "degraded": "missed"}
    assert outcomes["broken"]["exit_code"] == 2
    assert "nowhere" in outcomes["broken"]["reason"]
    # It ends as by Ctrl-C, or is still importing.
    assert outcomes["endless"]["exit_code"] in (130, -signal.SIGTERM)
    assert 1.2 <= outcomes["endless"]["seconds"] < 1.2 + 25
    (gated,) = [finding for finding in night_record["findings"] if finding["kind"] == "gate"]
    assert (gated["entry"], gated["metric"], gated["target"]) == ("degraded", "accuracy", "cpu")
    report = json.loads((night_folder / outcomes["degraded"]["report"]).read_text())
    final = {row["metric"]: row["value"] for row in report["measurements"] if row["model"] == "final"}
    assert gated["effect"] < -0.005
    assert f"{final['accuracy'] * 100:.2f}%" in gated["what"]
    again = tiny_run.compress("nightly", "suite.yaml", "--only", "degraded", folder=night_folder)
    assert again.returncode == 1, again.stderr
    assert "degraded: accuracy on cpu" in again.stdout
    assert "since night 1" in again.stdout
    series = NightHistory(night_folder / "artifacts" / "nights" / "all" / "history.sqlite", ignore).series("all")
    values = {(line.entry, line.model, line.metric): [point.value for point in line.points] for line in series}
    assert values["degraded", "final", "accuracy"] == [final["accuracy"]] * 2


@pytest.mark.slow
def test_level_change_fails_on_its_third_night(night_folder: Path) -> None:
    measured = tiny_run.read_report(night_folder / "artifacts")["measurements"]
    size = {(record["model"], record["metric"]): record["value"] for record in measured}["final", "size_bytes"]
    history = NightHistory(night_folder / "drifting.sqlite", ignore)
    for number, value in enumerate([size * 0.99] * 9 + [size] * 2):
        earlier_night = night(number, [outcome()], host=HERE).model_copy(update={"suite": "drifting"})
        history.append(earlier_night, {"tiny": (row("size_bytes", value, "bytes"),)})
    suite = night_folder / "drifting.yaml"
    suite.write_text(f"name: drifting\nhistory: drifting.sqlite\n{LENIENT}\nentries: [{{recipe: tiny.yaml}}]\n")
    done = tiny_run.compress("nightly", suite.name, folder=night_folder)
    assert done.returncode == 1, done.stderr
    assert "tiny: size_bytes on cpu: the level changed by +1.0%" in done.stdout
    assert "since night 10 (2026-08-10)" in done.stdout
    read = history.read("drifting")[-1]
    assert ([item.status for item in read.outcomes], [item.kind for item in read.findings]) == (["missed"], ["drift"])


@pytest.mark.slow
def test_terminated_night_keeps_results_and_leaves_no_processes(night_folder: Path) -> None:
    suite = night_folder / "cut.yaml"
    suite.write_text(f"name: cut\n{LENIENT}\nentries: [{{recipe: unread.yaml}}, {{recipe: endless.yaml}}]\n")
    # Started as a new process like a user's, since `tiny_run.start` would fork the entries.
    process = tiny_run.start_anew("nightly", suite.name, folder=night_folder)
    logs = night_folder / "artifacts" / "nights" / "cut"
    end = time.monotonic() + 300
    while time.monotonic() < end and not any("finetune" in log.read_text() for log in logs.glob("*/endless/run.log")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert psutil.wait_procs(family, timeout=20)[1] == []
    assert "the night was interrupted" in stdout
    (read,) = NightHistory(logs / "history.sqlite", ignore).read("cut")
    assert [entry_outcome.status for entry_outcome in read.outcomes] == ["failed", "not run"]


FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FAMILY


def run(folder: Path, script: str, limit: float = 60.0, grace: float = 5.0) -> EndedProcess:
    return run_process([sys.executable, "-c", script], folder / "out", folder / "log", limit, grace)


def are_gone(pids: list[int]) -> bool:
    """Return whether all these processes end within 10 s, ignoring zombies."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.02)
    return False


def test_process_output_errors_and_exit_code_are_kept(tmp_path: Path) -> None:
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(len(sys.stdin.read()) + 7)"
    ended = run(tmp_path, script)
    assert (ended.exit_code, ended.timed_out) == (7, False)
    assert (tmp_path / "out").read_text() == "out\n"
    assert (tmp_path / "log").read_text() == "err\n"


def test_killed_process_reports_its_signal(tmp_path: Path) -> None:
    ended = run(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert (ended.exit_code, ended.timed_out) == (-signal.SIGKILL, False)


@pytest.mark.parametrize(("script", "code"), [(FAMILY, -signal.SIGTERM), (STUBBORN, -signal.SIGKILL)])
def test_hanging_process_is_ended_with_its_children(tmp_path: Path, script: str, code: int) -> None:
    ended = run(tmp_path, script, limit=2.0, grace=0.5)
    assert (ended.exit_code, ended.timed_out) == (code, True)
    assert ended.seconds >= 2.0
    pids = [int(pid) for pid in (tmp_path / "out").read_text().split()]
    assert len(pids) == 2
    assert are_gone(pids)


INTERRUPTED = f"""
import signal, sys
from pathlib import Path
from compress.plugins.nightly.entry_run import run_process
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    run_process([sys.executable, "-c", {FAMILY!r}], Path("out"), Path("log"), 60.0, 5.0)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_interrupt_ends_the_child_processes(tmp_path: Path) -> None:
    """A separate process is interrupted, since libraries in the test process install signal handlers."""
    night = subprocess.Popen([sys.executable, "-c", INTERRUPTED], cwd=tmp_path)
    out, end = tmp_path / "out", time.monotonic() + 30
    while time.monotonic() < end and not (out.exists() and out.read_text()):
        time.sleep(0.02)
    night.send_signal(signal.SIGINT)
    assert night.wait(timeout=30) == 130
    pids = [int(pid) for pid in out.read_text().split()]
    assert len(pids) == 2
    assert are_gone(pids)


ROOT = Path(__file__).parents[3]
SUITES = sorted((ROOT / "benchmarks" / "suites").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    (folder / "a.yaml").write_text("name: a\n")
    path = folder / "suite.yaml"
    path.write_text(text)
    return path


def test_every_suite_field_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
name: night
budget_minutes: 90
history: history.sqlite
baselines: baselines
policy: {rules: [{metric: latency_ms, worse_by: 7%}]}
entries:
  - recipe: a.yaml
  - {recipe: a.yaml, name: b, set: [seed=1], targets: [cpu], time_limit_minutes: 5,
     policy: {rules: [{metric: accuracy, worse_by: 1 points}]}}
""",
    )
    suite = read_suite(path)
    first, second = suite.entries
    assert (suite.name, suite.budget_minutes, suite.history) == ("night", 90, "history.sqlite")
    assert suite.policy.rules[0].margin == (0.07, True)
    assert (first.label, first.overrides, first.policy, first.time_limit_minutes) == ("a", (), None, None)
    assert (second.label, second.overrides, second.time_limit_minutes) == ("b", ("seed=1", "targets=[cpu]"), 5)
    assert second.policy is not None
    assert second.policy.rules[0].margin == (0.01, False)
    assert select_entries(suite, ["b"]).entries == (second,)
    with pytest.raises(InputError, match="no entry 'c'"):
        select_entries(suite, ["c"])


def test_all_suite_errors_are_reported_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """name: a night
budget_minutes: 0
baseline: folder
entries:
  - recipe: b.yaml
  - recipe: a.yaml
  - {recipe: a.yaml, targets: [cpus], time_limit_minutes: -1}
policy: {rules: [{metric: latency_ms, worse_by: much}]}
""",
    )
    with pytest.raises(InputError) as refused:
        read_suite(path)
    text = str(refused.value)
    assert "The suite has 8 problems" in text
    lines = [(f"{path}:{line}: {field}", word) for line, field, word in (
        (1, "name", "form"), (2, "budget_minutes", "above 0"), (3, "baseline", "'baselines'"),
        (5, "entries.0.recipe", "'b.yaml', where no file lies"), (7, "entries.2.recipe", "a second entry 'a'"),
        (7, "entries.2.targets.0", "'cpu'"), (7, "entries.2.time_limit_minutes", "above 0"),
        (8, "policy.rules.0.worse_by", "a margin"),
    )]  # fmt: skip
    for start, word in lines:
        (line,) = [line for line in text.splitlines() if line.strip().startswith(start)]
        assert word in line
    assert "recipe has" not in text


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_suites_in_the_repository_are_valid(path: Path) -> None:
    assert read_suite(path).name == path.stem
    jsonschema.validate(yaml.safe_load(path.read_text()), suite_schema())


def test_published_suite_schema_is_current_and_rejects_unknown_fields() -> None:
    assert json.loads((ROOT / "docs" / "suite.schema.json").read_text()) == suite_schema(), "run `make docs`"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "x", "entries": [{"recipe": "a", "target": "cpu"}]}, suite_schema())
