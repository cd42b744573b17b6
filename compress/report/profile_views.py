"""A profile in the terminal, and as one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePath

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compress.bench.profile import Profile, Row
from compress.fitted_table import Column, FittedTable, bar
from compress.report import profile_words as words
from compress.report import rows
from compress.report.pages import render
from compress.report.roofline_chart import roofline_chart

_BAR = 5
_STYLES = {"arithmetic": "green", "memory": "cyan", "overhead": "yellow", "not counted": "red"}


def console_profile(profile: Profile) -> RenderableType:
    """Tables with bars; the notes are left to whoever writes to standard error."""
    return Group(
        _whole(profile),
        _rows("By operator type", "Operator", profile.by_operator()),
        _rows("By layer", "Layer", profile.by_layer()),
    )


def _whole(profile: Profile) -> RenderableType:
    whole = profile.whole
    what = "" if profile.phase == "batch" else f", {words.call_text(profile)}"
    title = Text(f"{profile.artifact} on {profile.target}{what}", overflow="fold")
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=SIMPLE)
    table.add_column()
    table.add_column(justify="right")
    uncounted = f" (without {words.time_text(whole.uncounted_ms)} not counted)" if whole.uncounted_ms else ""
    facts = [
        ("A call takes", f"{words.time_text(whole.time_ms)} ({words.interval_text(profile)})"),
        ("The machine would need", words.time_text(whole.limit_ms)),
        ("Share of the limit", words.share_text(whole.share_of_roof) + uncounted),
        ("Binds", words.binds_text(whole)),
        (
            "Operations",
            f"{words.count_text(whole.operations)} ({words.count_text(whole.int8_operations)} on 8-bit integers)",
        ),
        ("Reached", f"{words.rate_text(whole.operations_per_s, 'OP')}, {words.rate_text(whole.bytes_per_s, 'B')}"),
        *((f"Limit: {name[:1].lower()}{name[1:]}", value) for name, value in words.limit_facts(profile.limits)),
    ]
    for name, value in facts:
        table.add_row(name, Text(value))
    return Group(table, Text(words.verdict_text(profile)), Text(words.working_set_text(profile.limits)), Text(""))


def _rows(title: str, head: str, rows: Sequence[Row]) -> FittedTable:
    columns = [Column(head), Column("Time", right=True), Column("Share", right=True)]
    columns += [Column(name, right=True, rank=rank) for name, rank in (("GOP/s", 2), ("GB/s", 3), ("Limit", 1))]
    table = FittedTable(title, [*columns, Column("Binds")], "for lack of room only in --json and --format html")
    together = sum(row.time_ms for row in rows) or 1.0
    for row in rows:
        share = row.time_ms / together
        bound = words.binds_text(row)
        table.add(
            row.name,
            words.time_text(row.time_ms),
            f"{bar(share, _BAR)} {share:5.1%}",
            words.giga_text(row.operations_per_s) if row.counted else "",
            words.giga_text(row.bytes_per_s) if row.counted else "",
            words.share_text(row.share_of_roof),
            (bound, _STYLES[bound]),
        )
    return table


def profile_page(profile: Profile) -> str:
    """The whole page. Every text of the profile is escaped."""
    name = artifact_name(profile)
    return render(
        "report/templates/profile.html",
        f"{name} \u00b7 compress profile",
        json.dumps(profile.to_json()),
        name=name,
        profile=profile,
        drawing=roofline_chart(profile),
        words=words,
        rows=rows,
    )


def artifact_name(profile: Profile) -> str:
    """`quickstart/2026-11-25T15-03-48` for the model folder of a run, else the last part of the path."""
    parts = [part for part in PurePath(profile.artifact).parts if part != "/"]
    return "/".join(parts[-3:-1]) if len(parts) > 2 and parts[-1] == "model" else (parts or ["artifact"])[-1]
