"""Names and texts from strangers reach the terminal without control characters."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import rich.table
from command_line import invoke
from rich.text import Text
from safetensors.numpy import save_file

from compress.report.notebook import terminal_text
from compress.report.pages import write_report
from compress.results.report import Report
from compress.utils.terminal import Console, printable

HOSTILE = "a\x1b]0;title\x07b\x1b[2Jc\x9b1Ad\u202ee"
SHOWN = "a\\x1b]0;title\\x07b\\x1b[2Jc\\x9b1Ad\\u202ee"


def test_control_characters_are_shown_as_escapes() -> None:
    assert printable(HOSTILE) == SHOWN and printable("tab\tline\n\u00e9\u4e2d") == "tab\tline\n\u00e9\u4e2d"
    # Styles of the console itself still reach a terminal.
    out = io.StringIO()
    table = rich.table.Table()
    table.add_column(HOSTILE)
    table.add_row(Text(HOSTILE, style="bold red"))
    console = Console(file=out, force_terminal=True, width=200, color_system="standard")
    console.print(table, HOSTILE, Text(HOSTILE))
    written = out.getvalue()
    assert written.count("a\\x1b]0;titleb") > 1 and "\x1b[1;31m" in written
    assert not {"\x07", "\x9b", "\u202e"} & set(written) and "\x1b]0" not in written and "\x1b[2J" not in written


def test_printed_views_show_no_control_characters() -> None:
    text = terminal_text(Text(HOSTILE))
    assert "\\x1b]0;titleb" in text and not {"\x07", "\x9b", "\x1b", "\u202e"} & set(text)


def test_commands_show_no_control_characters_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "bert"}))
    save_file({HOSTILE: np.zeros((4, 4), np.float32)}, model / "model.safetensors")
    write_report(Report(recipe=HOSTILE, notes=(HOSTILE,)), tmp_path)
    for command in (["inspect", model], ["report", tmp_path]):
        output = invoke(*command).output
        assert "\\x1b]0;title" in output, command
        assert not {"\x07", "\x9b", "\x1b", "\u202e"} & set(output), command
