"""Tests of the history database and of drift detection on it."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from nights import FIRST, HOST, METRICS, SUITE, fill, ignore, night, outcome, row, start_writer
from safetensors.numpy import save_file

from compress.plugins.nightly.drift import MetricDrift, drift_finding, find_drifts
from compress.plugins.nightly.history import NightHistory
from compress.plugins.nightly.record import Host, Night, NightFinding
from compress.plugins.nightly.run import describe_weight_changes, last_passed, with_weight_changes
from compress.recipe.policy import Policy, Rule
from compress.report.run_folder import NAME
from compress.results.report import Report
from compress.utils.errors import InputError, StorageError

OTHER = Host(digest="00000000000000bb", words="Another processor")


@pytest.fixture
def history(tmp_path: Path) -> NightHistory:
    return NightHistory(tmp_path / "deep" / "history.sqlite", ignore)


def test_history_is_empty_before_the_first_night(history: NightHistory) -> None:
    assert history.read(SUITE) == ()
    assert history.series(SUITE) == ()
    assert not history.path.exists()


def test_appended_night_is_read_back_unchanged(history: NightHistory) -> None:
    finding = NightFinding(
        entry="tiny", kind="gate", metric="accuracy", target="cpu", effect=-0.01, what="lower", since="1"
    )
    first_night = night(0, [outcome(notes=("a", "b")), outcome("bad", "failed", reason="why", exit_code=-9)], [finding],
                 software={"kernel": "6"}, commit="ab" * 20)  # fmt: skip
    rows = (row("accuracy", 0.75, "ratio", spread=0.1), row("size_bytes", 123456789.0, "bytes"))
    appended = history.append(first_night, {"tiny": rows})
    assert appended == first_night.model_copy(update={"number": 1})
    assert history.read(SUITE) == (appended,)
    series = history.series(SUITE)
    assert [(line.entry, line.metric, line.unit, line.host) for line in series] == [
        ("tiny", "accuracy", "ratio", HOST),
        ("tiny", "size_bytes", "bytes", HOST),
    ]
    assert series[0].points == ((1, first_night.started, 0.75, rows[0].low, rows[0].high, True),)


def test_suites_and_hosts_have_separate_series(history: NightHistory) -> None:
    for number in range(4):
        host = OTHER if number % 2 else HOST
        history.append(night(number, host=host), {"tiny": (row("latency_ms", 1.0 + number, "ms"),)})
    other = night(9).model_copy(update={"suite": "other"})
    history.append(other, {"tiny": (row("latency_ms", 99.0, "ms"),)})
    lines = {line.host.digest: [point.value for point in line.points] for line in history.series(SUITE)}
    assert lines == {HOST.digest: [1.0, 3.0], OTHER.digest: [2.0, 4.0]}
    assert [past_night.number for past_night in history.read(SUITE)] == [1, 2, 3, 4]
    assert [past_night.number for past_night in history.read("other")] == [5]


def test_clock_set_back_keeps_the_order_and_gives_a_note(history: NightHistory) -> None:
    first = history.append(night(0), {"tiny": (row("latency_ms", 1.0, "ms"),)})
    back = history.append(night(1, started=FIRST - timedelta(days=400)), {"tiny": (row("latency_ms", 2.0, "ms"),)})
    again = history.append(night(2), {"tiny": (row("latency_ms", 3.0, "ms"),)})
    assert (first.notes, again.notes) == ((), ())
    assert len(back.notes) == 1
    assert back.started in back.notes[0]
    assert first.started in back.notes[0]
    assert [point.value for point in history.series(SUITE)[0].points] == [1.0, 2.0, 3.0]
    assert history.read(SUITE)[1].notes == back.notes


def test_interrupted_append_leaves_no_night(history: NightHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    history.append(night(0), {"tiny": (row("latency_ms", 1.0, "ms"),)})

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.plugins.nightly.history._insert_many", stop)
    with pytest.raises(KeyboardInterrupt):
        history.append(night(1), {"tiny": (row("latency_ms", 2.0, "ms"),)})
    monkeypatch.undo()
    assert [past_night.number for past_night in history.read(SUITE)] == [1]


def test_concurrent_writers_lose_no_nights(history: NightHistory) -> None:
    writers = [start_writer(history.path, name, 15) for name in ("a", "b")]
    error_outputs = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], error_outputs
    assert [past_night.number for past_night in history.read(SUITE)] == list(range(1, 31))
    series = history.series(SUITE)
    assert len(series) == 2 * METRICS
    for line in series:
        index = int(line.metric.removeprefix("metric_"))
        assert [point.value for point in line.points] == [100.0 * number + index for number in range(15)]


def test_folder_and_foreign_database_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder"):
        NightHistory(tmp_path, ignore).read(SUITE)
    stranger = tmp_path / "stranger.sqlite"
    with sqlite3.connect(stranger) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    connection.close()
    bytes_before = stranger.read_bytes()
    with pytest.raises(InputError, match="no history of nights"):
        NightHistory(stranger, ignore).append(night(0), {})
    assert stranger.read_bytes() == bytes_before


def test_a_newer_schema_is_refused(history: NightHistory) -> None:
    history.append(night(0), {})
    with sqlite3.connect(history.path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(InputError, match="schema 2"):
        history.read(SUITE)


def test_unwritable_history_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="history cannot be used"):
        NightHistory(tmp_path / "file" / "history.sqlite", ignore).append(night(0), {})


POLICY = Policy(rules=(Rule(metric="latency_ms", worse_by="3%"), Rule(metric="accuracy", worse_by="0.5 points")))


def drifts(history: NightHistory, accepted: str | None = None, policy: Policy = POLICY) -> list[MetricDrift]:
    return find_drifts(history.series(SUITE), policy, accepted, history.read(SUITE)[-1])


def noisy(levels: Sequence[float], spread: float = 0.01) -> list[float]:
    random = np.random.default_rng(1)
    return [float(level * np.exp(random.normal(0, spread))) for level in levels]


def test_drift_reports_size_and_first_night(history: NightHistory) -> None:
    fill(history, noisy([1.0] * 30 + [1.06] * 5))
    (drift,) = drifts(history)
    assert (drift.first, drift.steps, drift.fails) == (31, 1, True)
    assert drift.effect == pytest.approx(0.06, abs=0.012)
    finding = drift_finding(drift, history.series(SUITE), {past.number: past for past in history.read(SUITE)})
    assert finding.culprit == "tiny: latency_ms on cpu"
    assert finding.since == "night 31 (2026-08-31)"
    assert "+" in finding.what


@pytest.mark.parametrize(
    ("levels", "metric", "unit"),
    [
        ([1.0] * 35, "latency_ms", "ms"),
        ([1.0] * 30 + [0.9] * 5, "latency_ms", "ms"),  # faster
        ([1.0] * 20 + [1.06] * 10 + [1.0] * 10, "latency_ms", "ms"),  # repaired
        ([1.0] * 30 + [1.02] * 30, "latency_ms", "ms"),  # below the margin
        ([1.0] * 30 + [1.06] * 5, "startup_ms", "ms"),  # no rule
        ([1.0] * 30 + [1.06] * 5, "latency_p99_ms", "ms"),  # no rule
    ],
)
def test_harmless_series_have_no_drift(history: NightHistory, levels: list[float], metric: str, unit: str) -> None:
    fill(history, noisy(levels), metric, unit)
    assert drifts(history) == []


def test_small_steps_add_up(history: NightHistory) -> None:
    fill(history, noisy([1.0] * 25 + [1.02] * 25 + [1.04] * 25, spread=0.004))
    (drift,) = drifts(history)
    assert (drift.steps, drift.first) == (2, 26)
    assert drift.effect == pytest.approx(0.04, abs=0.004)


def test_accuracy_drifts_in_points(history: NightHistory) -> None:
    fill(history, [0.9] * 10 + [0.892] * 3, "accuracy", "ratio")
    (drift,) = drifts(history)
    assert drift.effect == pytest.approx(-0.008)
    assert drift.series.written(drift.effect) == "-0.80 points"


def test_new_baseline_accepts_earlier_changes(history: NightHistory) -> None:
    fill(history, noisy([1.0] * 20 + [1.06] * 20))
    after_step = (FIRST + timedelta(days=25)).isoformat()
    before_step = (FIRST + timedelta(days=5)).isoformat()
    assert len(drifts(history, accepted=before_step)) == 1
    assert drifts(history, accepted=after_step) == []


def test_other_hosts_and_unmeasured_entries_have_no_drift(history: NightHistory) -> None:
    fill(history, noisy([1.0] * 30 + [1.06] * 5))
    other = Host(digest="bb", words="Another processor")
    history.append(night(36, host=other), {"tiny": (row("latency_ms", 9.0, "ms"),)})
    assert drifts(history) == []
    history.append(night(37, [outcome(status="failed")]), {})
    assert drifts(history) == []


def with_reference(history: NightHistory, levels: Sequence[float], machine: Sequence[float]) -> None:
    for number, (level, kernel) in enumerate(zip(noisy(levels, 0.005), machine, strict=True)):
        rows = (row("latency_ms", level, "ms"), row("reference_matmul_ms", kernel, "ms", "machine"))
        history.append(night(number, [outcome()]), {"tiny": rows})


@pytest.mark.parametrize(
    ("level", "kernel", "net", "fails"), [(1.08, 5.4, 0.0, False), (1.12, 5.25, 1.12 / 1.05 - 1, True)]
)
def test_change_of_machine_speed_is_subtracted(
    history: NightHistory, level: float, kernel: float, net: float, fails: bool
) -> None:
    with_reference(history, [1.0] * 20 + [level] * 6, [5.0] * 20 + [kernel] * 6)
    (drift,) = drifts(history)
    assert drift.machine == pytest.approx(kernel / 5 - 1)
    assert (drift.net, drift.fails) == (pytest.approx(net, abs=0.006), fails)


def test_disturbed_nights_are_excluded_from_drift(history: NightHistory) -> None:
    for number, level in enumerate(noisy([1.0] * 20 + [2.0] * 5 + [1.0])):
        noise = "unusable" if 20 <= number < 25 else "quiet"
        history.append(night(number, [outcome(noise=noise)]), {"tiny": (row("latency_ms", level, "ms"),)})
    (series,) = history.series(SUITE)
    assert (len(series.points), len(series.usable), len(series.levels)) == (26, 21, 1)
    assert drifts(history) == []


def test_drift_finding_names_changes_of_that_night(history: NightHistory) -> None:
    for number, level in enumerate(noisy([1.0] * 20 + [1.08] * 5)):
        late = number >= 20
        rows = (row("latency_ms", level, "ms"), row("latency_ms", 2 * level, "ms", "baseline"))
        night_outcome = outcome(recipe_digest="bb" if late else "aa")
        software = {"onnxruntime": "1.32.0" if late else "1.31.0", "kernel": "6.1"}
        commit = ("c" if late else "b") * 40
        history.append(night(number, [night_outcome], software=software, commit=commit), {"tiny": rows})
    series, read = history.series(SUITE), history.read(SUITE)
    (drift,) = drifts(history)
    told_of = drift_finding(drift, series, {past_night.number: past_night for past_night in read})
    assert told_of.since == "night 21 (2026-08-21, commit ccccccc)"
    assert "the recipe was changed" in told_of.what
    assert "onnxruntime 1.31.0 \u2192 1.32.0" in told_of.what
    assert "kernel" not in told_of.what
    assert "the baseline model changed by +" in told_of.what
    assert all(line.host == HOST for line in series)


WEIGHT = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)


def ran(artifacts: Path, place: int, weight: np.ndarray, status: str = "passed") -> Night:
    """Write the model and report of one night's entry and return the night."""
    report = "report.json" if status != "failed" else None
    past_night = night(place, [outcome(status=status, report=report)]).model_copy(update={"number": place + 1})
    began = datetime.fromisoformat(past_night.started)
    run = artifacts / "runs" / "recipe" / (began + timedelta(seconds=3)).strftime(NAME)
    entry_folder = artifacts / "nights" / SUITE / began.strftime(NAME) / "tiny"
    text = Report(recipe="recipe", started=(began + timedelta(seconds=3)).isoformat(timespec="seconds")).to_json()
    for folder in (run / "model", entry_folder):
        folder.mkdir(parents=True)
    (run / "report.json").write_text(text)
    (entry_folder / "report.json").write_text(text)
    save_file({"layers.0.w.weight": WEIGHT, "layers.1.w.weight": weight}, run / "model" / "model.safetensors")
    return past_night


