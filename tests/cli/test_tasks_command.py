"""Tests of `compress tasks`."""

from __future__ import annotations

import json

from command_line import output_of

from compress.tasks.registry import TASK_NAMES


def test_tasks_are_listed_with_columns_and_metrics() -> None:
    rows = {row["name"]: row for row in json.loads(output_of("tasks", "--json"))}
    assert list(rows) == list(TASK_NAMES)
    assert rows["text-classification"]["columns"] == ["text", "label"]
    assert rows["text-classification"]["metrics"][:2] == ["accuracy", "f1"]
    shown = output_of("tasks")
    assert all(name in shown for name in TASK_NAMES) and max(map(len, shown.splitlines())) <= 80
