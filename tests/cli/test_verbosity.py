"""Tests of `--quiet` and `--verbose`: lines on the console, and the same lines in the run's log in every case."""

from __future__ import annotations

import io
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_generation
from rich.console import Console

from compress.report.progress import ConsoleProgress
from compress.utils.progress import LOGGER, SilentProgress, set_verbosity

Call = Callable[..., Any]
LAYERS = re.compile(r"model\.layers\.\d: self_attn\.q_proj 4 bits [0-9.]+%")


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """Restore the level of the logger, which a command sets for the whole process."""
    level = LOGGER.level
    yield
    LOGGER.setLevel(level)


@pytest.mark.parametrize(
    ("quiet", "verbose", "shown"),
    [(True, False, ""), (False, False, "a note\n"), (False, True, "a note\na detail\n")],
)
def test_console_shows_what_the_options_ask_for(quiet: bool, verbose: bool, shown: str) -> None:
    set_verbosity(quiet, verbose)
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out))
    progress.note("a note")
    progress.detail("a detail")
    assert out.getvalue() == shown


def test_quiet_terminal_shows_no_bar() -> None:
    set_verbosity(quiet=True, verbose=False)
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out, force_terminal=True))
    assert (list(progress.track("abc", "letters", 3)), out.getvalue()) == (["a", "b", "c"], "")


def test_lines_without_a_console_reach_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "compress"):
        SilentProgress().note("a note")
        SilentProgress().detail("a detail")
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.INFO, "a note"),
        (logging.DEBUG, "a detail"),
    ]


@pytest.mark.parametrize("arguments", [("-q", "run", "tiny.yaml"), ("run", "tiny.yaml", "--quiet")])
def test_quiet_run_prints_its_result_only(
    arguments: tuple[str, ...], tiny_ran: Path, here: Call, tmp_path: Path
) -> None:
    place = shutil.copytree(tiny_ran, tmp_path / "place", symlinks=True)
    done = here(*arguments, folder=place)
    assert (done.returncode, done.stderr) == (0, "")
    assert "accuracy" in done.stdout.lower()
    log = (place / "artifacts" / "runs" / "tiny" / "latest" / "run.log").read_text()
    assert "from the cache" in log


@pytest.mark.parametrize("arguments", [("check", "tiny.yaml", "-q"), ("-q", "check", "tiny.yaml")])
def test_quiet_check_prints_warnings_and_one_line(
    arguments: tuple[str, ...], tiny_ran: Path, here: Call, tmp_path: Path
) -> None:
    place = shutil.copytree(tiny_ran, tmp_path / "place", symlinks=True)
    done = here(*arguments, folder=place)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("tiny can run: ") and "peak memory" not in done.stdout
    # An option's value and words after -- are no options.
    assert here("check", "--", "-q", folder=place).returncode == 2


@pytest.mark.slow
def test_lines_of_layers_are_in_the_log_and_on_a_verbose_console(here: Call, tmp_path: Path) -> None:
    tiny_generation.write_all(tmp_path, stages=[tiny_generation.STAGES[0]], benchmark=tiny_generation.ONE_LAUNCH)
    for artifacts, option in (("plain", ()), ("detailed", ("-v",))):
        done = here(*option, "run", "tiny.yaml", "--artifacts", artifacts, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        log = (tmp_path / artifacts / "runs" / "tiny" / "latest" / "run.log").read_text()
        assert len(LAYERS.findall(log)) == 2
        assert len(LAYERS.findall(done.stderr)) == (2 if option else 0)
        assert len(re.findall("quantized \\d+ layers", done.stderr)) == 1


@pytest.mark.parametrize(("options", "lines"), [((), 1), (("-q",), 0)])
def test_quiet_hides_hints(options: tuple[str, ...], lines: int, here: Call, tmp_path: Path) -> None:
    done = here(*options, "recipes", "list", folder=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (0, lines)
    assert "quickstart" in done.stdout