def test_layer_changed_since_the_last_passed_night_is_named(tmp_path: Path) -> None:
    nights = [ran(tmp_path, 0, WEIGHT), ran(tmp_path, 1, WEIGHT, "missed"), ran(tmp_path, 2, WEIGHT * 2, "missed")]
    good = last_passed(nights, "tiny")
    assert good is nights[0]
    words = describe_weight_changes(good, nights[2], "tiny", tmp_path)
    assert words is not None and nights[0].label in words
    assert "first in layers.1" in words and "2.000 times what it was" in words
    finding = NightFinding(entry="tiny", kind="gate", metric="accuracy", target="cpu", what="fell")
    assert with_weight_changes(finding, words).what == f"fell; {words}"
    assert with_weight_changes(finding.model_copy(update={"kind": "budget"}), words).what == "fell"


def test_missing_models_give_no_weight_changes(tmp_path: Path) -> None:
    first, second = ran(tmp_path, 0, WEIGHT), ran(tmp_path, 1, WEIGHT)
    (tmp_path / "runs" / "recipe").rename(tmp_path / "elsewhere")
    assert describe_weight_changes(first, second, "tiny", tmp_path) is None
    assert describe_weight_changes(None, second, "tiny", tmp_path) is None
    assert with_weight_changes(NightFinding(entry="tiny", kind="gate", what="fell"), None).what == "fell"
