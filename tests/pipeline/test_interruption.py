"""Tests of killed and interrupted run processes: the resumed run is compared bit by bit with an undisturbed run."""

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
# The baseline is the exported model: any other would be exported a second time to be measured.
OPTIONS = ("--set", "benchmark.every_stage=false", "--set", "baseline=onnx")
PATIENCE_SECONDS = 300.0
NOISE = ("site-packages", "torchao", "Failed to load", "Warning", "deprecated")
"""Parts of warnings that other libraries would print on the terminal."""


@pytest.fixture(scope="module")
def recipe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with model, data and recipe, and the artifacts of an undisturbed run."""
    folder = tmp_path_factory.mktemp("place")
    recipe = tiny_run.write_all(folder)
    done = tiny_run.compress_anew("run", recipe, "--artifacts", folder / "artifacts", *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if any(noise in line for noise in NOISE)]
    return folder


def start(recipe_folder: Path, artifacts: Path) -> Forked:
    """Start a run in its own process group, as a terminal does."""
    return tiny_run.start("run", recipe_folder / "tiny.yaml", "--artifacts", artifacts, *OPTIONS)


def wait_for(process: Forked, artifacts: Path, text: str) -> None:
    """Wait until the run's log contains ``text``."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if any(text in log.read_text() for log in artifacts.glob("runs/tiny/*/run.log")):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    raise AssertionError(f"the run never said {text!r}")


def finish(recipe_folder: Path, artifacts: Path) -> dict[str, bool]:
    """Run to the end and return for each stage label whether it was a cache hit."""
    done = tiny_run.compress("run", recipe_folder / "tiny.yaml", "--artifacts", artifacts, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert tiny_run.stage_digests(artifacts) == tiny_run.stage_digests(recipe_folder / "artifacts")
    assert Cache(artifacts / "cache").remove_partial() == 0
    return tiny_run.cached_stages(tiny_run.read_report(artifacts))


def copy_stage_cache(recipe_folder: Path, artifacts: Path) -> None:
    """Copy the cache entries of all stages to ``artifacts``, without any measurement."""
    for stage in tiny_run.read_report(recipe_folder / "artifacts")["stages"]:
        shutil.copytree(recipe_folder / "artifacts" / "cache" / stage["key"], artifacts / "cache" / stage["key"])


def kill(process: Forked) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def cached_stages_in_log(artifacts: Path) -> list[str]:
    """Return the labels of the latest run's cache hits, read from its log."""
    log = max(artifacts.glob("runs/tiny/20*/run.log")).read_text()
    return re.findall(r"(\w+): from the cache$", log, flags=re.MULTILINE)


def test_run_killed_in_each_stage_resumes_from_that_stage(recipe_folder: Path, tmp_path: Path) -> None:
    for index, label in enumerate(LABELS):
        process = start(recipe_folder, tmp_path)
        # The first stage is killed while it trains, the others at an arbitrary moment.
        wait_for(process, tmp_path, f"[{index + 1}/{len(LABELS)}] {label}\n" if index else "finetune (")
        kill(process)
        assert cached_stages_in_log(tmp_path) == list(LABELS[: max(index - 1, 0)])
        assert not (tmp_path / "runs" / "tiny" / "latest").exists()
        # A partial folder is not a cache entry.
        folders = {path.name[:8] for path in (tmp_path / "cache").iterdir() if path.is_dir()}
        assert index or folders == {"partial-"}
        assert len(Cache(tmp_path / "cache").entries()) == index
    assert list(finish(recipe_folder, tmp_path).values()) == [True] * (len(LABELS) - 1) + [False]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_run_ended_while_measuring_leaves_no_child_process(
    recipe_folder: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    copy_stage_cache(recipe_folder, tmp_path)
    process = start(recipe_folder, tmp_path)
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
        assert all(finish(recipe_folder, tmp_path).values())


def test_interrupt_prints_one_line_and_next_run_resumes(recipe_folder: Path, tmp_path: Path) -> None:
    older = tmp_path / "runs" / "tiny" / "older"
    older.mkdir(parents=True)
    (older.parent / "latest").symlink_to("older")
    for moment in ("finetune (", "[5/6] onnx"):
        process = start(recipe_folder, tmp_path)
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
        assert cached_stages_in_log(tmp_path) == []
    assert list(finish(recipe_folder, tmp_path).values()) == [True] * 4 + [False] * 2
