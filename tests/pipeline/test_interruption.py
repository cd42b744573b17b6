"""Runs that are killed or interrupted, as processes: the next run goes on and ends with the same bits."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import tiny_run
from forked import Forked

from compress.pipeline.cache import Cache

pytestmark = pytest.mark.slow
LABELS = tiny_run.LABELS_OF_STAGES
# The exported model as the baseline: any other would be exported once more, to be measured.
OPTIONS = ("--set", "benchmark.every_stage=false", "--set", "baseline=onnx")
PATIENCE_SECONDS = 300.0
NOISE = ("site-packages", "torchao", "Failed to load", "Warning", "deprecated")
"""What other libraries would say on the terminal."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, data and recipe, and the artifacts of an undisturbed run."""
    folder = tmp_path_factory.mktemp("place")
    recipe = tiny_run.write_all(folder)
    done = tiny_run.compress_anew("run", recipe, "--artifacts", folder / "artifacts", *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if any(noise in line for noise in NOISE)]
    return folder


def start(place: Path, artifacts: Path) -> Forked:
    """A run in a process group of its own, as a terminal starts it."""
    return tiny_run.start("run", place / "tiny.yaml", "--artifacts", artifacts, *OPTIONS)


def wait_for(process: Forked, artifacts: Path, text: str) -> None:
    """Until the run's log has ``text``."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if any(text in log.read_text() for log in artifacts.glob("runs/tiny/*/run.log")):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    raise AssertionError(f"the run never said {text!r}")


def finish(place: Path, artifacts: Path) -> dict[str, bool]:
    """Run to the end; label -> whether the stage came from the cache."""
    done = tiny_run.compress("run", place / "tiny.yaml", "--artifacts", artifacts, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert tiny_run.stage_digests(artifacts) == tiny_run.stage_digests(place / "artifacts")
    assert Cache(artifacts / "cache").remove_partial() == 0
    return tiny_run.cached_stages(tiny_run.read_report(artifacts))


def all_done(place: Path, artifacts: Path) -> None:
    """Artifacts in which every stage is done and nothing is measured."""
    for stage in tiny_run.read_report(place / "artifacts")["stages"]:
        shutil.copytree(place / "artifacts" / "cache" / stage["key"], artifacts / "cache" / stage["key"])


def kill(process: Forked) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def from_the_cache(artifacts: Path) -> list[str]:
    """What the run that began last took from there, by its log."""
    log = max(artifacts.glob("runs/tiny/20*/run.log")).read_text()
    return re.findall(r"(\w+): from the cache$", log, flags=re.MULTILINE)


def test_a_run_killed_within_each_stage_goes_on_from_there(place: Path, tmp_path: Path) -> None:
    for index, label in enumerate(LABELS):
        process = start(place, tmp_path)
        # The first is killed while it trains, the others at any moment.
        wait_for(process, tmp_path, f"[{index + 1}/{len(LABELS)}] {label}\n" if index else "finetune (")
        kill(process)
        assert from_the_cache(tmp_path) == list(LABELS[: max(index - 1, 0)])
        assert not (tmp_path / "runs" / "tiny" / "latest").exists()
        # What a stage left half-done counts for nothing.
        folders = {path.name[:8] for path in (tmp_path / "cache").iterdir() if path.is_dir()}
        assert index or folders == {"partial-"}
        assert len(Cache(tmp_path / "cache").entries()) == index
    assert list(finish(place, tmp_path).values()) == [True] * (len(LABELS) - 1) + [False]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_ends_while_it_measures_leaves_no_process_and_goes_on(
    place: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    all_done(place, tmp_path)
    process = start(place, tmp_path)
    wait_for(process, tmp_path, "evaluate onnx_int8")
    run = psutil.Process(process.pid)
    end = time.monotonic() + PATIENCE_SECONDS
    while not (children := run.children(recursive=True)) and time.monotonic() < end:
        time.sleep(0.005)
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.kill()
    _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == (130 if sent == signal.SIGINT else -sent)
    assert "Traceback" not in stderr
    assert psutil.wait_procs(children, timeout=20)[1] == []
    if sent == signal.SIGKILL:
        assert all(finish(place, tmp_path).values())


def test_an_interrupt_says_one_line_and_the_next_run_goes_on(place: Path, tmp_path: Path) -> None:
    older = tmp_path / "runs" / "tiny" / "older"
    older.mkdir(parents=True)
    (older.parent / "latest").symlink_to("older")
    for moment in ("finetune (", "[5/6] onnx"):
        process = start(place, tmp_path)
        wait_for(process, tmp_path, moment)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 130
        assert stdout == ""
        assert "Traceback" not in stderr
        assert [line for line in stderr.splitlines() if "nterrupt" in line] == [stderr.splitlines()[-1]]
        assert (older.parent / "latest").resolve() == older
        assert [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("partial-")] == []
        log = max(tmp_path.glob("runs/tiny/20*/run.log"))
        assert log.read_text().splitlines()[-1].endswith(" interrupted")
        assert {path.name for path in log.parent.iterdir()} == {"run.log", "recipe.yaml"}
        assert from_the_cache(tmp_path) == []
    assert list(finish(place, tmp_path).values()) == [True] * 4 + [False] * 2
