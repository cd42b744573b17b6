"""A night says which weights moved when a number did, where both models are still there."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from nights import SUITE, night, outcome
from safetensors.numpy import save_file

from compress.plugins.nightly.night_diff import (
    describe_weight_changes,
    last_passed,
    previous_night,
    with_weight_changes,
)
from compress.plugins.nightly.record import Night, NightFinding
from compress.report.run_folder import folder_name
from compress.results.report import Report

WEIGHT = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)


def ran(artifacts: Path, place: int, weight: np.ndarray, status: str = "passed") -> Night:
    """A night whose entry has left a model and a report."""
    report = "report.json" if status != "failed" else None
    past_night = night(place, [outcome(status=status, report=report)]).model_copy(update={"number": place + 1})
    began = datetime.fromisoformat(past_night.started)
    run = artifacts / "runs" / "recipe" / folder_name(began + timedelta(seconds=3))
    entry_folder = artifacts / "nights" / SUITE / folder_name(began) / "tiny"
    text = Report(recipe="recipe", started=(began + timedelta(seconds=3)).isoformat(timespec="seconds")).to_json()
    for folder in (run / "model", entry_folder):
        folder.mkdir(parents=True)
    (run / "report.json").write_text(text)
    (entry_folder / "report.json").write_text(text)
    save_file({"layers.0.w.weight": WEIGHT, "layers.1.w.weight": weight}, run / "model" / "model.safetensors")
    return past_night


def test_the_layer_that_moved_since_the_last_good_night_is_named(tmp_path: Path) -> None:
    nights = [ran(tmp_path, 0, WEIGHT), ran(tmp_path, 1, WEIGHT, "missed"), ran(tmp_path, 2, WEIGHT * 2, "missed")]
    good = last_passed(nights, "tiny")
    assert good is nights[0]
    words = describe_weight_changes(good, nights[2], "tiny", tmp_path)
    assert words is not None and nights[0].label in words
    assert "first in layers.1" in words and "2.000 times what it was" in words
    finding = NightFinding(entry="tiny", kind="gate", metric="accuracy", target="cpu", what="fell")
    assert with_weight_changes(finding, words).what == f"fell; {words}"
    assert with_weight_changes(finding.model_copy(update={"kind": "budget"}), words).what == "fell"


def test_weights_that_did_not_move_are_said_to_be_those_of_the_night_before(tmp_path: Path) -> None:
    nights = {past_night.number: past_night for past_night in (ran(tmp_path, 0, WEIGHT), ran(tmp_path, 1, WEIGHT))}
    previous = previous_night(nights, "tiny", 2)
    assert previous is nights[1]
    assert (
        describe_weight_changes(previous, nights[2], "tiny", tmp_path) == f"its weights are those of {nights[1].label}"
    )


def test_nothing_is_said_of_models_that_are_gone(tmp_path: Path) -> None:
    first, second = ran(tmp_path, 0, WEIGHT), ran(tmp_path, 1, WEIGHT)
    (tmp_path / "runs" / "recipe").rename(tmp_path / "elsewhere")
    assert describe_weight_changes(first, second, "tiny", tmp_path) is None
    assert describe_weight_changes(None, second, "tiny", tmp_path) is None
    assert with_weight_changes(NightFinding(entry="tiny", kind="gate", what="fell"), None).what == "fell"
