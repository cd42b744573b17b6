"""Tests that follow tutorials: files of titled code blocks are written, and commands of console blocks are run."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.data.samples.fetch import sample_directory

TUTORIALS = Path(__file__).parent.parent / "docs" / "tutorials"


def write_reviews(folder: Path) -> None:
    """Write the file that the reader of the tutorial has: rows of the sample under other names of columns."""
    import pyarrow.parquet as pq

    rows = pq.read_table(sample_directory("movie-reviews") / "train.parquet").slice(0, 200).to_pylist()
    with (folder / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("review", "sentiment"), *((row["text"], row["label"]) for row in rows)])


QUICK = ("--set", "benchmark.seconds=0.2", "--set", "benchmark.every_stage=false")
"""Options that are added to `compress run`: the test is not about times."""


def follow(page: Path, folder: Path) -> list[str]:
    """Write and run everything in the order of the page. Returns the commands."""
    commands = []
    for header, block in re.findall(r"^```(\w+[^\n]*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        if title := re.search(r'title="([^"]+)"', header):
            (folder / title[1]).write_text(block)
        for line in block.splitlines() if header == "console" else ():
            program, *arguments = shlex.split(line, comments=True)
            words = [sys.executable, "-P", *(["-m", "compress"] if program == "compress" else []), *arguments]
            words += QUICK if arguments[:1] == ["run"] else ()
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=900)
            # A missed limit, exit code 1, is a result: times and accuracy depend on the machine.
            assert done.returncode in (0, 1), f"{line}\n{done.stdout}{done.stderr}"
            commands.append(shlex.join([program, *arguments]))
    return commands


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "prepare", "name"),
    [("classifier.md", write_reviews, "reviews"), ("onnx-file.md", lambda folder: None, "smaller")],
    ids=("classifier", "onnx-file"),
)
def test_tutorial_works_as_it_is_written(page: str, prepare: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    commands = follow(TUTORIALS / page, tmp_path)
    assert f"compress run {name}.yaml" in commands
    run = tmp_path / "artifacts" / "runs" / name / "latest"
    assert json.loads((run / "report.json").read_text())["schema"] == 1
    assert any((run / "model").rglob("*.onnx"))
