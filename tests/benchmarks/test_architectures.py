"""Tests of a thirtieth of all architectures, which changes daily: none may be worse than the committed table."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from rotation import todays

pytestmark = pytest.mark.slow

TABLE: dict[str, Any] = runpy.run_path(
    str(Path(__file__).parents[2] / "benchmarks" / "architectures" / "__main__.py"), run_name="table"
)
GROUPS, RECORDED = TABLE["GROUPS"], TABLE["recorded"]()
ALL = [(key, name) for key, group in GROUPS.items() for name in group.names if name in RECORDED[key]]
TODAY = todays(ALL, 30, lambda one: one[1])


@pytest.mark.parametrize(("key", "name"), TODAY)
def test_architecture_is_no_worse_than_the_table(key: str, name: str) -> None:
    row = GROUPS[key].row(name)
    assert GROUPS[key].worse(RECORDED[key][name], row) == [], row


def test_worse_columns_of_a_row_are_named() -> None:
    group = GROUPS["texts"]
    good = ["bert", "2e-07", "2 fused", "1.0%", "30%", "yes", "yes", "yes", ""]
    assert len(good) == len(group.columns)
    assert group.worse(good, good) == []
    assert group.worse(good, ["bert", "2e-07", "as it is", "no", "", "yes", "yes", "no", "x"]) == [
        *("attention", "INT8 error", "pruned layers")
    ]


def test_every_architecture_has_a_row() -> None:
    assert {key: set(group.names) for key, group in GROUPS.items()} == {
        key: set(rows) for key, rows in RECORDED.items()
    }
